"""Every private Dask name that daskfed relies on, with what it is needed for; tested on each Dask release.

Nothing else in daskfed imports a name that Dask does not document.
"""

# ruff: noqa: I001  (grouped by what needs them)
from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version

__all__ = [  # names that are exported under another name than their own
    "AnnotationsTombstone",
    "ExprSequence",
    "HLGExprGroup",
    "HLGExprSequence",
    "INPROC_EOF",
    "MapExpr",
    "TaskList",
    "current_annotations",
    "decompress_frames",
    "execute_subgraph",
    "handle_print",
    "handle_warn",
    "inproc_manager",
    "pickle_loads",
    "untested",
    "warn_untested",
]

# -- comm/opaque.py: reading messages without opening what users put into them ---------------------------------------
from dask._expr import CompositeFinalizeCompute as CompositeFinalizeCompute

# -- client/graphs.py and its neighbours: opening a collection's graph on the client ---------------------------------
from dask._expr import Expr as Expr  # what every collection is turned into
from dask._expr import HLGExpr as HLGExpr  # a graph in layers, with the optimiser of its collection
from dask._expr import HLGFinalizeCompute as HLGFinalizeCompute  # what compute() makes of it

# -- client/client.py: what reaches the place where stock sends a graph ----------------------------------------------
from dask._expr import LLGExpr as LLGExpr  # a low-level graph: submit, get(dict)
from dask._expr import _AnnotationsTombstone as AnnotationsTombstone  # "this key has no such annotation"
from dask._expr import _ExprSequence as ExprSequence  # several collections computed together
from dask._expr import _HLGExprGroup as HLGExprGroup  # several graphs that share one optimiser
from dask._expr import _HLGExprSequence as HLGExprSequence

# -- client/cutting.py: reading the nodes of a graph -----------------------------------------------------------------
from dask._task_spec import Alias as Alias  # a key that only stands for another
from dask._task_spec import DataNode as DataNode  # a value that lies in the graph itself
from dask._task_spec import GraphNode as GraphNode  # base of everything in a graph: key, dependencies
from dask._task_spec import List as TaskList  # a list with tasks in it
from dask._task_spec import NestedContainer as NestedContainer  # a list, tuple, set or dict with tasks in it
from dask._task_spec import Task as Task
from dask._task_spec import TaskRef as TaskRef  # a key that a task needs; futures are a kind of it
from dask._task_spec import _execute_subgraph as execute_subgraph  # the function of a fused task
from dask._task_spec import convert_legacy_graph as convert_legacy_graph
from dask._task_spec import cull as cull
from dask._task_spec import fuse_linear_task_spec as fuse_linear_task_spec
from dask._task_spec import parse_input as parse_input  # an argument of submit, with its futures as references
from dask.base import _annotations as current_annotations  # the context variable behind dask.annotate
from dask.core import validate_key as validate_key
from dask.sizeof import sizeof as sizeof
from dask.utils import has_keyword as has_keyword

# -- data/spill.py: folders that end with their process, or are cleared away by the next one -------------------------
from distributed.diskutils import WorkSpace as WorkSpace

# -- hub/coordination.py: distributed's own Variables, Queues, Locks ..., hosted by the hub instead of a scheduler ---
from distributed.broker import Broker as Broker  # topics and their events
from distributed.comm.addressing import parse_address as parse_address  # "tcp://host:port" -> scheme, rest
from distributed.comm.core import BaseListener as BaseListener  # knows who has not shaken hands yet
from distributed.comm.core import Comm as Comm
from distributed.comm.core import Connector as Connector
from distributed.comm.core import FatalCommClosedError as FatalCommClosedError  # TLS refused: no use trying again
from distributed.comm.core import Listener as Listener
from distributed.comm.inproc import _EOF as INPROC_EOF  # the last thing read from an in-process comm
from distributed.comm.inproc import InProc as InProc
from distributed.comm.inproc import InProcConnector as InProcConnector
from distributed.comm.inproc import InProcListener as InProcListener
from distributed.comm.inproc import global_manager as inproc_manager  # which addresses listen in this process
from distributed.comm.tcp import MAX_BUFFER_SIZE as MAX_BUFFER_SIZE  # bytes one stream may hold: half the memory
from distributed.comm.tcp import TCP as TCP
from distributed.comm.tcp import TLS as TLS
from distributed.comm.tcp import TCPConnector as TCPConnector
from distributed.comm.tcp import TCPListener as TCPListener
from distributed.comm.tcp import TLSConnector as TLSConnector
from distributed.comm.tcp import TLSListener as TLSListener
from distributed.comm.tcp import convert_stream_closed_error as convert_stream_closed_error
from distributed.comm.tcp import read_bytes_rw as read_bytes_rw  # read n bytes into a writable buffer

