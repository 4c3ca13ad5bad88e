"""Process groups of stock torch among peers: every way in, in forked ranks that get real sums from gloo."""

from __future__ import annotations

import gc
import os
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

import lightning_gemini
from lightning_gemini.rendezvous import initialize
from tests.support.meeting import free_port, summed, told
from tests.support.sockets import tcp_sockets, uses

WORLD = 3
SUM = str(2**WORLD - 1)


def init_process_group() -> None:
    lightning_gemini.init_process_group("gloo", timeout=timedelta(seconds=20))


def init_method() -> None:
    dist.init_process_group("gloo", init_method="gemini://", timeout=timedelta(seconds=20))


def init_method_with_arguments() -> None:
    rank, world = int(os.environ.pop("RANK")), int(os.environ.pop("WORLD_SIZE"))
    dist.init_process_group("gloo", init_method="gemini://", rank=rank, world_size=world)


def use_peer_rendezvous() -> None:
    lightning_gemini.use_peer_rendezvous(timeout_s=20.0)
    dist.init_process_group("gloo")


def use_peer_rendezvous_twice() -> None:
    lightning_gemini.use_peer_rendezvous(timeout_s=20.0)
    use_peer_rendezvous()


WAYS = [init_process_group, init_method, init_method_with_arguments, use_peer_rendezvous, use_peer_rendezvous_twice]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_in(way: object) -> None:
    def body(rank: int) -> str:
        assert callable(way)
        way()
        return f"{dist.get_rank()} {dist.get_world_size()} {dist.get_backend()} {summed(rank)}"

    assert told(body, WORLD) == [f"{rank} {WORLD} gloo {SUM}" for rank in range(WORLD)]


def test_on_one_node_the_rendezvous_has_no_tcp_socket() -> None:
    """Seen before gloo, which has its own, is there; with a port, the same look finds one."""

    def body(rank: int) -> int:
        initialize.meet(lightning_gemini.RendezvousConfig())
        return len(tcp_sockets())

    assert told(body, WORLD) == ["0"] * WORLD
    port = free_port(4 * WORLD)
    assert told(lambda _: initialize.meet(lightning_gemini.RendezvousConfig(port=port)) and len(tcp_sockets()), WORLD) == ["1"] * WORLD


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_host_and_port_in_the_url(host: str) -> None:
    port = free_port(4 * WORLD)

    def body(rank: int) -> str:
        dist.init_process_group("gloo", init_method=f"gemini://{host}:{port}")
        (own,) = [sock for sock in tcp_sockets() if sock.listens and sock.local == port + rank]
        return f"{summed(rank)} {len(own.address)}"

    assert told(body, WORLD) == [f"{SUM} {8 if host == '127.0.0.1' else 32}"] * WORLD


def test_an_ipv6_host_as_an_option() -> None:
    port = free_port(4 * WORLD)

    def body(rank: int) -> str:
        lightning_gemini.init_process_group("gloo", hosts=["::1"], port=port)
        (own,) = [sock for sock in tcp_sockets() if sock.listens and sock.local == port + rank]
        return f"{summed(rank)} {own.address}"

    assert told(body, WORLD) == [f"{SUM} 00000000000000000000000001000000"] * WORLD


def test_a_url_adds_to_the_options_of_the_process() -> None:
    """A host list in the URL must not make the process forget its time limit."""

    def body(rank: int) -> str:
        lightning_gemini.use_peer_rendezvous(timeout_s=0.5)
        dist.init_process_group("gloo", init_method="gemini://127.0.0.1,127.0.0.2", rank=rank, world_size=2)
        return "met"

    (answer,) = told(body, 2, {"LIGHTNING_GEMINI_TOKEN": "t"}, ranks=1)
    assert "could not reach rank 1" in answer and "within 0.5 s" in answer


def test_ranks_and_a_second_start_see_no_key_of_the_first() -> None:
    def body(rank: int) -> str:
        sums = []
        for start in range(3):
            init_process_group()
            store = dist.distributed_c10d._get_default_store()
            assert not store.check(["mine"]), "a key of the start before"
            dist.barrier()
            store.set("mine", str(start))
            sums.append(summed(rank))
            dist.barrier()
            dist.destroy_process_group()
        return str(sums)

    assert told(body, WORLD) == [str([int(SUM)] * 3)] * WORLD


def test_a_group_long_after_the_start() -> None:
    """torch's C++ side does not keep a Python store alive: without `PeerNode.keep` a later group finds none ("Not implemented")."""

    def body(rank: int) -> str:
        init_process_group()
        everyone = summed(rank)
        gc.collect()
        pair = dist.new_group([0, 2])
        gc.collect()
        again = dist.new_group([0, 1, 2])
        return f"{everyone} {summed(rank, pair) if rank != 1 else 0} {summed(rank, again)}"

    assert told(body, WORLD) == [f"{SUM} 5 {SUM}", f"{SUM} 0 {SUM}", f"{SUM} 5 {SUM}"]


@pytest.mark.parametrize("own", ["store", "store by position", "init_method"])
def test_a_rendezvous_of_ones_own_is_respected(own: str) -> None:
    port = free_port()

    def body(rank: int) -> str:
        lightning_gemini.use_peer_rendezvous()
        if own == "init_method":
            dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        else:
            store = TCPStore("127.0.0.1", port, 2, rank == 0)
            if own == "store":
                dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
            else:
                dist.init_process_group("gloo", None, timedelta(seconds=20), 2, rank, store)
        return f"{summed(rank)} {uses(port)} {initialize._Process.node}"

    assert told(body, 2) == ["3 True None"] * 2


def test_a_process_does_not_become_another_rank() -> None:
    def body(rank: int) -> str:
        init_process_group()
        dist.destroy_process_group()
        lightning_gemini.init_process_group("gloo", rank=1 - rank, world_size=2)
        return "became"

    for rank, answer in enumerate(told(body, 2)):
        assert f"ValueError: this process is rank {rank} of 2" in answer and f"cannot become rank {1 - rank} of 2" in answer
        assert "leave() first" in answer


def test_after_leaving_it_does() -> None:
    def body(rank: int) -> str:
        init_process_group()
        first = summed(rank)
        dist.barrier()
        dist.destroy_process_group()
        initialize.leave()
        lightning_gemini.init_process_group("gloo", rank=1 - rank, world_size=2, job=os.environ["LIGHTNING_GEMINI_JOB"] + "'")
        return f"{first} {dist.get_rank()} {summed(dist.get_rank())}"

    assert told(body, 2) == ["3 1 3", "3 0 3"]


def test_a_rank_that_exists_twice_is_refused() -> None:
    def body(_: int) -> str:
        lightning_gemini.init_process_group("gloo", rank=0, world_size=2, timeout_s=2.0)
        return "met"

    answers = sorted(told(body, 2))
    assert "DuplicateRank: rank 0" in answers[0] and "a rank of its own" in answers[0]


def test_without_a_token_nothing_listens_beyond_loopback() -> None:
    def body(_: int) -> str:
        with pytest.raises(ValueError, match="peers on other hosts need a secret: set LIGHTNING_GEMINI_TOKEN"):
            lightning_gemini.init_process_group("gloo", hosts=["198.51.100.1", "198.51.100.2"])
        assert initialize._Process.node is None
        return str(tcp_sockets())

    assert told(body, 2, ranks=1) == ["[]"]
