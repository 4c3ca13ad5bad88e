"""What a node has of other nodes: replicas that it keeps and sends, votes, and what it fetches in a recovery.

Seam: `coordinator.OtherNodes`; the exchange's `Observer`. A rank's word on the board says which step it has captured; its snapshot is then
sent to the peers of the placement group, and counts as replicated when all of them have acknowledged it. A step loses nothing when that is
slow: see `Engine._may_capture` for what it costs.

Failure: a transfer that failed is asked for again with the rank's next word; a node that is gone is reported to the membership; a fetch
that fails begins another generation, which plans anew without the source that failed.
"""

from __future__ import annotations

import concurrent.futures
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning_gemini.agent.memory import ALWAYS, BOUNDARY, GATE, TENSORS, reached, step_of, tag
from lightning_gemini.agent.mesh import Mesh
from lightning_gemini.agent.votes import Result, Words
from lightning_gemini.placement import Placement, describe, place
from lightning_gemini.recovery.plan import RecoveryPlan
from lightning_gemini.replication.exchange import Exchange
from lightning_gemini.replication.fence import Peer
from lightning_gemini.replication.refill import Want
from lightning_gemini.snapshot.collective_log import CollectiveLog

if TYPE_CHECKING:
    from lightning_gemini.agent.coordinator import Coordinator

_MIB = 1 << 20


