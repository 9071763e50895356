"""The process behind :mod:`tests.system.wan`: it makes the namespaces, carries their packets, and takes all down again.

``python -m tests.system.wan_keeper TAG DELAY_S`` says "ready", obeys lines on its standard input ("cut nat",
"mend nat", "delay 0.05") and answers each, with "ok" or a complaint. When its input ends, or the process that started
it is gone, it ends what still runs inside the namespaces, names it ("left 4711 sleep 60"), and leaves nothing. So that
also holds when a test is killed.

Packets cross between the sites in user space: each site has a TUN device, and what is read from one is written to
another after the delay. Kernels of test machines often have no netem. The devices pass whole TCP segments of up to
64 KB (IFF_VNET_HDR, TUN_F_TSO4), which is many times as fast as packets of 1500 bytes.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fcntl import ioctl
from ipaddress import IPv4Address
from pathlib import Path
from struct import pack

NETWORK = "10.81.0.0/24"
ADDRESSES = {"hub": "10.81.0.1", "ssh": "10.81.0.2", "waiting": "10.81.0.3", "nat": "10.81.0.4"}  # as others see them
OPEN_PORTS = {"hub": 8700, "ssh": 2222}  # the only ones that can be dialled from elsewhere: of the hub, and of sshd
ROUTER = "router"  # the namespace that has the address of "nat"
INNER, GATEWAY = "192.168.81.2", "192.168.81.1"  # of "nat" and of its router, between them
QUEUE_PACKETS = 50_000  # more that are on their way are lost, as in a router
AT_ONCE = 32  # packets read from one site before the others have their turn
LOOK_S = 1.0  # between looks whether the starter still lives
GRACE_S = 2.0  # for processes that are about to end when the test does
END_S = 10.0  # most seconds for all of them to end

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 1, 2
HEADER = 10  # bytes of virtio's header before each packet
CLONE_NEWNET = 0x40000000

FIREWALL = """
table inet reach {
  chain input {
    type filter hook input priority 0; policy drop;
    iifname != "wan0" accept
    ct state established,related accept
    icmp type echo-request accept
    %(accept)s
  }
  chain output {
    type filter hook output priority 0;
    oifname "wan0" ip daddr != %(network)s reject comment "at once: nobody should wait for the rest of the world"
  }
}
"""
MASQUERADE = """
table ip nat {
  chain postrouting { type nat hook postrouting priority 100; oifname "wan0" masquerade; }
}
table ip inner {
  chain forward {
    type filter hook forward priority 0; policy drop;
    iifname "lan0" ip daddr != %(network)s reject
    iifname "lan0" accept
    ct state established,related accept
  }
}
"""


def namespaces(tag: str) -> dict[str, str]:
    """Return the names of the namespaces of a run: site -> namespace."""
    return {name: f"df{tag}{name}" for name in (*ADDRESSES, ROUTER)}


def path_of(namespace: str) -> Path:
    """Return the file by which a namespace is entered."""
    return Path("/run/netns") / namespace


def enter(namespace: int) -> None:
    """Move this thread into the network namespace of an open file."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


@contextmanager
def entered(namespace: str) -> Iterator[None]:
    """Have this thread inside a namespace for a while: sockets that it makes then belong there for good."""
    with open("/proc/thread-self/ns/net", "rb") as own, path_of(namespace).open("rb") as other:
        enter(other.fileno())
        try:
            yield
        finally:
            enter(own.fileno())


def call(*command: str, given: str = "") -> str:
    """Run a command and return what it says; raises RuntimeError with its complaint where it fails."""
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr or done.stdout}{given}")
    return done.stdout


def ip_inside(namespace: str, *lines: str) -> None:
    """Run several ``ip`` commands in a namespace."""
    call("ip", "-n", namespace, "-batch", "-", given="\n".join(lines) + "\n")


def inside(namespace: str, *command: str, given: str = "") -> str:
    """Run a command in a namespace, without the mounts that ``ip netns exec`` hides."""
    return call("nsenter", f"--net={path_of(namespace)}", *command, given=given)


