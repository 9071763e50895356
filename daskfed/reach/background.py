"""What a profile has in the background: its hub, and its sites, each a process with a folder (:mod:`.runs`)."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from daskfed.comm.lines import resume_s
from daskfed.config import calm
from daskfed.ending import stop_on_signals, until
from daskfed.errors import ConfigurationError, SiteStartError
from daskfed.hub.peers import own_user
from daskfed.keys import KeyFolder, written
from daskfed.policies import policy_named
from daskfed.profile import LOCAL
from daskfed.reach.agents import agent_of, keys_of, serve, spec_of
from daskfed.reach.hubs import check_hub, sites_of
from daskfed.reach.listening import command_to_join, listen_also, tunnelled
from daskfed.reach.runs import PROFILES, Report, Run, Start, hub_run
from daskfed.reach.sites import HubContact, SshSite, stop_run
from daskfed.reach.ssh import Shell
from daskfed.reach.tokens import VALID_S

if TYPE_CHECKING:
    from daskfed.profile import Profile, SiteOptions

logger = logging.getLogger(__name__)

REJOINED_S = 60.0
GONE_S = 5.0  # after its connection cannot be resumed any more, until the hub has given up a site
LOOK_S = 0.2
ANY_PORT = {"local": "tcp://127.0.0.1:0", "tunnel": "zmq://127.0.0.1:0"}


class Background:
    """The processes of one profile."""

    def __init__(self, name: str, profile: Profile) -> None:
        self.name = name
        self.profile = profile
        self.hub = hub_run(name)

    def site(self, site: str) -> Run:
        """Return the place of a site's process."""
        return Run(PROFILES, self.name, "sites", site)

    # -- the hub -----------------------------------------------------------------------------------------------------

    def start_hub(self) -> Start:
        """Start the hub of this profile."""
        return self.hub.start(self._run_hub)

    async def _run_hub(self, report: Report) -> None:
        from daskfed.hub.server import Hub

        quiet_process()
        stop = stop_on_signals()
        hub = Hub(policy=policy_named(self.profile.policy), state=str(self.hub.state))
        try:
            addresses = await listen_for(hub, self.profile, self.hub.read("addresses") or {})
            self.hub.write("addresses", addresses)
            report({"addresses": addresses, "page": hub.dashboard.link})
            await until(stop, hub.finished())
        finally:
            await hub.close()

    def stop_hub(self) -> bool:
        """End the hub, and forget what it would have kept for another life; say whether it ran.

        Raises ConfigurationError where it runs at another machine.
        """
        ran = self.hub.stop()
        self.hub.forget("state")
        return ran

    def addresses(self) -> dict[str, str]:
        """Return where the hub listens; raises ConfigurationError where it does not run."""
        if not self.profile.embedded:
            return {"local": self.profile.hub}
        if self.hub.pid() is None:
            raise ConfigurationError(f"the hub of profile {self.name!r} does not run: daskfed up {self.name} starts it")
        return dict(self.hub.read("addresses") or {})

    # -- sites -------------------------------------------------------------------------------------------------------

    def start_site(self, site: str) -> Start:
        """Start a site that is local or reached over SSH."""
        options, addresses = self.profile.sites[site], self.addresses()
        run = self.site(site)
        if options.reach == LOCAL:
            spec = spec_of(site, addresses["local"], options)
            return run.start(lambda report: run_agent(report, run, spec))
        run_name = f"{self.name}.{site}.{written(KeyFolder().ensured('id').public)[4:12]}"
        return run.start(lambda report: self._keep_site(report, site, options, run_name))

    def contact(self) -> HubContact:
        """Return the hub as sites on other machines are told of it."""
        if self.profile.embedded:
            tunnel = self.addresses().get("tunnel")
            if tunnel is None:
                raise ConfigurationError(
                    f"the hub of {self.name!r} was started when no site was reached over SSH: do daskfed down "
                    f"{self.name}, then daskfed up {self.name}"
                )
            return HubContact.own(tunnel, own_user())
        return HubContact.elsewhere(self.profile.hub)

    async def _keep_site(self, report: Report, name: str, options: SiteOptions, run_name: str) -> None:
        quiet_process()
        stop, place = stop_on_signals(), self.site(name)
        site = SshSite(name, options, self.contact(), run_name)
        before = place.read("reached")  # of one that was killed, and whose agent may run
        place.write("reached", {"reach": options.reach, "python": site.python, "run": run_name, **(before or {})})
        try:
            if await until(stop, self._joined(site)):
                told = {"reach": options.reach, "python": site.python, "run": run_name, "log": site.log}
                place.write("reached", told)
                report({"joined": name, "pid": os.getpid()})
                if await until(stop, site.finished()):
                    raise SiteStartError(f"site {name}: {site.reason}")
        finally:
            await site.close()
            if not site.left and (site.pid or before is None):
                place.forget("reached")

    async def _joined(self, site: SshSite) -> None:
        """Start a site and wait until the hub has it: an agent that ran already finds the hub's address anew."""
        await site.start()
        hub, deadline = self.addresses()["local"], time.monotonic() + REJOINED_S
        while (await sites_of(hub)).get(site.name, {}).get("status", "away") == "away":
            if time.monotonic() > deadline:
                raise SiteStartError(
                    f"its agent runs there, but has not joined the hub within {REJOINED_S:g} s; its log: {site.log}"
                )
            await asyncio.sleep(LOOK_S)

    def stop_site(self, site: str) -> bool:
        """End a site, wherever it runs; say whether it did. Raises SiteStartError where nobody can log in."""
        run = self.site(site)
        ran = run.stop(timeout_s=100.0)
        if reached := run.read("reached"):  # who kept it was killed, or could not log in
            ran = asyncio.run(_stop_there(reached)) or ran
            run.forget("reached")
        return ran

    def invitation(self, site: str, valid_s: float = VALID_S) -> str:
        """Return the command by which a waiting site joins; raises ConfigurationError where it could not."""
        if not self.profile.embedded:
            raise ConfigurationError(
                f"site {site!r} waits, and its hub runs elsewhere: there, daskfed site invite {site} --hub "
                f"{self.profile.hub} prints the command by which it joins"
            )
        addresses = self.addresses()
        if self.profile.listen and "public" not in addresses:
            raise ConfigurationError(
                f"the hub of {self.name!r} was started without 'listen': daskfed down {self.name}, then daskfed up "
                f"{self.name}"
            )
        return command_to_join(site, self.profile.sites[site], addresses.get("public"), valid_s)


