"""Frozen parameters that a replaced rank's own script has built otherwise come from a live replica (see `state.frozen`).

Seam: every rank calls `exchange` on its way into a generation. In a job without a frozen base it does nothing. A *giver* is the lowest
live rank that holds the same parameters as a replaced one, on whatever node; under FSDP2 without replicas there is none.

States, for each pair: the replaced rank asks for one chunk after the other and checks what has come; an empty question says that it has
all. Questions and answers are keys of the generation, which ranks keep among themselves (`peers.keys`): no file, no further socket.

Failure: no giver, or bytes that do not match the checksum either -> the job ends with a `ValueError` that names the first parameter. A
further fault -> `StaleGeneration`, and all begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import torch

from lightning_gemini.agent.messages import Plan
from lightning_gemini.recovery.memory import Memory
from lightning_gemini.rendezvous.store import PeerStore
from lightning_gemini.rendezvous.world import World
from lightning_gemini.state.catalogue import Entry, bytes_of, copy_in
from lightning_gemini.state.raw import as_bytes

_CHUNK = 4 << 20


def require_none(lacking: list[Entry], give_up: Callable[[BaseException], None]) -> None:
    """End the job where parameters of the base are not what they were, and nobody can be asked for them."""
    if lacking:
        error = ValueError(
            f"{lacking[0].name} and {len(lacking) - 1} more frozen parameters differ from what they were at the first step, and no live "
            "rank can give them: make the script build the same base in every process (a seed, or a file that stays as it is), or write to "
            "frozen parameters before training begins, or between steps"
        )
        give_up(error)
        raise error


def exchange(memory: Memory, world: World, plan: Plan, lacking: list[Entry] | None, give_up: Callable[[BaseException], None]) -> None:
    """Give to the replaced ranks of `plan`, or, as one of them, get what `lacking` names. The generation has been entered."""
    if not memory.frozen.ever:
        return
    store = PeerStore(world.peers, generation=plan.generation, prefix="frozen/")
    entries = {entry.name: entry for entry in memory.entries() if entry.name.startswith("param/")}
    if memory.rank in plan.replaced:
        for giver in sorted(_givers(memory.rank, entries, plan)):
            _get(store, giver, memory, plan, lacking or [])
        lacking = memory.frozen.differing(lacking or [])
    require_none(lacking or [], give_up)
    for rank in plan.replaced:
        if memory.rank in _givers(rank, entries, plan):
            _give(store, memory.rank, rank, entries)


def _giver(entry: Entry, plan: Plan) -> int | None:
    return next((rank for rank in entry.holders if rank not in plan.replaced), None)


def _givers(rank: int, entries: dict[str, Entry], plan: Plan) -> set[int]:
    """Who gives to `rank`: those of all parameters, so that both sides find the same."""
    found = {_giver(entry, plan) for entry in entries.values() if rank in entry.holders}
    return {giver for giver in found if giver is not None}


def _keys(giver: int, rank: int) -> Iterator[tuple[str, str]]:
    number = 0
    while True:
        yield f"{giver}/{rank}/{number}/asked", f"{giver}/{rank}/{number}/given"
        number += 1


def _get(store: PeerStore, giver: int, memory: Memory, plan: Plan, lacking: list[Entry]) -> None:
    keys = _keys(giver, memory.rank)
    for entry in lacking:
        if _giver(entry, plan) != giver:
            continue
        for start in range(0, bytes_of(entry), _CHUNK):
            asked, given = next(keys)
            store.set(asked, msgspec.msgpack.encode((entry.name, start)))
            copy_in(entry.tensor, start, torch.frombuffer(bytearray(store.get(given)), dtype=torch.uint8))
            store.delete_key(given)  # its owner, and ranks on the way, would keep the bytes as long as the generation lasts
        memory.received += bytes_of(entry)
    asked, _ = next(keys)
    store.set(asked, b"")


def _give(store: PeerStore, giver: int, rank: int, entries: dict[str, Entry]) -> None:
    for asked, given in _keys(giver, rank):
        question = store.get(asked)
        if not question:
            return
        name, start = msgspec.msgpack.decode(question, type=tuple[str, int])
        flat = as_bytes(entries[name].tensor.contiguous())
        store.set(given, flat[start : start + _CHUNK].cpu().numpy().tobytes())
