"""Ranks on several nodes (network namespaces joined by a bridge): they meet over TCP, late, without DNS, and say whom they miss."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

import lightning_gemini
from lightning_gemini.rendezvous import initialize
from tests.support.meeting import told
from tests.support.nodes import Nodes, require_namespaces
from tests.support.sockets import tcp_sockets

COUNT = 3
SECRET = {"LIGHTNING_GEMINI_TOKEN": "a secret of this job", "GLOO_SOCKET_IFNAME": Nodes.interface}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    require_namespaces()
    made = Nodes(COUNT)
    yield made
    made.close()


def met(nodes: Nodes, rank: int, node: int, hosts: list[str], timeout_s: float = 20.0) -> str:
    """The sum over all ranks, and how long that took from the start of this one."""
    nodes.enter(node)
    began = time.monotonic()
    lightning_gemini.init_process_group("gloo", hosts=hosts, timeout_s=timeout_s)
    tensor = torch.full((1 << 18,), 2**rank)
    dist.all_reduce(tensor)
    assert tensor.min() == tensor.max()
    return f"{int(tensor[0])} {time.monotonic() - began:.2f}"


def reaches(address: str) -> bool:
    """Whether somebody there says anything, be it that nobody listens."""
    try:
        socket.create_connection((address, 9), timeout=0.5).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def test_two_ranks_on_each_of_three_nodes(nodes: Nodes) -> None:
    def body(rank: int) -> str:
        total = met(nodes, rank, rank // 2, nodes.addresses).partition(" ")[0]
        node = initialize._Process.node
        assert node is not None
        return f"{total} {node.address.host} {sum(sock.listens and sock.local == node.address.port for sock in tcp_sockets())}"

    assert told(body, 6, SECRET) == [f"63 {nodes.address(rank // 2)} 1" for rank in range(6)]


def test_a_rank_that_starts_long_after_the_others(nodes: Nodes) -> None:
    def body(rank: int) -> str:
        if rank == 1:
            time.sleep(2)  # this is the fault, not a wait for something
        return met(nodes, rank, rank, nodes.addresses)

    answers = [answer.split() for answer in told(body, COUNT, SECRET)]
    assert [total for total, _ in answers] == ["7"] * 3
    assert float(answers[0][1]) > 1.5, "the others must have waited"
    assert float(answers[1][1]) < 2, "the late one need not"


def test_ranks_meet_when_a_cable_is_back(nodes: Nodes) -> None:
    def body(rank: int) -> str:
        if rank == 0:
            nodes.enter(0)
            assert not reaches(nodes.address(2))
            nodes.mend(2)
        return met(nodes, rank, rank, nodes.addresses)

    nodes.cut(2)
    try:
        assert [answer.split()[0] for answer in told(body, COUNT, SECRET)] == ["7"] * 3
    finally:
        nodes.mend(2)


def test_a_resolver_that_never_answers_costs_nothing(nodes: Nodes) -> None:
    """A TCPStore looks its peers' addresses up backwards, which hangs where private addresses have no names."""
    with nodes.silent_resolver() as asked:
        look_up = nodes.exec(0, "getent", "hosts", "10.77.0.9")
        try:
            assert select.select([asked], [], [], 10)[0], "the resolver must be the one that names are asked of"
        finally:
            look_up.kill()
            look_up.communicate()
        while select.select([asked], [], [], 0)[0]:
            asked.recv(4096)
        answers = [answer.split() for answer in told(lambda rank: met(nodes, rank, rank, nodes.addresses), COUNT, SECRET)]
        assert [total for total, _ in answers] == ["7"] * 3
        assert all(float(took) < 5 for _, took in answers)
        assert not select.select([asked], [], [], 0)[0], "somebody asked for a name"


@pytest.mark.parametrize("absent", ["10.77.0.99", "no-such-host.invalid"])
def test_a_host_that_does_not_exist_is_named_in_time(nodes: Nodes, absent: str) -> None:
    began = time.monotonic()
    (answer,) = told(lambda rank: met(nodes, rank, rank, [nodes.address(0), absent], timeout_s=2.0), 2, SECRET, ranks=1)
    assert time.monotonic() - began < 5
    assert answer.startswith("Unreachable: rank 0 could not reach rank 1") and "within 2 s" in answer
    assert absent in answer and "is its host's name right?" in answer


def test_a_host_that_swallows_everything_is_named_in_time(nodes: Nodes) -> None:
    """Nothing comes back, not even a refusal, and each attempt would take seconds."""
    nodes.black_hole(0, "10.77.0.98")
    began = time.monotonic()
    (answer,) = told(lambda rank: met(nodes, rank, rank, [nodes.address(0), "10.77.0.98"], timeout_s=2.0), 2, SECRET, ranks=1)
    assert time.monotonic() - began < 5
    assert answer.startswith("Unreachable: rank 0 could not reach rank 1") and "10.77.0.98" in answer


def test_a_name_that_nobody_answers_for_is_named_in_time(nodes: Nodes) -> None:
    began = time.monotonic()
    with nodes.silent_resolver() as asked:
        (answer,) = told(lambda rank: met(nodes, rank, rank, [nodes.address(0), "node9"], timeout_s=2.0), 2, SECRET, ranks=1)
        assert select.select([asked], [], [], 0)[0]
    assert time.monotonic() - began < 5
    assert answer.startswith("Unreachable: rank 0 could not reach rank 1") and "node9" in answer
