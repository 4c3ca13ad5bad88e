"""Real gloo groups of forked processes: they form without a TCPStore, and a rank gets out of a collective whose peer stopped or died."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_gemini.rendezvous import backends

WORLD = 3


class FolderStore(dist.Store):
    """What `AgentStore` offers (set, get, wait and nothing else), over files."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def _path(self, key: str) -> Path:
        return self.folder / key.replace("/", "_")

    def set(self, key: str, value: str | bytes) -> None:  # type: ignore[override]
        path = self._path(key)
        draft = path.with_suffix(f".{os.getpid()}.draft")
        draft.write_bytes(value.encode() if isinstance(value, str) else value)
        draft.rename(path)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._path(key).read_bytes()

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:  # type: ignore[override]
        deadline = time.monotonic() + 20
        while not all(self._path(key).exists() for key in keys):
            assert time.monotonic() < deadline, keys
            time.sleep(0.002)


class Ranks:
    """`WORLD` forked processes that run `body(rank, tell)`; what a rank tells arrives line by line."""

    def __init__(self, body: Callable[[int, Callable[[str], None]], None]) -> None:
        self.pids: list[int] = []
        self.pipes: list[int] = []
        for rank in range(WORLD):
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    signal.alarm(60)
                    body(rank, lambda text, writer=writer: os.write(writer, f"{text}\n".encode()) and None)  # type: ignore[misc]
                except BaseException:
                    os.write(writer, traceback.format_exc().encode())
                finally:
                    os._exit(0)
            os.close(writer)
            self.pids.append(pid)
            self.pipes.append(reader)

    def hear(self, rank: int) -> str:
        text = b""
        while not text.endswith(b"\n"):
            part = os.read(self.pipes[rank], 1)
            if not part:
                break
            text += part
        return text.decode().strip()

    def end(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for pipe in self.pipes:
            os.close(pipe)


def join(folder: Path, rank: int) -> tuple[dist.ProcessGroupGloo, str]:
    address = backends.loopback_address(rank, os.getppid())
    return backends.form_gloo(FolderStore(folder), rank, WORLD, address, 60.0), address


def test_they_add(tmp_path: Path) -> None:
    def body(rank: int, tell: Callable[[str], None]) -> None:
        group, _ = join(tmp_path, rank)
        x = torch.tensor([1.0 + rank])
        group.allreduce([x]).wait()
        tell(str(x.item()))
        group.barrier().wait()

    ranks = Ranks(body)
    try:
        assert [ranks.hear(rank) for rank in range(WORLD)] == ["6.0"] * WORLD
    finally:
        ranks.end()


def test_a_second_generation_under_another_prefix(tmp_path: Path) -> None:
    def body(rank: int, tell: Callable[[str], None]) -> None:
        for generation in range(3):
            whole, address = FolderStore(tmp_path), backends.loopback_address(rank, os.getppid())
            store = dist.PrefixStore(f"{generation}/", whole)
            group = backends.form_gloo(store, rank, WORLD, address, 60.0)
            x = torch.tensor([1.0])
            group.allreduce([x]).wait()
            tell(str(x.item()))
            whole.set(f"{generation}/done/{rank}", b"")
            whole.wait([f"{generation}/done/{other}" for other in range(WORLD)])  # the others have their sums too
            backends.free(address)

    ranks = Ranks(body)
    try:
        for _ in range(3):
            assert [ranks.hear(rank) for rank in range(WORLD)] == ["3.0"] * WORLD
    finally:
        ranks.end()


class Bystanders:
    """Sockets of the process that are none of the group's business."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.client = socket.create_connection(self.listener.getsockname())
        self.server, _ = self.listener.accept()
        self.left, self.right = socket.socketpair()
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))

    def work(self) -> bool:
        for a, b in ((self.client, self.server), (self.left, self.right)):
            a.sendall(b"there")
            b.sendall(b"and back")
            if b.recv(99) != b"there" or a.recv(99) != b"and back":
                return False
        self.udp.sendto(b"x", self.udp.getsockname())
        with socket.create_connection(self.listener.getsockname()) as late:
            accepted, _ = self.listener.accept()
            with accepted:
                late.sendall(b"late")
                return self.udp.recv(9) == b"x" and accepted.recv(9) == b"late"


@pytest.fixture
def blocked(tmp_path: Path) -> Iterator[Ranks]:
    """Ranks 0 and 1 in an all-reduce that rank 2 never enters; they free themselves when SIGUSR1 tells them to."""

    def body(rank: int, tell: Callable[[str], None]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # before gloo starts its threads
        group, address = join(tmp_path, rank)
        group.allreduce([torch.ones(1)]).wait()
        bystanders, freed = Bystanders(), [0.0]

        def listen() -> None:  # as the link's thread does: the main thread sits in C++
            signal.sigwait({signal.SIGUSR1})
            freed[0] = time.monotonic()
            tell(f"freed {backends.free(address) > 0}")

        threading.Thread(target=listen, daemon=True).start()
        tell("ready")
        if rank == 2:
            time.sleep(60)
        try:
            group.allreduce([torch.ones(1 << 20)]).wait()
            tell("went through")
        except RuntimeError:
            tell(f"error {time.monotonic() - freed[0] < 1.0 if freed[0] else 'early'}")
        backends.free(address)
        tell(f"bystanders {bystanders.work()}")
        time.sleep(60)

    ranks = Ranks(body)
    assert [ranks.hear(rank) for rank in range(WORLD)] == ["ready"] * WORLD
    time.sleep(0.2)
    yield ranks
    ranks.end()


def test_a_stopped_peer_holds_nobody(blocked: Ranks) -> None:
    os.kill(blocked.pids[2], signal.SIGSTOP)
    time.sleep(0.1)
    os.kill(blocked.pids[0], signal.SIGUSR1)
    assert sorted(blocked.hear(0) for _ in range(3)) == ["bystanders True", "error True", "freed True"]
    os.kill(blocked.pids[1], signal.SIGUSR1)  # it may be free already: rank 0's end of their connection is shut
    told = sorted(blocked.hear(1) for _ in range(3))
    assert told[0] == "bystanders True" and told[1].startswith("error") and told[2].startswith("freed")


def test_a_killed_peer_holds_nobody(blocked: Ranks) -> None:
    os.kill(blocked.pids[2], signal.SIGKILL)
    for rank in (0, 1):
        os.kill(blocked.pids[rank], signal.SIGUSR1)
        told = sorted(blocked.hear(rank) for _ in range(3))
        assert told[0] == "bystanders True" and told[1].startswith("error") and told[2].startswith("freed")


def test_loopback_addresses() -> None:
    for salt in (0, 1, 127, 128, 100_000):
        addresses = [backends.loopback_address(rank, salt) for rank in range(250)]
        assert len(set(addresses)) == 250
        assert len({address.rpartition(".")[0] for address in addresses}) == 1, "a job's ranks share a network"
        for address in addresses:
            first, *octets = map(int, address.split("."))
            assert first == 127 and octets[0] >= 64 and all(0 <= octet <= 255 for octet in octets) and 0 < octets[2] < 255
    assert backends.loopback_address(0, 1).rpartition(".")[0] != backends.loopback_address(0, 2).rpartition(".")[0]


def test_free_without_a_group_does_nothing() -> None:
    bystanders = Bystanders()
    assert backends.free(backends.loopback_address(0, 3)) == 0
    assert bystanders.work()
    for sock in vars(bystanders).values():
        sock.close()
