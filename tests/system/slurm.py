"""A real Slurm on loopback: its controller, nodes that are processes of this machine, and its authentication by munge.

::

    with slurm() as batch:
        subprocess.run(["sbatch", "job.sh"], env={**os.environ, **batch.environment})
        batch.jobs()    # {"1": "RUNNING"}

Nothing of an installed Slurm is read or changed: all files lie in a temporary folder, and the ports are free ones. Nobody
who is not root here can submit to it. It enforces no limits of memory. What runs in it, and it itself, carries the mark
of the tests; jobs too.
"""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

START_S = 60.0  # most seconds for what takes one, on a machine under load
STOP_S = 15.0
COMMAND_S = 60.0
NODE = "node"
CONFIG = "SLURM_CONF"  # variable by which its programs find their settings, and we find them

SLURM_CONF = """
ClusterName=daskfed
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
PropagateResourceLimits=NONE
DefMemPerCPU=500
"""
NODE_CONF = "NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000 State=UNKNOWN\n"
PARTITION_CONF = "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"


class Slurm:
    """A batch system that runs; made by :func:`slurm`."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.environment = {CONFIG: str(folder / "slurm.conf")}
        self._nodes = [f"{NODE}{number}" for number in range(1, nodes + 1)]
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._write_files()

    def _write_files(self) -> None:
        for name in ("log", "state", "spool"):
            (self.folder / name).mkdir()
        host, (controller, *ports) = socket.gethostname().split(".")[0], free_ports(1 + len(self._nodes))
        text = SLURM_CONF.format(host=host, controller=controller, folder=self.folder)
        for node, port in zip(self._nodes, ports, strict=True):
            text += NODE_CONF.format(node=node, host=host, port=port)
        (self.folder / "slurm.conf").write_text(text + PARTITION_CONF)
        key = self.folder / "munge.key"
        key.touch(0o400)
        key.write_bytes(os.urandom(128))

    # -- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start all of it and wait until every node would take a job; raises AssertionError with the logs else."""
        files = {name: self.folder / f"munge.{name}" for name in ("socket", "key", "pid", "seed")}
        options = [f"--{name}{'-file' if name != 'socket' else ''}={file}" for name, file in files.items()]
        self._begin("munged", "munged", "--foreground", "--force", *options)
        self._wait_for(files["socket"].exists)
        self._begin("slurmctld", "slurmctld", "-D")
        for node in self._nodes:
            self._begin(node, "slurmd", "-D", "-N", node)
        self._wait_for(lambda: self.nodes() == dict.fromkeys(self._nodes, "idle"))

    def _begin(self, name: str, *command: str) -> None:
        """Start a program, which is killed where this process is."""
        with (self.folder / "log" / f"{name}.said").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                ("setpriv", "--pdeathsig", "KILL", *command), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **self.environment}, start_new_session=True,
            )  # fmt: skip

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not condition():
            ended = [name for name, process in self._processes.items() if process.poll() is not None]
            assert not ended and time.monotonic() < deadline, f"{ended or 'nodes'} did not start:\n{self.logs()}"
            time.sleep(0.05)

    def stop(self) -> None:
        """End jobs and daemons; what jobs left running is killed."""
        with suppress(AssertionError, subprocess.TimeoutExpired):
            self.cancel(*self.jobs())
            deadline = time.monotonic() + STOP_S
            while self.jobs() and time.monotonic() < deadline:
                time.sleep(0.1)
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self._processes.values():
            process.wait()

    # -- what a user does --------------------------------------------------------------------------------------------

    def run(self, *command: str) -> str:
        """Run a command of Slurm and return what it said; raises AssertionError where it fails."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=COMMAND_S
        )
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}: {done.stderr}"
        return done.stdout

    def nodes(self) -> dict[str, str]:
        """Return the state of each node; nothing while the controller does not answer."""
        with suppress(AssertionError):
            return dict(line.split() for line in self.run("sinfo", "-h", "-N", "-o", "%N %T").splitlines())
        return {}

    def jobs(self, state: str = "") -> dict[str, str]:
        """Return the state of each job that has not ended, by its id; only those of a state where one is given."""
        found = dict(line.split() for line in self.run("squeue", "-h", "-o", "%i %T").splitlines())
        return {job: its for job, its in found.items() if state in ("", its)}

    def cancel(self, *jobs: str) -> None:
        """Cancel jobs from outside, as a user does, or an administrator."""
        if jobs:
            self.run("scancel", *jobs)

    # -- for those who look into it ----------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Return the processes of its jobs, also of those that have ended."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # it has ended, or is not ours
                environment = process.environ()
                if "SLURM_JOB_ID" in environment and environment.get(CONFIG) == self.environment[CONFIG]:
                    found.append(process)
        return found

    def logs(self) -> str:
        """Return the last lines of what each of its programs said."""
        files = sorted((self.folder / "log").iterdir())
        return "\n".join(f"{file.name}: {line}" for file in files for line in file.read_text().splitlines()[-5:])


def free_ports(count: int) -> list[int]:
    """Return ports of loopback where nobody listens."""
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


@contextmanager
def slurm(nodes: int = 1) -> Iterator[Slurm]:
    """Yield a Slurm whose nodes, of two processors each, are idle; it and its jobs have ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="daskfed-slurm-") as folder:
        batch = Slurm(Path(folder), nodes)
        try:
            batch.start()
            yield batch
        finally:
            batch.stop()
