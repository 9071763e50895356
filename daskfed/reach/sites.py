"""A site on another machine that is reached over SSH: started there, and kept in touch with its hub.

::

    hub  <──zmq, encrypted end to end──  port of the site's loopback  <──SSH──  agent, in the background there

The agent outlives its SSH session. When that breaks, another one is made, with another port; the agent finds its
address in a file and joins again. Where the site can dial the hub by itself it does, and SSH only starts and ends it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import platform
import shlex
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from daskfed.config import is_loopback
from daskfed.ending import end_tasks
from daskfed.errors import DaskfedError, SiteStartError
from daskfed.keys import Authorized, KeyFolder, Role, parsed, written
from daskfed.reach.agents import spec_of
from daskfed.reach.hubs import enrol
from daskfed.reach.ssh import Shell, shown

if TYPE_CHECKING:
    from daskfed.profile import SiteOptions

logger = logging.getLogger(__name__)

PYTHON = "python3"
RECONNECT_S = (0.5, 15.0)  # first and longest pause between two attempts to log in again
START_S = 180.0
STOP_S = 40.0
BRIEF_S = 30.0  # a connection that ends sooner, and the one before it did too, is not made again at once
LOOK_S = 2  # whether the agent still runs

Admit = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class HubContact:
    """A hub, as who starts a site knows it: its ``zmq://`` address from here, its key, and how to have a key let in."""

    address: str
    key: bytes
    admit: Admit

    @classmethod
    def own(cls, address: str, owner: str) -> HubContact:
        """Return that of a hub of this user, on this machine."""
        folder = KeyFolder()

        async def admit(public: bytes) -> None:
            folder.admit(Authorized(public, frozenset({Role.SITE}), owner))

        return cls(address, folder.ensured("hub").public, admit)

    @classmethod
    def elsewhere(cls, address: str) -> HubContact:
        """Return that of a hub that this user trusts; raises SiteStartError where none is known there."""
        if not address.startswith("zmq://"):
            raise SiteStartError(f"sites are reached over SSH for a hub at zmq://… only, not for {address}")
        if (key := KeyFolder().hub_at(address)) is None:
            raise SiteStartError(
                f"the key of the hub at {address} is not known: do daskfed keys trust {address} KEY, with the key that "
                "daskfed keys show hub prints there"
            )

        async def admit(public: bytes) -> None:
            await enrol(address, public)

        return cls(address, key, admit)

    @property
    def end(self) -> tuple[str, int]:
        """Its host and port."""
        parsed_ = urlparse(self.address)
        return parsed_.hostname or "", parsed_.port or 0