async def listen_for(hub: Any, profile: Profile, before: dict[str, str]) -> dict[str, str]:
    """Have a hub listen for this machine, for tunnels where a site needs one, and where the profile says.

    Where it listened ``before`` it does again, as sites and clients may wait for it there.
    """
    tunnels = tunnelled(profile.sites.values())
    if tunnels or profile.listen:
        KeyFolder().ensured("hub")
    await hub.start_at(await _free(before.get("local"), "local"))
    addresses = {"local": hub.address}
    if tunnels:
        addresses["tunnel"] = await listen_also(hub, await _free(before.get("tunnel"), "tunnel"))
    if profile.listen:
        contact = await listen_also(hub, profile.listen)
        addresses["public"] = profile.contact or contact
    return addresses


async def _free(address: str | None, kind: str) -> str:
    """Return an address where nobody listens: the one given, or any."""
    if address is not None:
        host, _, port = address.rpartition("//")[2].rpartition(":")
        with suppress(OSError):
            server = await asyncio.start_server(lambda reader, writer: writer.close(), host, int(port))
            server.close()
            return address
    return ANY_PORT[kind]


async def run_agent(report: Report, run: Run, spec: dict[str, Any]) -> None:
    """Run a site's agent in the background; where its hub is, it reads in a file."""
    quiet_process()
    stop = stop_on_signals()
    run.write("address", spec["hub"])
    check = check_hub(spec["hub"], None, spec["name"], keys_of(spec), patience_s=resume_s() + GONE_S)
    if not await until(stop, check):
        return
    agent = agent_of(spec, lambda: run.read("address") or spec["hub"])
    told = {"joined": spec["name"], "pid": os.getpid(), "folder": str(run.folder), "log": str(run.log)}
    try:
        await serve(agent, stop, lambda: report(told), lambda why: logger.warning("site %s ends: %s", agent.name, why))
    finally:
        run.forget("address")


def quiet_process() -> None:
    """Make a process in the background what the command line makes one in front."""
    logging.getLogger("asyncssh").setLevel(logging.WARNING)
    calm(tick="250ms", system_monitor="5s")


async def _stop_there(reached: dict[str, Any]) -> bool:
    shell = await Shell.connect(reached["reach"])
    try:
        return await stop_run(shell, reached["python"], reached["run"])
    finally:
        await shell.close()
