"""What a task reads: the paths and URLs in its function and its arguments, as far as they can be seen.

Nothing is opened or called here. A path is found in a ``str``, a ``Path`` or what else has ``__fspath__``, in files of
fsspec, in arrays of zarr and of xarray's backends, in what ``dask.dataframe``, ``dask.bag`` and ``dask.array`` read
with, and in objects that tell it themselves (:class:`TellsPaths`); and in lists, dicts and partials of these, and in
fused tasks. Each type is worked out once; what many tasks share (an opened store) is looked at once.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from distributed import Future

from daskfed.dask_private import Alias, DataNode, Task, TaskRef, execute_subgraph
from daskfed.locations import location

DEEPEST = 24  # levels of objects within objects that are looked into
MOST = 1000  # elements of one list, or dict, that are looked at

READERS: Mapping[str, tuple[str, ...]] = {
    "_io": ("open", "FileIO"),  # what the built-in open says of itself, up to Python 3.13
    "cv2": ("imread",),
    "fsspec": ("open",),
    "geopandas": ("read_",),
    "h5py": ("File",),
    "imageio": ("imread",),
    "io": ("open",),
    "netCDF4": ("Dataset", "MFDataset"),
    "numpy": ("load", "loadtxt", "genfromtxt", "fromfile", "memmap"),
    "pandas": ("read_",),
    "polars": ("read_", "scan_"),
    "pyarrow": ("read_", "open_", "ParquetFile"),
    "rasterio": ("open",),
    "rioxarray": ("open_",),
    "skimage": ("imread",),
    "tifffile": ("imread",),
    "xarray": ("open_", "load_"),
    "zarr": ("open", "load"),
}
"""Known readers: top-level module -> how the names of its functions that read files begin."""

NO_READERS = ("read_sql", "read_gbq", "read_clipboard")  # they begin so, and read no files


@runtime_checkable
class TellsPaths(Protocol):
    """An object that knows which paths or URLs are read when it is used."""

    def __daskfed_paths__(self) -> Iterable[str]:
        """Return the paths and URLs."""
        ...


@dataclass(slots=True)
class Reads:
    """What was found; ``paths`` are locations (:mod:`daskfed.locations`)."""

    paths: dict[str, None] = field(default_factory=dict)
    unclear: list[str] = field(default_factory=list)  # what reads, in words, and from where cannot be told
    in_memory: bool = False  # it reads from a file object that holds its bytes
    has_inputs: bool = False  # it takes what other tasks make

    def add(self, other: Reads) -> None:
        """Take in what was found elsewhere."""
        self.paths |= other.paths
        self.unclear += other.unclear
        self.in_memory |= other.in_memory

    def count(self) -> int:
        """Return a number that grows with each thing found."""
        return len(self.paths) + len(self.unclear) + self.in_memory


class Located(NamedTuple):
    """A path within a file system of fsspec or pyarrow."""

    fs: Any
    path: Any


class Finder:
    """Finds what tasks read. It keeps what it has looked at, so use one for each graph."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, Reads]] = {}  # by id; keeps the objects alive
        self._functions: dict[int, tuple[Any, Any, bool]] = {}  # by id: function, its file system, whether it reads

    def reads(self, *things: Any) -> Reads:
        """Return what is read where these tasks, values or arguments are used."""
        found = Reads()
        for thing in things:
            self.visit(thing, found, 0, None)
        return found

    def call(self, func: Any, args: Iterable[Any]) -> Reads:
        """Return what a call reads; names of functions come out right only if ``func`` is the function itself."""
        found = Reads()
        self.visit_call(func, args, found, 0)
        return found

    def visit(self, thing: Any, into: Reads, depth: int, fs: Any) -> None:
        """Look into one object; a ``str`` in it means a path within ``fs``, if that is given."""
        kind = type(thing)
        if kind not in _visitors:
            _visitors[kind] = _visitor_of(kind)
        if (look := _visitors[kind]) is not None and depth <= DEEPEST:
            look(self, thing, into, depth, fs)

    def visit_call(self, func: Any, args: Iterable[Any], into: Reads, depth: int) -> None:
        """Look into a function and its arguments."""
        known = self._functions.get(id(func))
        if known is None:
            known = self._functions[id(func)] = func, (fs := _file_system_of(func)), fs is not None or is_reader(func)
        _, fs, reads = known
        before = into.count() if reads else 0
        if fs is None:
            self.visit(func, into, depth + 1, None)
        for arg in args:
            self.visit(arg, into, depth + 1, fs)
        if reads and into.count() == before:
            into.unclear.append(_name(func))

    def visit_held(self, held: Held, thing: Any, into: Reads, depth: int) -> None:
        """Look into what an object is made of, once for all tasks that have it."""
        if id(thing) not in self._seen:
            found = Reads()
            try:
                for part in held.parts(thing):
                    self.visit(part, found, depth + 1, None)
            except Exception:  # code of others, on an object that may be broken: then it tells nothing
                found = Reads()
            if held.reads and not found.count():
                found.unclear.append(type(thing).__qualname__)
            self._seen[id(thing)] = thing, found
        into.add(self._seen[id(thing)][1])


