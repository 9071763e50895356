"""A federation on this machine: a hub in this process, and sites in processes of their own, as one Dask Cluster."""

from __future__ import annotations

import asyncio
import atexit
import secrets
import sys
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from distributed.core import Status, clean_exception, rpc
from distributed.deploy import Cluster
from distributed.protocol.serialize import deserialize
from distributed.security import Security

from daskfed.client.launch import SiteProcess
from daskfed.comm.opaque import OpaqueError
from daskfed.config import check_listen
from daskfed.ending import end_tasks
from daskfed.errors import ConfigurationError, SiteStartError, TransferError
from daskfed.hub.peers import own_user
from daskfed.hub.placement import Policy
from daskfed.hub.server import Hub
from daskfed.keys import KeyFolder
from daskfed.messages import Key, Message, SiteHello
from daskfed.policies import policy_named
from daskfed.profile import LOCAL, WAITING, Profile, SiteOptions, named_profile, site_options
from daskfed.reach.listening import command_to_join, listen_also, tunnelled
from daskfed.site.agent import Agent
from daskfed.site.clusters import ClusterSpec

if TYPE_CHECKING:
    from daskfed.reach.sites import SshSite

START_TIMEOUT_S = 120.0
INSTALL_S = 1200.0
POLL_S = 0.02
LOCAL_SITE = "local"

_open: weakref.WeakSet[Federation] = weakref.WeakSet()


