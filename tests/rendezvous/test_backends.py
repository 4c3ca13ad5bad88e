"""Real gloo groups of forked processes: they form without a TCPStore, and a rank gets out of a collective whose peer stopped or died."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from lightning_gemini.peers.node import PeerNode
from lightning_gemini.peers.roster import Roster
from lightning_gemini.rendezvous import backends
from lightning_gemini.rendezvous.store import PeerStore
from tests.support.forked import Ranks, Tell

WORLD = 3


class Member:
    """What a rank needs to form groups."""

    def __init__(self, rank: int, host: str = "127.0.0.1") -> None:
        self.rank, self.host = rank, host
        self.node = PeerNode(Roster.on_one_node(f"backends-{os.getppid()}", WORLD), rank, timeout_s=20)
        self.endpoints = backends.Endpoints()

    def form(self, generation: int = 0) -> dist.ProcessGroupGloo:
        self.node.open(generation)
        device, (host, port) = self.endpoints.listen(self.host)
        everyone = self.node.all_gather(generation, "endpoints", self.rank, WORLD, f"{host} {port}".encode())
        self.endpoints.expect([(where.split()[0].decode(), int(where.split()[1])) for where in everyone])
        return backends.form_gloo(PeerStore(self.node, generation=generation), self.rank, WORLD, device, 60.0)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_they_add_and_add_again_in_the_next_generations(host: str) -> None:
    def body(rank: int, tell: Tell) -> None:
        member = Member(rank, host)
        for generation in range(3):
            group = member.form(generation)
            x = torch.tensor([1.0 + rank])
            group.allreduce([x]).wait()
            member.node.all_gather(generation, "done", rank, WORLD, b"")  # the others have their sums too
            member.endpoints.free()
            tell(f"{x.item()}")

    ranks = Ranks(body, WORLD)
    try:
        for _ in range(3):
            assert [ranks.hear(rank) for rank in range(WORLD)] == ["6.0"] * WORLD
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
def blocked() -> Iterator[Ranks]:
    """Ranks 0 and 1 in an all-reduce that rank 2 never enters; they free themselves when SIGUSR1 tells them to."""

    def body(rank: int, tell: Tell) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # before gloo starts its threads
        member = Member(rank)
        group = member.form()
        group.allreduce([torch.ones(1)]).wait()
        bystanders, freed = Bystanders(), [0.0]

        def listen() -> None:  # as the link's thread does: the main thread sits in C++
            signal.sigwait({signal.SIGUSR1})
            freed[0] = time.monotonic()
            tell(f"freed {member.endpoints.free() > 0}")

        threading.Thread(target=listen, daemon=True).start()
        tell("ready")
        if rank == 2:
            time.sleep(60)
        try:
            group.allreduce([torch.ones(1 << 20)]).wait()
            tell("went through")
        except RuntimeError:
            tell(f"error {time.monotonic() - freed[0] < 1.0 if freed[0] else 'early'}")
        member.endpoints.free()
        tell(f"bystanders {bystanders.work()}")
        time.sleep(60)

    ranks = Ranks(body, WORLD)
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


def test_a_forked_child_leaves_a_replaced_group_alone() -> None:
    """A loader's worker whose garbage collector finds a group of an earlier generation must not run the group's destructor."""

    def body(rank: int, tell: Tell) -> None:
        member = Member(rank)
        replaced: dict[str, object] = {"group": member.form()}
        replaced["itself"] = replaced
        gc.disable()  # it is the child's that comes first
        del replaced
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)
            gc.collect()
            os._exit(0)
        tell(f"ended {os.waitpid(child, 0)[1]}")
        member.node.all_gather(0, "done", rank, WORLD, b"")

    ranks = Ranks(body, WORLD)
    try:
        assert [ranks.hear(rank) for rank in range(WORLD)] == ["ended 0"] * WORLD
    finally:
        ranks.end()


def test_free_without_a_group_does_nothing() -> None:
    bystanders = Bystanders()
    assert backends.Endpoints().free() == 0
    assert bystanders.work()
    for sock in vars(bystanders).values():
        sock.close()
