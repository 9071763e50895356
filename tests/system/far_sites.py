"""A federation over a wide-area network: a hub, a site behind sshd, one that waits, one behind a NAT, from a profile.

All processes are those that a user starts: ``daskfed up`` at the hub, ``daskfed site join`` at the two that dial in.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml

from tests.system.ssh_server import SshServer, ssh_server
from tests.system.wan import Wan, wan

ROOT = Path(__file__).resolve().parents[2]
DASKFED = (sys.executable, "-m", "daskfed")
BARE_PYTHON = str(Path(sys.base_prefix) / "bin" / "python3")  # which has none of our packages
PROFILE = "far"
DIAL_IN = ("waiting", "nat")
WORKER = {"n_workers": 1, "threads_per_worker": 1}
TOKEN = re.compile(r"site (\w+) is waited for.*?(join-\S+)", re.DOTALL)
COMMAND_S = 90.0


class Place:
    """A machine of the network with a user of its own: their configuration, keys and processes lie in a folder."""

    def __init__(self, net: Wan, site: str, folder: Path, config: Mapping[str, object]) -> None:
        self.net, self.site, self.folder = net, site, folder
        (folder / "config").mkdir(parents=True)
        own = {"state": str(folder / "state"), "keys": str(folder / "keys")}
        (folder / "config" / "daskfed.yaml").write_text(yaml.safe_dump({"daskfed": {**own, **config}}))
        self.environment = {"HOME": str(folder), "DASK_CONFIG": str(folder / "config")}

    def run(self, *command: str, timeout_s: float = COMMAND_S, ok: bool = True) -> str:
        """Run a command there and return what it said; raises AssertionError where it fails and should not."""
        done = subprocess.run(
            [*self.net.inside(self.site), *command], env={**os.environ, **self.environment}, cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=timeout_s,
        )  # fmt: skip
        assert (done.returncode == 0) == ok, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def begin(self, *command: str) -> subprocess.Popen[str]:
        """Start a command there."""
        return subprocess.Popen(
            [*self.net.inside(self.site), *command], env={**os.environ, **self.environment}, cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def process(self, *names: str) -> int:
        """Return the id of a process in the background there."""
        told = json.loads((self.folder / "state" / Path(*names) / "process").read_text())
        return int(told["pid"])


class FarSites:
    """The federation, up."""

    def __init__(self, net: Wan, server: SshServer, folder: Path) -> None:
        self.net, self.server = net, server
        self.login_home = folder / "login"
        self.address = f"zmq://{net.address('hub')}:{net.port('hub')}"
        dialling = {site: {"reach": "waiting", "options": WORKER} for site in DIAL_IN}
        reached = {"reach": f"ssh://{server.name}", "python": sys.executable, "options": WORKER}
        bare = {**reached, "python": BARE_PYTHON, "install": True}
        profiles = {
            PROFILE: {"listen": self.address, "sites": {"login": reached, **dialling}},
            "own": {"sites": {"login": reached, "here": {"options": WORKER}}},
            "bare": {"sites": {"fresh": bare}},
        }
        self.hub = Place(net, "hub", folder / "hub", {"profiles": profiles, "wheels": str(folder / "wheels")})
        (self.hub.folder / ".ssh").symlink_to(server.client)
        self.dialling = {site: Place(net, site, folder / site, {}) for site in DIAL_IN}

    def up(self) -> None:
        """Do what a user does until all sites are there."""
        said = self.hub.run(*DASKFED, "up", PROFILE)
        tokens = dict(TOKEN.findall(said))
        assert tokens.keys() == self.dialling.keys(), said
        for site, place in self.dialling.items():
            place.run(*DASKFED, "site", "join", tokens[site], "--detach")

    def down(self) -> None:
        """End all of it, the network mended."""
        for site in DIAL_IN:
            self.net.mend(site)
        for site, place in self.dialling.items():
            if (place.folder / "state" / "joined" / site).exists():
                place.run(*DASKFED, "site", "stop", site)
        self.hub.run(*DASKFED, "down", PROFILE)

    def example(self, *options: str) -> subprocess.Popen[str]:
        """Start the example over all sites."""
        script = str(ROOT / "examples" / "05_sites_of_a_profile.py")
        return self.hub.begin(sys.executable, script, "--profile", PROFILE, "--sites", "3", *options)

    def status(self) -> dict[str, dict[str, object]]:
        """Return what the hub knows of its sites."""
        local = json.loads((self.hub.folder / "state" / "profiles" / PROFILE / "hub" / "addresses").read_text())[
            "local"
        ]
        return dict(json.loads(self.hub.run(*DASKFED, "status", "--hub", local, "--json")))

    def login_agent(self) -> int:
        """Return the process id of the agent behind sshd."""
        (told,) = self.login_home.glob("state/joined/*/process")
        return int(json.loads(told.read_text())["pid"])

    def all_running(self) -> bool:
        """Whether all sites are connected."""
        return [site["status"] for site in self.status().values()] == ["running"] * 3


def answer(example: subprocess.Popen[str], timeout_s: float = COMMAND_S) -> str:
    """Wait for an example and return what it said; raises AssertionError where it was not right."""
    said, _ = example.communicate(timeout=timeout_s)
    assert example.returncode == 0 and "the same as on this machine: yes" in said, said
    return said


@contextmanager
def far_sites(folder: Path) -> Iterator[FarSites]:
    """Yield the federation; all of it is gone afterwards."""
    with wan() as net:
        login = folder / "login"
        (login / "config").mkdir(parents=True)
        own = {"daskfed": {"state": str(login / "state"), "keys": str(login / "keys")}}
        (login / "config" / "daskfed.yaml").write_text(yaml.safe_dump(own))
        session = {"HOME": str(login), "DASK_CONFIG": str(login / "config"), "PYTHONPATH": str(ROOT)}
        with ssh_server(net, session) as server:
            sites = FarSites(net, server, folder)
            try:
                sites.up()
                yield sites
            finally:
                sites.down()