def open_tun(namespace: str) -> int:
    """Make the device wan0 in a namespace and return the file of its packets."""
    with entered(namespace):
        file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        ioctl(file, TUNSETIFF, pack("16sH22x", b"wan0", IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
        ioctl(file, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
        return file


def build(tag: str) -> dict[str, int]:
    """Make the namespaces and return the files of their links: site -> file."""
    names = namespaces(tag)
    for namespace in names.values():
        call("ip", "netns", "add", namespace)
        ip_inside(namespace, "link set lo up")
    links = {site: make_link(names[ROUTER if site == "nat" else site], site) for site in ADDRESSES}
    put_behind_router(names["nat"], names[ROUTER])
    return links


def make_link(namespace: str, site: str) -> int:
    """Give a namespace the address and the firewall of a site, and return the file of its link."""
    file = open_tun(namespace)
    ip_inside(
        namespace,
        f"addr add {ADDRESSES[site]}/24 dev wan0",
        "link set wan0 txqueuelen 5000 up",
        "route add default dev wan0",  # as everywhere: this is how programs find their own address
    )
    port = OPEN_PORTS.get(site)
    accept = f"tcp dport {port} accept" if port else ""
    inside(namespace, "nft", "-f", "-", given=FIREWALL % {"accept": accept, "network": NETWORK})
    return file


def put_behind_router(namespace: str, router: str) -> None:
    """Join a namespace with its router, which masks its address and lets nobody in."""
    call("ip", "link", "add", "eth0", "netns", namespace, "type", "veth", "peer", "name", "lan0", "netns", router)
    ip_inside(namespace, f"addr add {INNER}/24 dev eth0", "link set eth0 up", f"route add default via {GATEWAY}")
    ip_inside(router, f"addr add {GATEWAY}/24 dev lan0", "link set lan0 up")
    inside(router, "sysctl", "-qw", "net.ipv4.ip_forward=1")
    inside(router, "nft", "-f", "-", given=MASQUERADE % {"network": NETWORK})


def tear_down(tag: str, starter: int) -> list[str]:
    """End what runs inside the namespaces of a run, but its ``starter``; remove these; return what had to be ended.

    There is a grace while the starter is our parent: it did not die, and its processes may be about to end.
    """
    there = [namespace for namespace in namespaces(tag).values() if path_of(namespace).exists()]
    ended: dict[int, str] = {}
    start = time.monotonic()
    while (pids := pids_in(there) - {os.getpid(), starter}) and time.monotonic() < start + END_S:
        if os.getppid() != starter or time.monotonic() > start + GRACE_S:
            ended |= {pid: kill(pid) for pid in pids - ended.keys()}
        time.sleep(0.02)
    for namespace in there:
        call("ip", "netns", "del", namespace)
    return [f"{pid} {words}" for pid, words in ended.items()]


def kill(pid: int) -> str:
    """Kill a process and return its command line."""
    with suppress(OSError):  # it ended meanwhile
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        os.kill(pid, signal.SIGKILL)
        return words.strip()
    return "(ended meanwhile)"


def pids_in(there: Sequence[str]) -> set[int]:
    """Return the processes inside any of these namespaces."""
    return {int(pid) for namespace in there for pid in call("ip", "netns", "pids", namespace).split()}


@dataclass(frozen=True)
class Packet:
    """A packet on its way."""

    due: float  # time.monotonic() at which it arrives
    source: str  # the site that sent it
    target: str  # the site that gets it
    data: bytes  # with virtio's header


class Relay:
    """Carries packets between the links of sites, each after a delay, in the order in which they came."""

    def __init__(self, links: dict[str, int], delay_s: float) -> None:
        self.links = links
        self.delay_s = delay_s
        self.cut: set[str] = set()  # sites whose packets are lost
        self.sites = {IPv4Address(address).packed: site for site, address in ADDRESSES.items()}
        self.underway: deque[Packet] = deque()

    def take(self, source: str) -> None:
        """Read what a site has sent."""
        for _ in range(AT_ONCE):
            try:
                data = os.read(self.links[source], 2**17)
            except BlockingIOError:
                return
            target = self.sites.get(data[HEADER + 16 : HEADER + 20])  # where IPv4 has the destination
            if data[HEADER] >> 4 == 4 and target and len(self.underway) < QUEUE_PACKETS:
                self.underway.append(Packet(time.monotonic() + self.delay_s, source, target, data))

    def deliver(self) -> None:
        """Write what is due, or lose it where a site is cut off."""
        now = time.monotonic()
        while self.underway and self.underway[0].due <= now:
            packet = self.underway.popleft()
            if not self.cut.intersection((packet.source, packet.target)):
                with suppress(OSError):  # the kernel of the target does not want it
                    os.write(self.links[packet.target], packet.data)

    def wait_s(self) -> float:
        """Return the seconds until something is due, at most LOOK_S."""
        due = self.underway[0].due - time.monotonic() if self.underway else LOOK_S
        return min(max(due, 0.0), LOOK_S)

    def obey(self, line: str) -> None:
        """Do what a line of the starter says."""
        verb, argument = line.split()
        if verb == "delay":
            self.delay_s = float(argument)
        elif argument not in self.links:
            raise ValueError(f"no site is named {argument!r}: {', '.join(self.links)}")
        elif verb == "cut":
            self.cut.add(argument)
        else:
            self.cut.discard(argument)

    def run(self, control: int, starter: int) -> None:
        """Carry packets until the ``control`` file ends, or the process ``starter`` is no longer our parent."""
        with selectors.DefaultSelector() as selector:
            selector.register(control, selectors.EVENT_READ)
            for site, link in self.links.items():
                selector.register(link, selectors.EVENT_READ, site)
            while os.getppid() == starter:
                for key, _ in selector.select(self.wait_s()):
                    if key.data:
                        self.take(key.data)
                    elif not self.listen(control):
                        return
                self.deliver()

    def listen(self, control: int) -> bool:
        """Obey the lines that have come and answer each; say whether more can come. A line comes whole: it is short."""
        lines = os.read(control, 4096).decode().splitlines()
        for line in lines:
            try:
                self.obey(line)
                print("ok", flush=True)
            except ValueError as exc:
                print(exc, flush=True)
        return bool(lines)


def main(tag: str, delay_s: str) -> None:
    """Make the namespaces, carry packets, and remove all again."""
    starter = os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with suppress(PermissionError):
        os.nice(-5)  # the delay should be right also where tests use all processors
    try:
        links = build(tag)
        print("ready", flush=True)
        Relay(links, float(delay_s)).run(sys.stdin.fileno(), starter)
    finally:
        left = tear_down(tag, starter)
        with suppress(BrokenPipeError):  # nobody is left to read it
            print("".join(f"left {line}\n" for line in left), end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