class Federation(Cluster):
    """Several sites on this machine, joined by a hub in this process; a Dask Cluster that a Client connects to.

    ``sites`` maps a name to options: ``cluster`` (a Dask Cluster class or its dotted name), ``options`` (its keywords),
    ``scale`` (``{"fixed": 4}``, or ``{"minimum": 0, "maximum": 40}`` to follow the work), ``labels``, ``environments``,
    ``resources``, ``directory`` (working directory of its workers), and all else that a site of a profile may have.
    ``policy`` is a placement policy or its name.
    ``fixed`` declares that no other site will join. ``security`` is a Dask ``Security``, or True for temporary
    certificates; ``listen`` is the hub's address, by default of this machine only; a ``zmq://`` one is listened on as
    well, and ``contact`` is the same as others see it. Sites that wait to be started elsewhere (``reach: waiting``) are
    not waited for: :attr:`invitations` has the command to run there.

    Raises ConfigurationError for a wrong option, SiteStartError where a Cluster class does not import, rejects its
    options or does not start; nothing is left running then.
    """

    status: Status

    def __init__(
        self,
        sites: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        listen: str | None = None,
        contact: str | None = None,
        policy: Policy | str | None = None,
        security: Any = None,
        fixed: bool = False,
        in_process: bool = False,
        start_timeout: float = START_TIMEOUT_S,
        asynchronous: bool = False,
        loop: Any = None,
        name: str | None = None,
    ) -> None:
        self.site_options = {site: site_options(site, given) for site, given in (sites or {}).items()}
        self.security = Security.temporary() if security is True else security or None
        self._hub_options: dict[str, Any] = {"policy": policy_named(policy), "security": self.security, "fixed": fixed}
        self._hub_options["dashboard"] = not (fixed and in_process and len(self.site_options) == 1)
        self._public = listen if listen is not None and listen.startswith("zmq://") else None
        here = "tls://127.0.0.1:0" if self.security else "tcp://127.0.0.1:0"
        self._listen = listen if listen is not None and self._public is None else here
        check_listen(self._public or self._listen, self.security, KeyFolder().has_hub_key)
        self._in_process = in_process
        self._contact = contact
        self.within = ""  # where the hub listens for clients of this process
        self._tunnel = ""  # where the hub listens for tunnels
        self.invitations: dict[str, str] = {}  # of sites that wait -> the command to run there
        self._start_timeout = start_timeout
        self.hub: Hub | None = None
        self._processes: dict[str, SiteProcess | SshSite] = {}
        self._agents: dict[str, Agent] = {}
        super().__init__(asynchronous=asynchronous, loop=loop, name=name)
        _open.add(self)
        if not self.called_from_running_loop:
            self._loop_runner.start()
            self.sync(self._start)

    @classmethod
    def local(cls, *, loop: Any = None, asynchronous: bool = False, **options: Any) -> Federation:
        """Return the embedded default: a hub and one site, both in this process; ``options`` are LocalCluster's."""
        security = options.get("security")
        if security is True:
            security = options["security"] = Security.temporary()
        sites = {LOCAL_SITE: {"options": options}}
        return cls(sites, fixed=True, in_process=True, security=security, loop=loop, asynchronous=asynchronous)

    @classmethod
    def of_profile(cls, profile: Profile | str | None = None, **options: Any) -> Federation:
        """Return the federation of a profile whose hub is embedded, by default of ``daskfed.default-profile``.

        Raises ConfigurationError where there is no such profile, something in it is misspelt, or its hub is elsewhere.
        """
        if not isinstance(profile, Profile):
            profile = named_profile(profile)
        if not profile.embedded:
            raise ConfigurationError(f"the hub of this profile runs elsewhere: connect with Client({profile.hub!r})")
        sites = {name: dict(site) for name, site in profile.sites.items()}
        if profile.listen is not None:
            KeyFolder().ensured("hub")
        return cls(sites, policy=profile.policy, listen=profile.listen, contact=profile.contact, **options)

    # -- starting ----------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        if self.status is not Status.created:
            return
        self.status = Status.starting
        try:
            self.hub = await Hub(**self._hub_options).start_at(self._listen)
            await self._listen_also(self.hub)
            await asyncio.wait_for(self._start_sites(), self._start_timeout + self._install_s())
            security = self.security
            connection_args = security.get_connection_args("client") if security else {}
            self.scheduler_comm = rpc(self.hub.address, connection_args=connection_args)
            await super()._start()
        except BaseException as exc:
            await self._close()
            if isinstance(exc, asyncio.TimeoutError):
                missing = sorted(set(self.site_options) - self._ready_sites() - set(self.invitations))
                raise SiteStartError(f"{missing} did not start within {self._start_timeout:g} s") from None
            raise

    async def _start_sites(self) -> None:
        starting = [asyncio.ensure_future(self._start_site(*each)) for each in self.site_options.items()]
        try:
            await asyncio.gather(*starting)
        finally:
            await end_tasks(*starting)  # where one has failed the others are not to go on

    async def _listen_also(self, hub: Hub) -> None:
        """Have the hub listen for sites that come through tunnels, or dial in, beside for this machine."""
        self.within = await listen_also(hub, "inproc://")
        if tunnelled(self.site_options.values()):
            KeyFolder().ensured("hub")
            self._tunnel = await listen_also(hub, "zmq://127.0.0.1:0")
        if self._public:
            address = await listen_also(hub, self._public)
            self._contact = self._contact or address

    def _install_s(self) -> float:
        """Return how much longer a start may take since something is installed before."""
        return INSTALL_S if any(options.install is not False for options in self.site_options.values()) else 0.0

    async def _start_site(self, name: str, options: SiteOptions) -> None:
        assert self.hub is not None
        if options.reach == WAITING:
            self._invite(name, options)
            return
        if self._in_process:
            await self._start_here(name, options)
        else:
            self._processes[name] = process = self._process_of(name, options)
            await process.start()
        while name not in self._ready_sites():
            await asyncio.sleep(POLL_S)

    def _process_of(self, name: str, options: SiteOptions) -> SiteProcess | SshSite:
        assert self.hub is not None
        if options.reach == LOCAL:
            return SiteProcess(name, self.hub.address, options, self.security)
        from daskfed.reach.sites import HubContact, SshSite

        run = f"{name}.{secrets.token_hex(6)}"  # of this federation alone
        return SshSite(name, options, HubContact.own(self._tunnel, own_user()), run)

    def _invite(self, name: str, options: SiteOptions) -> None:
        """Tell the user how a site joins that waits to be started there."""
        self.invitations[name] = command = command_to_join(name, options, self._contact if self._public else None)
        print(f"site {name} is waited for; run there, once, within a day:\n\n    {command}\n", file=sys.stderr)

    async def _start_here(self, name: str, options: SiteOptions) -> None:
        assert self.hub is not None
        spec = ClusterSpec.of(options, in_process=True)
        port = LocalHub(self.hub, name)
        agent = Agent(
            name, spec, hub=port, labels=options.labels, environments=tuple(options.environments),
            resources=options.resources, data=options.data, data_binding=options.data_binding,
            directory=options.directory,
        )  # fmt: skip
        self._agents[name] = agent
        await agent.start()
        self.hub.add_site(LocalSite(agent))
        await agent.joined()

    def _ready_sites(self) -> set[str]:
        if self.hub is None:
            return set()
        return {name for name, site in self.hub.core.sites.items() if site.status is not None}

    def __await__(self) -> Any:
        async def started() -> Federation:
            await self._start()
            return self

        return started().__await__()

    # -- a Dask Cluster ----------------------------------------------------------------------------------------------

    @property
    def scheduler_address(self) -> str:
        """Address of the hub, as a Client wants it."""
        return self.hub.address if self.hub is not None else "<not started>"

    @property
    def dashboard_link(self) -> str:
        """URL of the hub's page, which links the sites' dashboards; of the embedded default, its site's dashboard."""
        return self.hub.gateway.dashboard_link() if self.hub is not None else ""

    def scale(self, n: int | Mapping[str, int], site: str | None = None) -> Any:
        """Scale to ``n`` workers: at one site, or in all, spread evenly; or to a number per site, given as a dict."""
        if isinstance(n, Mapping):
            wanted = dict(n)
        elif site is not None:
            wanted = {site: n}
        else:
            share, rest = divmod(n, len(self.site_options))
            wanted = {name: share + (i < rest) for i, name in enumerate(self.site_options)}
        self._known(wanted)
        return self.sync(self._each, "scale", {name: {"n": count} for name, count in wanted.items()})

    def adapt(self, *, site: str | None = None, **kwargs: Any) -> Any:
        """Let one site, or each of them, scale itself between bounds; keywords as for ``Cluster.adapt``."""
        names = [site] if site is not None else list(self.site_options)
        self._known(names)
        return self.sync(self._each, "adapt", dict.fromkeys(names, kwargs))

    def drain(self, site: str) -> Any:
        """Let a site hand its keys over and leave."""
        self._known([site])
        return self.sync(self._each, "drain", {site: {}})

    async def _each(self, method: str, calls: Mapping[str, Mapping[str, Any]]) -> None:
        assert self.hub is not None
        try:
            await asyncio.gather(*(self.hub.gateway.fed_cluster(name, method, kw) for name, kw in calls.items()))
        except OpaqueError as exc:  # of a site: here it may be opened
            pickled = exc.exception
            opened = clean_exception(deserialize(pickled.header, pickled.frames))[1]
            raise (opened or exc) from None

    def _known(self, names: Any) -> None:
        unknown = set(names) - set(self.site_options)
        if unknown:
            raise ConfigurationError(f"no site {sorted(unknown)} here; sites are {sorted(self.site_options)}")

    def __repr__(self) -> str:
        sites = ", ".join(self.site_options)
        workers = len(self.scheduler_info["workers"])
        return f"<Federation {self.name!r} at {self.scheduler_address}, sites: {sites or 'none'}, workers: {workers}>"

    # -- ending ------------------------------------------------------------------------------------------------------

    async def _close(self) -> None:
        if self.status is Status.closed:
            return
        await super()._close()
        await asyncio.gather(*(process.close() for process in self._processes.values()), return_exceptions=True)
        for agent in self._agents.values():
            with suppress(OSError):
                await agent.close()
        if self.hub is not None:
            await self.hub.close()

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        self._loop_runner.stop()