# -- client/progress.py: bars that ask the hub -----------------------------------------------------------------------
from distributed.diagnostics.progressbar import MultiProgressBar as MultiProgressBar
from distributed.diagnostics.progressbar import ProgressBar as ProgressBar
from distributed.event import EventExtension as EventExtension
from distributed.multi_lock import MultiLockExtension as MultiLockExtension
from distributed.protocol.compression import decompress as decompress_frames
from distributed.protocol.pickle import loads as pickle_loads
from distributed.protocol.serialize import Pickled as Pickled  # a value that stock endpoints unpickle on arrival
from distributed.protocol.serialize import Serialize as Serialize
from distributed.protocol.serialize import Serialized as Serialized  # a value that stock schedulers pass on
from distributed.protocol.serialize import ToPickle as ToPickle
from distributed.protocol.serialize import msgpack_decode_default as msgpack_decode_default  # imports an Enum
from distributed.protocol.utils import host_array as host_array  # memory that nobody has zeroed
from distributed.protocol.utils import host_array_from_buffers as host_array_from_buffers
from distributed.protocol.utils import merge_memoryviews as merge_memoryviews  # joins neighbours, no copy
from distributed.protocol.utils import pack_frames as pack_frames
from distributed.protocol.utils import unpack_frames as unpack_frames
from distributed.publish import PublishExtension as PublishExtension
from distributed.queues import QueueExtension as QueueExtension
from distributed.semaphore import SemaphoreExtension as SemaphoreExtension  # also what a Lock is made of
from distributed.recreate_tasks import ReplayTaskClient as ReplayTaskClient  # runs a task again in the client
from distributed.shuffle._core import P2PBarrierTask as P2PBarrierTask  # between the transfers and unpacks of a shuffle
from distributed.utils import format_dashboard_link as format_dashboard_link  # a URL as the configuration wants it
from distributed.variable import VariableExtension as VariableExtension

# -- client/client.py: what reaches the place where stock sends a graph ----------------------------------------------
from distributed.client import _MapExpr as MapExpr  # what Client.map sends

# -- client/observing.py: what Dask's own client does with what tasks print and with their warnings ------------------
from distributed.client import _handle_print as handle_print
from distributed.client import _handle_warn as handle_warn

# -- data/homing.py: a value that a worker takes over without running a task -----------------------------------------
from distributed.worker_state_machine import UpdateDataEvent as UpdateDataEvent

# -- site/session.py: getting values from the workers of a site ------------------------------------------------------
from distributed.utils_comm import gather_from_workers as gather_from_workers


# -- site/forking.py: workers that are forked ------------------------------------------------------------------------
def no_forkserver_preload() -> None:
    """Keep Dask from having Python's forkserver import pandas, which it imports here to see whether it can."""
    import distributed.utils

    distributed.utils._forkserver_preload_set = True


TESTED = ("2026.7.0", "2026.7.1", "2026.8.0")
"""The releases of dask and distributed that the tests pass with: the newest and the two before it."""


def untested(installed: Mapping[str, str], tested: Sequence[str] = TESTED) -> str | None:
    """Return what to say where ``installed``, package -> version, is not among ``tested``; None where all is well."""
    others = [f"{package} {found}" for package, found in installed.items() if found not in tested]
    if not others:
        return None
    newest = "dask=={0} distributed=={0}".format(tested[-1])
    return (
        f"daskfed was not tested with {' and '.join(others)}, only with {', '.join(tested)}; it relies on names that "
        f"Dask may change in any release: if something fails, try pip install {newest}"
    )


@functools.cache
def warn_untested(tested: Sequence[str] = TESTED) -> None:
    """Warn, once in a process, where another dask or distributed is installed than the tests pass with."""
    if problem := untested({package: version(package) for package in ("dask", "distributed")}, tested):
        warnings.warn(problem, stacklevel=3)