class SshSite:
    """A site that is started over SSH. ``run`` names it there; one that runs there already by that name goes on."""

    def __init__(self, name: str, options: SiteOptions, hub: HubContact, run: str) -> None:
        self.name = name
        self.options = options
        self.hub = hub
        self.run = run
        self.python = options.python or PYTHON
        self.pid = 0
        self.log = ""  # there
        self.left = False  # it may run on, since nobody could log in to end it
        self._asked = False  # to start, there
        self._machine = ""
        self._folder = ""
        self._direct = False  # it dials the hub by itself
        self._brief = 0  # connections in a row that ended soon
        self._shell: Shell | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()  # the agent
        self._over = asyncio.Event()  # nobody looks after it any more
        self.reason = ""

    async def start(self) -> None:
        """Start it and wait until it has joined the hub; raises SiteStartError, and leaves nothing behind then."""
        try:
            self._shell = await Shell.connect(self.options.reach)
            await self._start(self._shell)
        except BaseException as exc:
            if self._asked:  # however far it came
                await self._end()
            await self._leave()
            if isinstance(exc, DaskfedError) and not isinstance(exc, SiteStartError):
                raise SiteStartError(str(exc)) from exc
            raise
        self._keeper = asyncio.create_task(self._keep(), name=f"keep {self.name}")

    async def _start(self, shell: Shell) -> None:
        facts = await self.checked(shell)
        await self.hub.admit(parsed(facts["key"]))
        self._direct = not is_loopback(self.hub.end[0]) and bool(facts.get("reaches_hub"))
        spec = spec_of(self.name, await self._address(shell), self.options, hub_key=written(self.hub.key), run=self.run)
        self._asked, self._machine = True, facts["machine"]
        command = f"{shown(self.python)} -m daskfed site --spec - --detach"
        told = await shell.call(command, json.dumps(spec) + "\n", START_S)
        if "error" in told:
            raise SiteStartError(f"{shell.url}: {told['error']}")
        self.pid, self._folder, self.log = int(told["pid"]), told["folder"], told["log"]

    async def checked(self, shell: Shell) -> dict[str, Any]:
        """Return what there is at the site; raises SiteStartError where it will not do."""
        facts = await shell.facts(self.python, {"hub": self.hub.end})
        if self.options.install is not False:
            from daskfed.reach.installing import installed

            if problems := python_problems(facts, self.python):
                raise SiteStartError(f"{shell.url}: " + "; ".join(problems))
            more = self.options.install if isinstance(self.options.install, list) else ()
            self.python = await installed(shell, facts, self.python, more)
            facts = await shell.facts(self.python, {"hub": self.hub.end})
        if problems := environment_problems(facts, self.python):
            raise SiteStartError(f"{shell.url}: " + "; ".join(problems))
        return facts

    async def _address(self, shell: Shell) -> str:
        """Return the address of the hub as the site is to dial it."""
        if self._direct:
            return self.hub.address
        return f"zmq://127.0.0.1:{await shell.lead_here(*self.hub.end)}"

    async def _keep(self) -> None:
        """Log in again whenever the connection ends, until the agent does."""
        try:
            while not await self._lasted():
                await self._log_in_again()
            self.reason = "it has ended by itself"
            assert self._shell is not None
            with suppress(DaskfedError):
                _, said, _ = await self._shell.run(f"tail -n 5 {shlex.quote(self.log)}", timeout_s=20)
                self.reason = f"it has ended; the end of {self.log} there:\n{said.rstrip()}"
            self._ended.set()
        except Exception as exc:
            self.reason = f"it is not kept in touch with any more: {type(exc).__name__}: {exc}"
            logger.exception("site %s", self.name)
        finally:
            self._over.set()

    async def _lasted(self) -> bool:
        """Wait until the agent has ended, then True, or the connection has."""
        assert self._shell is not None
        began = time.monotonic()
        try:
            if await self._watch(self._shell):
                return True
            logger.warning("%s ended what looks after the agent; logging in again", self.options.reach)
        except (DaskfedError, OSError) as exc:
            logger.warning("lost %s: %s; logging in again", self.options.reach, exc)
        self._brief = self._brief + 1 if time.monotonic() - began < BRIEF_S else 0
        if self._brief > 1:  # not so fast that somebody takes it for an attack
            await asyncio.sleep(RECONNECT_S[1])
        return False

    async def _watch(self, shell: Shell) -> bool:
        """Wait until the agent has ended: then True; or until the connection has. May raise SiteStartError."""
        look = f"kill -0 {self.pid} 2>/dev/null && echo"  # who writes to nobody ends with the connection
        watch = f"while {look}; do sleep {LOOK_S}; done; echo ended"
        status, said, _ = await shell.run(watch, timeout_s=10**8)
        return status == 0 and said.strip().endswith("ended")

    async def _log_in_again(self) -> None:
        pause, longest = RECONNECT_S
        while True:
            await self._leave()
            try:
                shell = self._shell = await Shell.connect(self.options.reach)
                await self._check_machine(shell)
                if not self._direct:
                    await self._tell_address(shell, await self._address(shell))
                logger.info("logged in at %s again", self.options.reach)
                return
            except (DaskfedError, OSError) as exc:
                logger.info("cannot log in at %s yet: %s", self.options.reach, exc)
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _check_machine(self, shell: Shell) -> None:
        """Raise SiteStartError where this is another machine than the agent's: one name may stand for several."""
        _, said, _ = await shell.run("cat /proc/sys/kernel/random/boot_id", timeout_s=60)
        if said.split()[-1:] != [self._machine]:
            raise SiteStartError(f"{shell.url}: this is another machine than the one where the agent was started")

    async def _tell_address(self, shell: Shell, address: str) -> None:
        """Write down at the site where its hub is now."""
        folder = shlex.quote(self._folder)
        status, _, errors = await shell.run(
            f"cd {folder} && cat > .address && mv .address address", json.dumps(address)
        )
        if status != 0:
            raise SiteStartError(f"{shell.url}: cannot write to {self._folder}: {errors.strip()}")

    async def finished(self) -> str:
        """Wait until the agent has ended by itself, and return what its log says."""
        await self._over.wait()
        return self.reason

    async def close(self) -> None:
        """End the agent and the connection; where nobody can log in, it ends by itself after its orphan-timeout."""
        await end_tasks(self._keeper)
        if self._asked and not self._ended.is_set():
            await self._end()
        await self._leave()
        self._ended.set()
        self._over.set()

    async def _end(self) -> None:
        try:
            await asyncio.wait_for(self._stop(), 2 * STOP_S)
            self._asked = False
        except (DaskfedError, OSError) as exc:
            self.left = True
            why = str(exc) or "nobody answers"
            logger.warning("site %s could not be ended, it ends after its orphan-timeout: %s", self.name, why)

    async def _stop(self) -> None:
        if self._shell is None or self._shell.connection.is_closed():
            self._shell = await Shell.connect(self.options.reach)
        if self._machine:
            await self._check_machine(self._shell)
        await stop_run(self._shell, self.python, self.run)

    async def _leave(self) -> None:
        if self._shell is not None:
            shell, self._shell = self._shell, None
            await shell.close()


async def stop_run(shell: Shell, python: str, run: str) -> bool:
    """End an agent in the background at another machine; say whether it ran. Raises SiteStartError."""
    told = await shell.call(f"{shown(python)} -m daskfed site end {shlex.quote(run)} --json", timeout_s=STOP_S)
    return bool(told.get("ran"))


def python_problems(facts: dict[str, Any], python: str) -> list[str]:
    """Return what is wrong with the version of a site's Python."""
    here, there = platform.python_version(), facts["python"]
    if here.split(".")[:2] == there.split(".")[:2]:
        return []
    return [
        f"{python} there is Python {there}, here is {here}: what one pickles the other cannot run; name a Python "
        f"{'.'.join(here.split('.')[:2])} with option 'python'"
    ]


def environment_problems(facts: dict[str, Any], python: str) -> list[str]:
    """Return what is wrong with the Python of a site, and what it has."""
    problems = [*facts["problems"], *python_problems(facts, python)]
    if facts["versions"]["daskfed"] is None:
        problems.append(
            f"daskfed is not installed for {facts['executable']} there: install it, or say 'install: true', or name "
            "another Python with option 'python'"
        )
    return problems
