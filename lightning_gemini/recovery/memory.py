"""A rank's snapshot memory: what it writes at each boundary, and what it reads back.

Seam: `commit_local` and `commit_tensors` (or `drain`, in the background) write; `wait_all` waits for all ranks; `restore_tensors`
and `donate` serve a recovery. States of the background copy: idle -> draining -> idle; `settle` waits for it and is called before anything
writes to a parameter (the fence of DESIGN's step 2).

Failure: no room -> `MemoryError` at set-up, before the first step. A copy that was torn by a writer outside the optimizer is not committed;
`settle` says so and the engine captures again. Corrupt bytes are invalidated and reported, so that the next plan uses another source.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections import Counter
from collections.abc import Callable

import torch

from lightning_gemini.agent.memory import (
    ALWAYS,
    BOUNDARY,
    DONORS,
    GATE,
    HOLD,
    REPLICATED,
    REPLICATED_AT_GATE,
    TENSORS,
    pack_places,
    reached,
    tag,
)
from lightning_gemini.config import PersistentConfig, SnapshotConfig
from lightning_gemini.peers.errors import StaleGeneration
from lightning_gemini.recovery import room
from lightning_gemini.rendezvous.link import Link
from lightning_gemini.snapshot import arena, blocks
from lightning_gemini.snapshot.collective_log import CollectiveLog
from lightning_gemini.snapshot.cuda import SideStream, pin
from lightning_gemini.snapshot.manifest import Segment, manifest_of
from lightning_gemini.snapshot.slots import CorruptSnapshot, Slot, SlotFile
from lightning_gemini.state.catalogue import Entry, copy_in, holders_of, parameters_of, require_same, require_whole, target_of, wanted
from lightning_gemini.state.frozen import Frozen
from lightning_gemini.state.ownership import Layout, Owned, owned, sharers

_MIB = 1 << 20
_COPY_S = 600.0
"""Limit of one copy into shared memory: it moves gigabytes per second."""


class Memory:
    """One rank's part of the node's shared memory. `entries` tells the live tensors, anew at each call."""

    def __init__(
        self,
        link: Link,
        config: SnapshotConfig,
        layout: Layout,
        entries: Callable[[], list[Entry]],
        optimizers: Callable[[], list[torch.optim.Optimizer]],
        *,
        replicated: bool,
        persistent: PersistentConfig,
    ):
        self.link, self.config, self.layout, self.replicated, self.persistent = link, config, layout, replicated, persistent
        self.rank, self.place = layout.rank, link.place(layout.rank)
        """Number in the job, and on this node."""
        self.entries, self._optimizers = entries, optimizers
        self.frozen = Frozen()
        self.frozen.expect(entries())
        self.received = 0
        """Bytes of the frozen base that came from a live replica."""
        self.label_of: Callable[[str], str | None] | None = None
        """Where a name means different tensors on different ranks (Megatron): the label of one that does not exist here yet."""
        self.chunk = config.chunk_kib * 1024
        self.ledger = SlotFile(link.files.ledgers[self.place])
        self.arena = SlotFile(link.files.arenas[self.place])
        self.log = CollectiveLog(link.files.logs[self.place])
        self.captured = -1
        """Step of the newest tensor snapshot of this rank."""
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="lightning-gemini-drain")
        self._versions: list[int] = []
        self._seen: dict[str, bytes] = {}
        self._draining: concurrent.futures.Future[None] | None = None
        self._draining_step = -1
        self._device = next((entry.tensor.device for entry in entries()), torch.device("cpu"))
        self._side = SideStream(self._device)

    # ---- set-up

    def allocate(self, expected: int, local_extra: int) -> None:
        """Take the memory for two slots of `expected` bytes, or refuse with the figures. Keeps what a predecessor has written, and what was
        fetched for this rank from other nodes."""
        self.arena.close()
        self.arena = SlotFile(self.link.files.arenas[self.place])
        if not self.arena.capacity:
            room.require(room.of_node(expected, self.owned(), self.layout), self.layout)
            self.arena.allocate(expected, touch=self.config.every_n_steps > 0)
        pin(self.arena.memory, self._device)
        if not self.ledger.capacity:
            self.ledger.allocate(self.config.local_state_mib * _MIB + local_extra, touch=False)
        if not self.log.allocated:
            self.log.allocate(self.config.collective_log_mib * _MIB)

    def expected_size(self) -> int:
        """Bytes of the largest slot."""
        made = any(optimizer.state for optimizer in self._optimizers())
        return room.of_slot(self.owned(self.persistent.every_n_steps), self.owned(), len(self.entries()), made, self.chunk)

    @property
    def capturing(self) -> int:
        """Step of the newest snapshot, also where it is still being copied."""
        return self.captured if self._draining is None else self._draining_step

    def close(self) -> None:
        """Wait for the copy under way, end the thread."""
        self._worker.shutdown(wait=True)

    # ---- writing

    def publish(self, generation: int, boundary: int) -> None:
        """Say what this rank has, under a (new) generation."""
        board = self.link.board
        board.set(self.place, TENSORS, tag(generation, self.captured))
        board.set(self.place, BOUNDARY, tag(generation, boundary))
        self.link.voted()

    def at_gate(self, generation: int, step: int) -> None:
        """This rank is about to write step `step`."""
        board = self.link.board
        if board.alone:  # on several nodes the agent says it, and the root of the votes decides
            board.set(self.place, REPLICATED, tag(generation, self.captured - 1 if board.get(board.job, HOLD) else ALWAYS))
        board.set(self.place, GATE, tag(generation, step))
        self.link.voted()

    def may_capture(self, generation: int) -> bool:
        """Whether the next capture leaves a snapshot that every node can restore: the present newest one must be replicated. All ranks get
        the same answer, once all have reached the gate (see `agent.votes`)."""
        board = self.link.board
        word = board.least(REPLICATED) if board.alone else board.get(board.job, REPLICATED_AT_GATE)
        return self.captured < 0 or reached(word, generation, self.captured)

    def commit_local(self, data: bytes, step: int, kind: int) -> None:
        """Write the rank-local state."""
        if len(data) > self.ledger.capacity:
            raise MemoryError(
                f"the rank-local state has {len(data) / _MIB:.1f} MiB: raise snapshot.local_state_mib={self.config.local_state_mib}"
            )
        self.ledger.write(data, step=step, kind=kind)

    def owned(self, step: int = -1) -> Owned:
        """What this rank keeps of `step`."""
        return owned(self._state(step), self.layout)

    def prepare(self, step: int) -> Owned:
        """What this rank will keep of the boundary `step`, which it has reached; says who can write that in its place."""
        mine = self.owned(step)
        self.link.board.set(self.place, DONORS, pack_places(self.link.place(rank) for rank in mine.donors))
        return mine

    def persisted(self, step: int) -> bool:
        """Whether a boundary goes to persistent storage: by the cadence, or because the agent wants the job to end there."""
        return self.persistent.due(step) or bool(self.persistent.url and 0 < step == self.link.end_at)

    def _state(self, step: int) -> list[Entry]:
        """What the snapshot of `step` has: what a step may change; all, where it is persisted, because a checkpoint is a whole model."""
        return self.entries() if self.persisted(step) else self.frozen.state(self.entries())

    def begin(self) -> None:
        """The first boundary."""
        self.frozen.begin(self.entries())

    def review(self) -> bytes:
        """At a boundary: what is frozen now (`Frozen.record`)."""
        if self.frozen.names:
            self.frozen.review(self.entries())
        return self.frozen.record

    def commit_tensors(self, step: int, local: bytes = b"", mine: Owned | None = None) -> None:
        """Copy the owned tensors now. `mine`: as `prepare` has told them.

        On several nodes a step that is captured again takes its own slot: the older one may be all that other nodes can go back to.
        """
        mine = mine or self.prepare(step)
        self._grow(arena.payload_size(mine, self.chunk, local))
        instead_of = None if self.link.board.alone else step
        arena.capture(self.arena, step, mine, chunk=self.chunk, local=local, instead_of=instead_of)
        self.captured = step
        self._versions = arena.versions(mine.tensors)
        self._seen = self.frozen.seen(self.entries()) if self.frozen.watched else {}

    def modified(self, step: int) -> bool:
        """Whether somebody has written to this rank's owned tensors since they were captured as `step`."""
        if self._draining is None and self.captured != step:
            return False
        if arena.versions(self.owned(step).tensors) != self._versions:
            return True
        return bool(self.frozen.watched) and self.frozen.seen(self.entries()) != self._seen

    def forget_after(self, step: int) -> None:
        """Drop what was written for later steps, which are repeated: the next capture must not overwrite the one that is needed."""
        for file in (self.ledger, self.arena):
            for slot in file.slots():
                if slot.step > step:
                    file.invalidate(slot)
        self.captured = min(self.captured, step)

    def may_drain(self, mine: Owned) -> bool:
        """Whether tensors may be copied in the background: a live rank of the node has them too, and whoever writes to them is noticed."""
        return self.config.background and bool(mine.donors) and not self.frozen.watched

    def drain(self, step: int, generation: int, local: bytes = b"", mine: Owned | None = None) -> None:
        """Copy the owned tensors in the background; nothing writes to them before `settle`."""
        mine = mine or self.prepare(step)
        self._grow(arena.payload_size(mine, self.chunk, local))
        expected = self._versions = arena.versions(mine.tensors)

        self._side.mark()

        def work() -> None:
            with self._side:
                arena.capture(self.arena, step, mine, chunk=self.chunk, local=local, expected=expected)
            self.captured = step
            self.link.board.set(self.place, TENSORS, tag(generation, step))
            self.link.voted()

        self._draining, self._draining_step = self._worker.submit(work), step

    def settle(self) -> bool:
        """Wait for the background copy; False when it was torn by a writer outside the optimizer. Raises `TimeoutError`."""
        future, self._draining = self._draining, None
        if future is None:
            return True
        try:
            future.result(_COPY_S)
        except concurrent.futures.TimeoutError:  # not the built-in one before Python 3.11
            raise TimeoutError(f"a copy into shared memory did not end within {_COPY_S:g} s") from None
        except arena.Torn:
            return False
        return True

    def _grow(self, size: int) -> None:
        """Optimizers make their state in their first step, so that the first guess may be too small; the newest slot is kept."""
        if size <= self.arena.capacity:
            return
        kept = self.arena.slots()[-1:]
        data = [self._whole(slot) for slot in kept]
        self.arena.allocate(size + size // 8)
        for slot, whole in zip(kept, data, strict=True):
            place = self.arena.begin()
            with self.arena.payload(place) as view:
                view[: len(whole)] = whole
            self.arena.commit(place, step=slot.step, kind=slot.kind, length=slot.length, digest=slot.digest)

    def _whole(self, slot: Slot) -> bytes:
        trailer = blocks.trailer_of(self.arena, slot)
        with self.arena.payload(slot.place) as view:
            return bytes(view[: blocks.size_of_slot(slot.length, trailer.travel, trailer.chunk)])

    # ---- waiting for the others

    def wait_all(self, word: int, generation: int, step: int, timeout_s: float) -> None:
        """Until every rank's `word` has reached `step`."""
        board = self.link.board
        self.wait_until(lambda: board.all_reached(word, generation, step), generation, timeout_s, f"not all ranks reached step {step}")

    def wait_until(self, condition: Callable[[], bool], generation: int, timeout_s: float, otherwise: str) -> None:
        """Look at memory that others write. Raises `StaleGeneration` when a recovery begins, `TimeoutError` at the deadline."""
        began = time.monotonic()
        while not condition():
            if self.link.announced != generation:
                raise StaleGeneration(f"generation {generation} is over, {self.link.announced} has begun")
            waited = time.monotonic() - began
            if waited > timeout_s:
                raise TimeoutError(f"{otherwise} within {timeout_s:g} s")
            time.sleep(min(0.004, 0.05 * waited))  # looks often at first, then costs next to nothing while a slow rank computes

    def reached(self, word: int, rank: int, generation: int, step: int) -> bool:
        """Whether the `word` of a rank of this node has reached `step`."""
        return reached(self.link.board.get(self.link.place(rank), word), generation, step)

    def has(self, rank: int, step: int) -> bool:
        """Whether the tensors of `step` are committed in the arena of a rank of this node."""
        file = SlotFile(self.link.files.arenas[self.link.place(rank)])
        try:
            return file.find(step) is not None
        finally:
            file.close()

    def sharers(self) -> list[int]:
        """Ranks of this node from whose arenas the state of this rank is restored."""
        return sharers(self.entries(), self.layout)

    def clear_log(self) -> None:
        """Everybody goes back: results of collectives that will be run again must not be replayed."""
        self.log.allocate(self.config.collective_log_mib * _MIB)

    # ---- reading

    def restore_tensors(self, step: int) -> list[Entry]:
        """Put the tensors of `step` back from the node's memory: from the arenas of all its ranks, what this rank holds. Returns what of
        the frozen base is not as it was at the first boundary.

        Every slot is verified before the first byte is written. Raises `CorruptSnapshot` after invalidating the slot concerned.
        """
        entries = {entry.name: entry for entry in self.entries()}
        live = {name: entry.tensor for name, entry in entries.items()}
        places = map(self.link.place, self.sharers())
        files = {place: SlotFile(self.link.files.arenas[place]) for place in places}
        restored: Counter[str] = Counter()

        def put(segment: Segment, data: torch.Tensor) -> None:
            require_same(segment, entries)
            tensor = target_of(segment, live, self._optimizers())
            live[segment.name] = tensor
            restored[segment.name] += data.numel()
            copy_in(tensor, segment.start, data)

        def mine(segment: Segment) -> bool:
            if self.label_of is not None and segment.name not in entries:
                return self.label_of(segment.name) == segment.shard
            return wanted(segment, entries, self._optimizers(), self._label, self.rank)

        try:
            found = {place: self._verified(place, file, step) for place, file in files.items()}
            for place, slot in found.items():
                arena.restore(files[place], slot, put, wanted=mine)
            require_whole(restored, live, self.frozen.names)
            self._forget_younger_state({*restored})
            if restored - entries.keys():
                self._order_state()
        finally:
            for file in files.values():
                file.close()
        return self.frozen.differing(entry for entry in entries.values() if entry.name not in restored)

    def mark_frozen(self) -> None:
        """The base is right, whoever has written to it in a recovery (DDP's constructor does)."""
        if self.frozen.names:
            self.frozen.mark(self.entries())

    def _verified(self, place: int, file: SlotFile, step: int) -> Slot:
        rank = self.rank - self.place + place
        slot = file.find(step)
        if slot is None:
            raise CorruptSnapshot(f"rank {rank} has no tensors of step {step}")
        try:
            blocks.verify(file, slot)
        except CorruptSnapshot as error:
            file.invalidate(slot)
            raise CorruptSnapshot(f"memory of rank {rank}: {error}") from None
        return slot

    def _label(self, tensor: torch.Tensor) -> str:
        return holders_of(tensor, replicated=self.replicated, rank=self.rank, world=self.layout.world)[1]

    def _forget_younger_state(self, restored: set[str]) -> None:
        """Going back to before an optimizer's first step: state it has made since must not stay."""
        for number, optimizer in enumerate(self._optimizers()):
            if not any(name.startswith(f"optim/{number}/") for name in restored):
                optimizer.state.clear()

    def _order_state(self) -> None:
        """State that was just made, in the order of the arenas' bytes, comes in that of the parameters, as an optimizer's first step makes
        it."""
        for optimizer in self._optimizers():
            ordered = {parameter: optimizer.state[parameter] for parameter in parameters_of(optimizer) if parameter in optimizer.state}
            optimizer.state.clear()
            optimizer.state.update(ordered)

    def local_in_arena(self, step: int) -> bytes:
        """The rank-local state stored beside the tensors of `step`."""
        slot = self.arena.find(step)
        assert slot is not None, f"no snapshot of step {step}"
        return manifest_of(self.arena, slot)[0].local

    def donate(self, rank: int, step: int) -> None:
        """Write what dead `rank` of this node owned of `step` into its arena, from this rank's live replica of it, and its local state
        beside."""
        place = self.link.place(rank)
        file, ledger = SlotFile(self.link.files.arenas[place]), SlotFile(self.link.files.ledgers[place])
        try:
            mine, slot = owned(self._state(step), self.layout._replace(rank=rank)), ledger.find(step)
            local = ledger.read(slot) if slot else b""
            if arena.payload_size(mine, self.chunk, local) > file.capacity:
                local = b""  # its new owner has mapped the arena: it must not grow here
            arena.capture(file, step, mine, chunk=self.chunk, local=local)
        finally:
            file.close()
            ledger.close()