class LocalHub:
    """The hub, as an agent in the same process sees it."""

    def __init__(self, hub: Hub, site: str) -> None:
        self.hub = hub
        self.site = site
        self.epoch = hub.core.ledger.epoch
        self.federation = hub.secret
        self.door = ""  # it has none that others could reach

    def send(self, message: Message, payload: Any = None) -> None:
        """Give the hub a message of the site."""
        self.hub.from_site(self.site, message, payload)

    async def call(self, op: str, /, **kwargs: Any) -> Any:
        """Call an RPC handler of the hub."""
        return await self.hub.handlers[op](**kwargs)

    def relay(self, site: str, keys: list[Key]) -> AsyncIterator[dict[str, Any]]:
        """Yield the messages of keys of another site, which come through the hub; TransferError where it has left."""
        if (port := self.hub.ports.get(site)) is None:
            raise TransferError(f"site {site!r} is not connected to the hub")
        return port.stream_keys(keys, self.federation)


class LocalSite:
    """An agent in the same process, as the hub sees it."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent

    @property
    def hello(self) -> SiteHello:
        """What the site says of itself."""
        return self.agent.hello

    @property
    def connected(self) -> bool:
        """Always, as it is in the same process."""
        return True

    def send(self, message: Message, payload: Any = None) -> None:
        """Give the agent a message of the hub, after the present step of the hub has ended."""
        asyncio.get_running_loop().call_soon(self.agent.deliver, message, payload)

    async def call(self, op: str, /, **kwargs: Any) -> Any:
        """Call an RPC handler of the agent, after it got what was sent before."""
        await asyncio.sleep(0)
        return await self.agent.call(op, **kwargs)

    def stream_keys(self, keys: Collection[Key], token: str, checked: bool = True) -> AsyncGenerator[dict[str, Any]]:
        """Yield the messages with these keys, up to the one that ends them."""
        return self.agent.stream_keys(list(keys), checked)

    async def close(self) -> None:
        """Nothing to end: the agent belongs to the federation object."""


@atexit.register
def _close_open_federations() -> None:
    for federation in list(_open):
        if federation.status not in (Status.closed, Status.created) and not federation.asynchronous:
            with suppress(Exception):
                federation.close(timeout=10)