def is_reader(func: Any) -> bool:
    """Whether a function is known to read files."""
    while isinstance(func, functools.partial):
        func = func.func
    return _is_reader(getattr(func, "__module__", None) or "", getattr(func, "__name__", ""))


@functools.lru_cache(4096)
def _is_reader(module: str, name: str) -> bool:
    return name.startswith(READERS.get(module.split(".")[0], ())) and not name.startswith(NO_READERS)


def _name(func: Any) -> str:
    while isinstance(func, functools.partial):
        func = func.func
    module = (getattr(func, "__module__", None) or "").removeprefix("_").split(".")[0]
    return ".".join(filter(None, (module, getattr(func, "__name__", type(func).__name__))))


# -- how each type is looked into --------------------------------------------------------------------------------------

Look: TypeAlias = Callable[[Finder, Any, Reads, int, Any], None]


_visitors: dict[type, Look | None] = {}


def _visitor_of(kind: type) -> Look | None:
    """Return how objects of a type are looked into, or None where they hold no paths that we can see."""
    for base in kind.__mro__:
        if base in _LOOKS:
            return _LOOKS[base]
        if (held := _HOLDERS.get(((base.__module__ or "").split(".")[0], base.__name__))) is not None:
            return functools.partial(_look_at_held, held)
    if issubclass(kind, TellsPaths):
        return _look_at_told
    return _look_at_path if issubclass(kind, os.PathLike) else None


def _look_at_text(finder: Finder, text: str, into: Reads, depth: int, fs: Any) -> None:
    if fs is not None:
        text = _url(fs, text)
    if (text.startswith("/") or "://" in text) and (where := location(text)) is not None:
        into.paths[where] = None


def _look_at_path(finder: Finder, path: os.PathLike[Any], into: Reads, depth: int, fs: Any) -> None:
    _look_at_text(finder, os.fsdecode(path), into, depth, fs)


def _look_at_told(finder: Finder, thing: TellsPaths, into: Reads, depth: int, fs: Any) -> None:
    finder.visit_held(Held(lambda thing: list(thing.__daskfed_paths__())), thing, into, depth)


def _look_at_items(finder: Finder, items: Collection[Any], into: Reads, depth: int, fs: Any) -> None:
    for item in islice(items, MOST):
        finder.visit(item, into, depth + 1, fs)


def _look_at_values(finder: Finder, mapping: Mapping[Any, Any], into: Reads, depth: int, fs: Any) -> None:
    _look_at_items(finder, mapping.values(), into, depth, fs)


def _look_at_task(finder: Finder, task: Task, into: Reads, depth: int, fs: Any) -> None:
    if task.func is execute_subgraph:  # its arguments: the tasks in it, the last one's name, names of values, values
        nodes, _, _, *values = task.args
        _look_at_items(finder, [*nodes.values(), *values], into, depth, None)
    else:
        finder.visit_call(task.func, (*task.args, *task.kwargs.values()), into, depth)


def _look_at_partial(finder: Finder, call: functools.partial[Any], into: Reads, depth: int, fs: Any) -> None:
    _look_at_items(finder, [call.func, *call.args, *call.keywords.values()], into, depth, _file_system_of(call.func))


def _look_at_method(finder: Finder, method: Any, into: Reads, depth: int, fs: Any) -> None:
    finder.visit(method.__self__, into, depth + 1, None)


def _look_at_node(finder: Finder, node: DataNode, into: Reads, depth: int, fs: Any) -> None:
    finder.visit(node.value, into, depth + 1, fs)


def _look_at_located(finder: Finder, where: Located, into: Reads, depth: int, fs: Any) -> None:
    _look_at_text(finder, _url(where.fs, os.fspath(where.path)), into, depth, None)


def _look_at_input(finder: Finder, ref: Any, into: Reads, depth: int, fs: Any) -> None:
    into.has_inputs = True


def _look_at_bytes(finder: Finder, file: Any, into: Reads, depth: int, fs: Any) -> None:
    into.in_memory = True


_LOOKS: dict[type, Look] = {
    str: _look_at_text,
    Located: _look_at_located,
    list: _look_at_items,
    tuple: _look_at_items,
    set: _look_at_items,
    frozenset: _look_at_items,
    dict: _look_at_values,
    functools.partial: _look_at_partial,
    type(Finder().reads): _look_at_method,
    Task: _look_at_task,
    DataNode: _look_at_node,
    Alias: _look_at_input,
    TaskRef: _look_at_input,
    Future: _look_at_input,
    io.BytesIO: _look_at_bytes,
    io.StringIO: _look_at_bytes,
}


