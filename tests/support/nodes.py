"""Nodes of a cluster on one machine: network namespaces joined by a bridge, each with an address, a link that can be cut and a resolver.

Needs root and iproute2. The bridge has a namespace of its own too, so that no firewall or route of the machine plays a part.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")
_NEWNET, _NEWNS = 0x40000000, 0x00020000
_BIND, _RECURSIVE, _SLAVE = 4096, 16384, 1 << 19
_ETC = Path("/etc/netns")


def run(*words: str) -> None:
    """One command. Raises `OSError` with what it said."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


def ip(*words: str) -> None:
    """One command of iproute2. Raises `OSError`."""
    run("ip", *words)


def require_namespaces() -> None:
    """Skip where they cannot be made; in CI they must be."""
    problem = "" if shutil.which("ip") else "ip (iproute2) is missing"
    if not problem:
        probe = f"probe-{uuid.uuid4().hex[:8]}"
        try:
            ip("netns", "add", probe)
            ip("netns", "del", probe)
        except OSError as error:
            problem = str(error)
    if problem:
        if os.environ.get("CI"):
            pytest.fail(f"CI cannot make network namespaces: {problem}")
        pytest.skip(f"network namespaces cannot be made: {problem}")


def _call(name: str, *arguments: object) -> None:
    """One of libc's functions. Raises `OSError`."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), name)


def _setns(namespace: str) -> None:
    """Moves the calling thread."""
    with open(f"/run/netns/{namespace}") as place:
        _call("setns", place.fileno(), _NEWNET)


def _within(namespace: str, call: Callable[[], T]) -> T:
    """In a thread that is moved there: the others stay."""

    def moved() -> T:
        _setns(namespace)
        return call()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(moved).result()


def require_one_way() -> None:
    """Skip where links cannot be cut in one direction; in CI they must be."""
    require_namespaces()
    if not shutil.which("nft"):
        if os.environ.get("CI"):
            pytest.fail("CI cannot cut links in one direction: nft (nftables) is missing")
        pytest.skip("nft (nftables) is missing")


class Nodes:
    """`count` nodes, numbered from 0. `interface` is what each calls its link."""

    interface = "veth0"

    def __init__(self, count: int) -> None:
        self._name = f"lg{uuid.uuid4().hex[:6]}"
        self._made: list[str] = []
        self._own_etc = not _ETC.exists()
        self.count = count
        try:
            self._switch = self._namespace("switch")
            for bridge in ("bridge0", "bridge1"):
                ip("-n", self._switch, "link", "add", bridge, "type", "bridge")
            self._set_up(self._switch, "bridge0", "10.77.0.254")
            ip("-n", self._switch, "link", "set", "bridge1", "up")
            for number in range(count):
                self._plug_in(number)
        except BaseException:
            self.close()
            raise

    def _namespace(self, name: str) -> str:
        full = f"{self._name}-{name}"
        ip("netns", "add", full)
        self._made.append(full)
        ip("-n", full, "link", "set", "lo", "up")
        return full

    def _set_up(self, name: str, link: str, address: str) -> None:
        ip("-n", name, "address", "add", f"{address}/24", "dev", link)
        ip("-n", name, "link", "set", link, "up")

    def _plug_in(self, number: int) -> None:
        name, port = self._namespace(str(number)), f"port{number}"
        ip("link", "add", port, "netns", self._switch, "type", "veth", "peer", "name", self.interface, "netns", name)
        ip("-n", self._switch, "link", "set", port, "master", "bridge0", "up")
        self._set_up(name, self.interface, self.address(number))

    def address(self, number: int) -> str:
        """Of a node."""
        return f"10.77.0.{number + 1}"

    @property
    def addresses(self) -> list[str]:
        """Of all."""
        return [self.address(number) for number in range(self.count)]

    def command(self, number: int, *command: str) -> list[str]:
        """A command, as it is started from anywhere to run on a node."""
        return ["ip", "netns", "exec", f"{self._name}-{number}", *command]

    def within(self, number: int, call: Callable[[], T]) -> T:
        """What `call` returns on a node."""
        return _within(f"{self._name}-{number}", call)

    def exec(self, number: int, *command: str) -> subprocess.Popen[str]:
        """Start a command on a node; its output is one pipe."""
        line = self.command(number, *command)
        env = {**os.environ, "GLOO_SOCKET_IFNAME": self.interface}
        return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def enter(self, number: int) -> None:
        """Move this process, a forked child of one thread, to a node for good; what `exec` does, without the imports of a new process."""
        _setns(f"{self._name}-{number}")
        os.environ["GLOO_SOCKET_IFNAME"] = self.interface
        own = _ETC / f"{self._name}-{number}" / "resolv.conf"
        if own.exists():
            _call("unshare", _NEWNS)
            _call("mount", b"none", b"/", None, _SLAVE | _RECURSIVE, None)
            _call("mount", str(own).encode(), b"/etc/resolv.conf", None, _BIND, None)

    def cut(self, number: int) -> None:
        """Pull a node's cable: what is sent is lost and nobody is told."""
        ip("-n", self._switch, "link", "set", f"port{number}", "down")

    def mend(self, number: int) -> None:
        """Put it back."""
        ip("-n", self._switch, "link", "set", f"port{number}", "up")

    def part(self, *numbers: int) -> None:
        """These nodes reach each other and nobody else, as when the switches of two rows lose each other; every cable is in its place."""
        for number in numbers:
            ip("-n", self._switch, "link", "set", f"port{number}", "master", "bridge1")

    def join(self, *numbers: int) -> None:
        """They reach the rest again."""
        for number in numbers:
            ip("-n", self._switch, "link", "set", f"port{number}", "master", "bridge0")

    def deafen(self, number: int) -> None:
        """What is sent to a node is lost; what it sends arrives."""
        self._drop(f"oifname port{number}")

    def mute(self, number: int) -> None:
        """What a node sends is lost; what is sent to it arrives."""
        self._drop(f"iifname port{number}")

    def _drop(self, which: str) -> None:
        rules = "add table bridge way; add chain bridge way forward { type filter hook forward priority 0; }"
        run(*self._on_switch(), "nft", f"{rules}; add rule bridge way forward {which} drop")

    def _on_switch(self) -> list[str]:
        return ["ip", "netns", "exec", self._switch]

    def slow(self, number: int, rate: str) -> None:
        """A node's line carries no more than `rate` (a word of tc, such as 8mbit) in either direction."""
        words = ["root", "tbf", "rate", rate, "burst", "32kbit", "latency", "100ms"]
        run("tc", "-n", f"{self._name}-{number}", "qdisc", "replace", "dev", self.interface, *words)
        run("tc", "-n", self._switch, "qdisc", "replace", "dev", f"port{number}", *words)

    def slow_ports(self, number: int, rate: str, ports: Iterable[int]) -> None:
        """What a node sends to these ports, or from them, gets no more than `rate`. All else passes by, small packets first of all: as
        where a line is shared fairly."""
        tc = ["tc", "-n", f"{self._name}-{number}"]
        run(*tc, "qdisc", "replace", "dev", self.interface, "root", "handle", "1:", "htb", "default", "1")
        for name, limit in (("1:1", "1gbit"), ("1:2", rate)):
            run(*tc, "class", "add", "dev", self.interface, "parent", "1:", "classid", name, "htb", "rate", limit)
        rules: list[tuple[str, ...]] = [("1", "u16", "0", "0xff00", "at", "2", "flowid", "1:1")]  # no longer than 255 bytes
        rules += [("2", "ip", end, str(port), "0xffff", "flowid", "1:2") for end in ("dport", "sport") for port in ports]
        for prio, *match in rules:
            run(*tc, "filter", "add", "dev", self.interface, "parent", "1:", "protocol", "ip", "prio", prio, "u32", "match", *match)

    def black_hole(self, number: int, address: str) -> None:
        """What a node sends to an address is lost, as behind a firewall that drops: no refusal, no error."""
        ip("-n", f"{self._name}-{number}", "neighbour", "replace", address, "lladdr", "02:00:00:00:00:01", "dev", self.interface)

    @contextlib.contextmanager
    def silent_resolver(self) -> Iterator[socket.socket]:
        """All nodes ask a name server that never answers; the socket has what they asked it."""
        asked = self._socket_in(self._switch)
        try:
            asked.bind(("10.77.0.254", 53))
            asked.setblocking(False)
            for number in range(self.count):
                folder = _ETC / f"{self._name}-{number}"
                folder.mkdir(parents=True)
                (folder / "resolv.conf").write_text("nameserver 10.77.0.254\noptions timeout:5 attempts:2\n")
            yield asked
        finally:
            asked.close()
            self._forget_resolver()

    def _socket_in(self, namespace: str) -> socket.socket:
        """A UDP socket keeps the namespace in which a thread has made it."""
        return _within(namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))

    def _forget_resolver(self) -> None:
        for number in range(self.count):
            shutil.rmtree(_ETC / f"{self._name}-{number}", ignore_errors=True)
        if self._own_etc:
            with contextlib.suppress(OSError):  # absent, or somebody else's by now
                _ETC.rmdir()

    def close(self) -> None:
        """Remove everything; links go with their namespaces."""
        self._forget_resolver()
        for name in self._made:
            with contextlib.suppress(OSError):
                ip("netns", "del", name)
        self._made.clear()