class Others:
    """See the module's docstring. Lives in the agent's thread."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.exchange: Exchange
        self.mesh: Mesh
        self._say = say
        self._coordinator: Coordinator
        self._placement: Placement
        self._targets: tuple[int, ...] = ()
        self._keep: set[int] = set()
        """Ranks of other nodes whose replicas belong here."""
        self._nodes: list[str] = []
        self._requested: dict[int, int] = {}
        """Rank of this node -> step that was asked to be sent."""
        self._kept: dict[tuple[int, str], int] = {}
        """(rank of this node, other node) -> step that it keeps."""
        self._ending = 0
        self._told_behind = False
        self._waiting: list[tuple[list[concurrent.futures.Future[Any]], Callable[[], None]]] = []
        """Fetches under way, and what follows when all of one are done."""

    def poll(self) -> None:
        """What the exchange has to tell."""
        self.exchange.poll()
        done = [entry for entry in self._waiting if all(future.done() for future in entry[0])]
        for entry in done:
            self._waiting.remove(entry)
            entry[1]()

    # ---- a generation

    def open(self, coordinator: Coordinator) -> None:
        """See `OtherNodes`."""
        assert coordinator.index is not None
        self._coordinator, index, files = coordinator, coordinator.index, coordinator.files
        nodes, self._nodes = coordinator.nodes, list(coordinator.generation.roster)
        self._requested.clear()
        infos = {place_: nodes[node] for place_, node in enumerate(self._nodes) if node}
        self.exchange.open(coordinator.number, {i: Peer(info.node, info.host, info.port) for i, info in infos.items()}, index)
        own = coordinator.own_ranks()
        self.exchange.hold({rank: files.arenas[coordinator.place(rank)] for rank in own})
        self.exchange.hold_logs({rank: files.logs[coordinator.place(rank)] for rank in own})
        self.mesh.on_result(self._told)
        self.place()
        self.mesh.open(coordinator.number, index, self._nodes, coordinator.board)

    def place(self) -> None:
        """See `OtherNodes`. What is kept for ranks of other groups may be all that is left of them: it stays until others have it."""
        index, nodes = self._coordinator.index, self._coordinator.nodes
        assert index is not None
        domains = [nodes[node].domain if node else "" for node in self._nodes]
        placement = place(domains, min(self._coordinator.config.replication.copies, len(domains)))
        self._placement = placement
        self._targets = placement.targets[index]
        senders = [sender for sender, targets in enumerate(placement.targets) if index in targets]
        per_node = self._coordinator.ranks_per_node
        self._keep = {rank for sender in senders for rank in range(sender * per_node, (sender + 1) * per_node)}

    def describe(self) -> list[str]:
        """See `OtherNodes`."""
        return describe(self._placement)

    def close(self) -> None:
        """See `OtherNodes`."""
        self.mesh.close()
        self.exchange.close()

    # ---- replication

    def voted(self) -> None:
        """See `OtherNodes`."""
        coordinator = self._coordinator
        number, board = coordinator.number, coordinator.board
        for rank in coordinator.own_ranks():
            word = board.get(coordinator.place(rank), TENSORS)
            if (step := step_of(word)) < 0:
                continue
            if reached(word, number, step):
                self._send(rank, step)
            late = next((node for node in self._targets if self._nodes[node] and self._kept_step(rank, node) != step), None)
            if late is not None:
                self._behind_by(rank, step, late)
        self._vote()

    def _send(self, rank: int, step: int) -> None:
        if self._requested.get(rank, -1) == step:
            return
        self._requested[rank] = step
        missing = [index for index in self._targets if self._nodes[index] and self._kept_step(rank, index) != step]
        if missing:
            self.exchange.send(rank, step, missing)

    def _kept_step(self, rank: int, index: int) -> int:
        """The step of a rank of this node that the node at `index` keeps, -1 for none."""
        return self._kept.get((rank, self._nodes[index]), -1)

    def _behind_by(self, rank: int, step: int, index: int) -> int:
        """How many steps training is past the snapshot of `step`, which has just got to a node or is still on its way there."""
        behind = step_of(self._coordinator.board.get(self._coordinator.place(rank), BOUNDARY)) - step
        if behind > 1 and not self._told_behind:
            self._told_behind = True
            self._say(
                f"replication is slower than training: {behind} steps after step {step} its snapshot of rank {rank} is only getting to "
                f"node {index}. A lost node costs that many (see replication.when_behind)"
            )
        return behind

    def _vote(self) -> None:
        board, number = self._coordinator.board, self._coordinator.number
        self.mesh.own(
            Words(
                boundary=board.least(BOUNDARY),
                tensors=board.least(TENSORS),
                gate=board.least(GATE),
                replicated=tag(number, self._replicated()),
                written=self._coordinator.persisting.written,
                end_at=self._ending,
            )
        )

    def _replicated(self) -> int:
        """The newest step of which all ranks of this node are kept by all their peers; -1 for none."""
        steps = [self._kept_step(rank, index) for rank in self._coordinator.own_ranks() for index in self._targets]
        held = self._coordinator.persisting.held  # while it is being copied, the next capture must not overwrite it
        return min(steps, default=ALWAYS) if held < 0 else min([*steps, held - 1])

    def completed(self, word: int) -> None:
        """See `OtherNodes`."""
        self.mesh.completed(word)

    def _told(self, result: Result) -> None:
        number, words = self._coordinator.number, result.words
        captured = step_of(words.tensors)
        if reached(words.tensors, number, captured) and reached(words.replicated, number, max(captured, 0)):
            self.exchange.drop([rank for rank in self.exchange.replicas() if rank not in self._keep])
        persisting = self._coordinator.persisting
        persisting.complete(result.complete)
        if self._coordinator.index == 0 and reached(result.words.written, self._coordinator.number, 0):
            persisting.all_have_written(result.words.written)

    def on_replicated(self, rank: int, step: int, index: int) -> None:
        """See `replication.events.Observer`."""
        self._kept[rank, self._nodes[index]] = step
        self._coordinator.emit("replicated", rank=rank, step=step, node=index, behind=self._behind_by(rank, step, index))
        self._vote()

    def on_failed(self, rank: int, step: int, index: int, why: str) -> None:
        """See `replication.events.Observer`."""
        self._requested.pop(rank, None)
        self._coordinator.emit("replication_failed", rank=rank, step=step, node=index, reason=why)
        self._say(f"the snapshot of rank {rank} at step {step} did not get to node {index}: {why}")

    def on_control(self, index: int, node: str, sock: socket.socket) -> None:
        """See `replication.events.Observer`."""
        self.mesh.accept(index, node, sock)

    def on_news(self, text: str) -> None:
        """See `replication.events.Observer`."""
        self._say(text)

    def replicas(self) -> dict[int, dict[int, str]]:
        """See `OtherNodes`."""
        return self.exchange.keys_of_replicas()

    def ask_to_end(self) -> None:
        """See `OtherNodes`."""
        self._ending = 1
        self._vote()

    # ---- a recovery

    def fetch(self, plan: RecoveryPlan, done: Callable[[BaseException | None], None]) -> None:
        """See `OtherNodes`."""
        self._go_back_to(plan.target)
        coordinator, files = self._coordinator, self._coordinator.files
        wants = [
            Want(rank, plan.target, files.arenas[coordinator.place(rank)], tuple(found.travel_from), tuple(found.shared_from))
            for rank, found in plan.fetch.items()
            if rank in coordinator.own_ranks()
        ]
        logs = [self.exchange.fetch_results(*wanted) for wanted in self._behind(plan)]
        waiting: list[concurrent.futures.Future[Any]] = [*([self.exchange.fetch(wants)] if wants else []), *logs]

        def gathered() -> None:
            error = next((failed for future in waiting if (failed := future.exception()) is not None), None)
            if error is None:
                self._keep_results([future.result() for future in logs])
            done(error)

        if waiting:
            self._waiting.append((waiting, gathered))
        else:
            done(None)

    def _go_back_to(self, step: int) -> None:
        self.exchange.forget_after(step)
        self._kept = {key: kept for key, kept in self._kept.items() if kept <= step}
        self._requested.clear()

    def _behind(self, plan: RecoveryPlan) -> list[tuple[int, int, dict[str, int]]]:
        """Results of collectives that ranks of this node lack, and ranks of other nodes have: (node, rank, group -> first index)."""
        coordinator, wanted = self._coordinator, dict[int, dict[str, int]]()
        for group, (count, holder) in plan.logs.items():
            if holder in coordinator.own_ranks():
                continue
            least = min(coordinator.counters(rank).get(group, 0) for rank in coordinator.own_ranks())
            if least < count:
                wanted.setdefault(holder, {})[group] = least
        return [(holder // coordinator.ranks_per_node, holder, groups) for holder, groups in wanted.items()]

    def _keep_results(self, results: list[Mapping[tuple[str, int], bytes | None]]) -> None:
        coordinator = self._coordinator
        log = CollectiveLog(coordinator.files.others)
        try:
            log.allocate(coordinator.config.snapshot.collective_log_mib * _MIB)
            log.rotate({})
            for found in results:
                for (group, index), data in reversed(list(found.items())):  # newest first: should all not fit, the oldest is needed least
                    log.append(group, index, data)
        finally:
            log.close()