# -- objects of other packages -----------------------------------------------------------------------------------------


class Held(NamedTuple):
    """How to look into objects of a class: what they are made of, and whether they always read something."""

    parts: Callable[[Any], Iterable[Any]]
    reads: bool = True


def _look_at_held(held: Held, finder: Finder, thing: Any, into: Reads, depth: int, fs: Any) -> None:
    finder.visit_held(held, thing, into, depth)


def _attributes(*names: str) -> Callable[[Any], Iterator[Any]]:
    return lambda thing: (part for name in names if (part := getattr(thing, name, None)) is not None)


def _in_fs(name: str) -> Callable[[Any], Iterator[Any]]:
    return lambda thing: iter([Located(thing.fs, getattr(thing, name))])


def _nothing(thing: Any) -> Iterable[Any]:
    return ()


def _of_fragment(wrapper: Any) -> Iterable[Any]:
    fragment = wrapper.fragment
    return [Located(fragment.filesystem, fragment.path)]


def _of_netcdf(dataset: Any) -> Iterable[Any]:
    return [dataset.filepath()]


_XARRAY = _attributes("array", "_array", "datastore", "_manager", "_filename")

_HOLDERS: dict[tuple[str, str], Held] = {
    ("fsspec", "OpenFile"): Held(_in_fs("path")),
    ("fsspec", "LocalFileOpener"): Held(_attributes("path")),
    ("fsspec", "AbstractBufferedFile"): Held(_in_fs("path")),
    ("fsspec", "FSMap"): Held(_in_fs("root")),
    ("fsspec", "AbstractFileSystem"): Held(_nothing),
    ("pyarrow", "FileSystem"): Held(_nothing),
    ("dask", "FragmentWrapper"): Held(_of_fragment),  # of a parquet file, with filesystem="arrow"
    ("zarr", "Array"): Held(_attributes("store")),
    ("zarr", "AsyncArray"): Held(_attributes("store")),
    ("zarr", "Group"): Held(_attributes("store")),
    ("zarr", "AsyncGroup"): Held(_attributes("store")),
    ("zarr", "StorePath"): Held(_attributes("store")),
    ("zarr", "WrapperStore"): Held(_attributes("_store")),
    ("zarr", "LocalStore"): Held(_attributes("root")),
    ("zarr", "FsspecStore"): Held(_in_fs("path")),
    ("zarr", "FSStore"): Held(_attributes("map")),  # zarr 2
    ("zarr", "ZipStore"): Held(_attributes("path")),
    ("zarr", "MemoryStore"): Held(lambda store: [io.BytesIO()]),  # it holds its bytes
    ("zarr", "Store"): Held(_attributes("path")),
    ("xarray", "BackendArray"): Held(_XARRAY),
    ("xarray", "AbstractDataStore"): Held(_XARRAY),
    ("xarray", "FileManager"): Held(_attributes("_args", "_value")),
    ("xarray", "ExplicitlyIndexed"): Held(_XARRAY, reads=False),
    ("xarray", "NDArrayMixin"): Held(_XARRAY, reads=False),
    ("netCDF4", "Dataset"): Held(_of_netcdf),
    ("netCDF4", "Variable"): Held(lambda variable: [variable.group().filepath()]),
    ("h5py", "File"): Held(_attributes("filename")),
    ("h5py", "Dataset"): Held(_attributes("file")),
}
"""(top-level module, class) -> how to look into it; the nearest class of a type's that is listed counts."""


def _file_system_of(func: Any) -> Any:
    """Return the fsspec file system that a function reads from: one whose method it is, or that it has as ``fs``."""
    while isinstance(func, functools.partial):
        func = func.func
    for name in ("__self__", "fs"):
        owner = getattr(func, name, None)
        if owner is not None and any(base.__name__ == "AbstractFileSystem" for base in type(owner).__mro__):
            return owner
    return None


def _url(fs: Any, path: str) -> str:
    """Return the URL of a path within a file system; of a cache, of what is behind it."""
    names = {base.__name__ for base in type(fs).__mro__}
    if "AsyncFileSystemWrapper" in names:
        return _url(fs.sync_fs, path)
    if "CachingFileSystem" in names:
        return _url(fs.fs, path)
    if "DirFileSystem" in names:
        return _url(fs.fs, f"{fs.path}/{path}")
    if "SubTreeFileSystem" in names:
        return _url(fs.base_fs, f"{fs.base_path}/{path}")
    protocol: Any = getattr(fs, "protocol", None) or getattr(fs, "type_name", "")
    protocol = protocol if isinstance(protocol, str) else protocol[0]
    if protocol in ("file", "local", "abstract", "") or "://" in path:
        return path
    return f"{protocol}://{path.lstrip('/')}"
