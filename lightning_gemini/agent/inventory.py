"""What a node has of one of its ranks, when that stands still: read from the node's memory, and from what the rank has said."""

from __future__ import annotations

from lightning_gemini.agent.member import Member
from lightning_gemini.agent.memory import BOUNDARY, DONORS, Board, NodeFiles, places_of, step_of
from lightning_gemini.recovery.plan import RankInventory
from lightning_gemini.snapshot.collective_log import CollectiveLog
from lightning_gemini.snapshot.manifest import manifest_of
from lightning_gemini.snapshot.slots import SlotFile


def inventory_of(place: int, member: Member, files: NodeFiles, board: Board, first: int) -> RankInventory:
    """Of the rank with number `place` on this node, whose process is `member`; `first`: this node's first rank."""
    ledger, arena, log = SlotFile(files.ledgers[place]), SlotFile(files.arenas[place]), CollectiveLog(files.logs[place])
    try:
        stopped = member.stopped
        alive = stopped is not None and not stopped.unwinding
        tensors, local = (frozenset(slot.step for slot in file.slots()) for file in (arena, ledger))
        boundary = step_of(board.get(place, BOUNDARY))
        if boundary < 0 and tensors:  # this node is new, and nobody has landed yet on what it fetched in a recovery that was cut short
            boundary, local = max(tensors), local | tensors  # the local state is beside the tensors
        return RankInventory(
            alive=alive,
            boundary=stopped.step if alive and stopped else boundary,
            at=stopped.at if alive and stopped else -1,
            wrote=bool(alive and stopped and stopped.wrote),
            in_step=bool(alive and stopped and stopped.in_step),
            local=local,
            tensors=tensors,
            keys={slot.step: manifest_of(arena, slot)[0].key for slot in arena.slots()},
            donors=frozenset(first + other for other in places_of(board.get(place, DONORS))),
            counters=stopped.counters if alive and stopped else log.counters(),
        )
    finally:
        for file in (ledger, arena, log):
            file.close()
