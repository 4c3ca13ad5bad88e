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
from collections.abc import Callable

import psutil
import torch

from lightning_gemini.agent.memory import BOUNDARY, TENSORS, reached, tag
from lightning_gemini.config import SnapshotConfig
from lightning_gemini.peers.errors import StaleGeneration
from lightning_gemini.rendezvous.link import Link
from lightning_gemini.snapshot import arena
from lightning_gemini.snapshot.collective_log import CollectiveLog
from lightning_gemini.snapshot.cuda import SideStream, pin
from lightning_gemini.snapshot.slots import CorruptSnapshot, SlotFile
from lightning_gemini.state.catalogue import Entry, Segment, copy_in, owned, size_of, target_of

_MIB = 1 << 20
_COPY_S = 600.0
"""Limit of one copy into shared memory: it moves gigabytes per second."""


class Memory:
    """One rank's part of the node's shared memory. `entries` tells the live tensors, anew at each call."""

    def __init__(
        self, link: Link, config: SnapshotConfig, entries: Callable[[], list[Entry]], optimizers: Callable[[], list[torch.optim.Optimizer]]
    ):
        assert link.rank is not None
        self.link, self.config, self.rank = link, config, link.rank
        self._entries, self._optimizers = entries, optimizers
        self.chunk = config.chunk_kib * 1024
        self.ledger = SlotFile(link.files.ledgers[self.rank])
        self.arena = SlotFile(link.files.arenas[self.rank])
        self.log = CollectiveLog(link.files.logs[self.rank])
        self.captured = -1
        """Step of the newest tensor snapshot of this rank."""
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="lightning-gemini-drain")
        self._versions: list[int] = []
        self._draining: concurrent.futures.Future[None] | None = None
        self._device = next((entry.tensor.device for entry in entries()), torch.device("cpu"))
        self._side = SideStream(self._device)

    # ---- set-up

    def allocate(self, expected: int, local_extra: int) -> None:
        """Take the memory for two slots of `expected` bytes, or refuse with the figures. Keeps what a predecessor has written."""
        if self.arena.capacity:
            return
        need = 2 * expected * self.link.world  # all ranks of the node ask at the same time
        available = available_memory()
        if need > available:
            raise MemoryError(
                f"two snapshot slots for each of {self.link.world} ranks need {need / _MIB:.0f} MiB, "
                f"{available / _MIB:.0f} MiB of memory are available: "
                "use fewer ranks per node, a smaller model, or a node with more memory"
            )
        self.arena.allocate(expected)
        pin(self.arena.memory, self._device)
        self.ledger.allocate(self.config.local_state_mib * _MIB + local_extra, touch=False)
        self.log.allocate(self.config.collective_log_mib * _MIB)

    def close(self) -> None:
        """Wait for the copy under way, end the thread."""
        self._worker.shutdown(wait=True)

    # ---- writing

    def publish(self, generation: int, boundary: int) -> None:
        """Say what this rank has, under a (new) generation."""
        board = self.link.board
        if self.captured >= 0:
            board.set(self.rank, TENSORS, tag(generation, self.captured))
        board.set(self.rank, BOUNDARY, tag(generation, boundary))

    def commit_local(self, data: bytes, step: int, kind: int) -> None:
        """Write the rank-local state."""
        if len(data) > self.ledger.capacity:
            raise MemoryError(
                f"the rank-local state has {len(data) / _MIB:.1f} MiB: raise snapshot.local_state_mib={self.config.local_state_mib}"
            )
        self.ledger.write(data, step=step, kind=kind)

    def owned(self) -> arena.Owned:
        """What this rank keeps."""
        return owned(self._entries(), self.rank, self.link.world)

    def commit_tensors(self, step: int, local: bytes = b"") -> None:
        """Copy the owned tensors now."""
        mine = self.owned()
        self._grow(arena.payload_size(mine, local))
        arena.capture(self.arena, step, mine, chunk=self.chunk, local=local)
        self.captured = step
        self._versions = arena.versions(tensor for _, tensor in mine)

    def modified(self, step: int) -> bool:
        """Whether somebody has written to this rank's owned tensors since they were captured as `step`."""
        if self._draining is None and self.captured != step:
            return False
        return arena.versions(tensor for _, tensor in self.owned()) != self._versions

    def forget_after(self, step: int) -> None:
        """Drop what was written for later steps, which are repeated: the next capture must not overwrite the one that is needed."""
        for file in (self.ledger, self.arena):
            for slot in file.slots():
                if slot.step > step:
                    file.invalidate(slot)
        self.captured = min(self.captured, step)

    def drain(self, step: int, generation: int, local: bytes = b"") -> None:
        """Copy the owned tensors in the background; nothing writes to them before `settle`."""
        mine = self.owned()
        self._grow(arena.payload_size(mine, local))
        expected = self._versions = arena.versions(tensor for _, tensor in mine)

        self._side.mark()

        def work() -> None:
            with self._side:
                arena.capture(self.arena, step, mine, chunk=self.chunk, local=local, expected=expected)
            self.captured = step
            self.link.board.set(self.rank, TENSORS, tag(generation, step))

        self._draining = self._worker.submit(work)

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
        data = [self.arena.read(slot) for slot in kept]
        self.arena.allocate(size + size // 8)
        for slot, payload in zip(kept, data, strict=True):
            self.arena.write(payload, step=slot.step, kind=slot.kind)

    # ---- waiting for the others

    def wait_all(self, word: int, generation: int, step: int, timeout_s: float) -> None:
        """Until every rank's `word` has reached `step`. Raises `StaleGeneration` when a recovery begins, `TimeoutError` at the deadline."""
        began = time.monotonic()
        while not self.link.board.all_reached(word, generation, step):
            if self.link.announced != generation:
                raise StaleGeneration(f"generation {generation} is over, {self.link.announced} has begun")
            waited = time.monotonic() - began
            if waited > timeout_s:
                raise TimeoutError(f"not all ranks reached step {step} within {timeout_s:g} s")
            time.sleep(min(0.004, 0.05 * waited))  # looks often at first, then costs next to nothing while a slow rank computes

    def reached(self, word: int, rank: int, generation: int, step: int) -> bool:
        """Whether one rank's `word` has reached `step`."""
        return reached(self.link.board.get(rank, word), generation, step)

    def has(self, rank: int, step: int) -> bool:
        """Whether the tensors of `step` are committed in a rank's arena."""
        file = SlotFile(self.link.files.arenas[rank])
        try:
            return file.find(step) is not None
        finally:
            file.close()

    def clear_log(self) -> None:
        """Everybody goes back: results of collectives that will be run again must not be replayed."""
        self.log.allocate(self.config.collective_log_mib * _MIB)

    # ---- reading

    def restore_tensors(self, step: int) -> None:
        """Put the tensors of `step` back from the node's memory: shared ones from all owners, private ones from this rank's arena.

        Every slot is verified before the first byte is written. Raises `CorruptSnapshot` after invalidating the slot concerned.
        """
        files = {rank: SlotFile(fd) for rank, fd in enumerate(self.link.files.arenas)}
        live = {entry.name: entry.tensor for entry in self._entries()}
        shared = any(entry.shared for entry in self._entries())
        needed = files if shared else {self.rank: files[self.rank]}
        try:
            found = {}
            for rank, file in needed.items():
                slot = file.find(step)
                if slot is None:
                    raise CorruptSnapshot(f"rank {rank} has no tensors of step {step}")
                try:
                    arena.verify(file, slot, self.chunk)
                except CorruptSnapshot as error:
                    file.invalidate(slot)
                    raise CorruptSnapshot(f"memory of rank {rank}: {error}") from None
                found[rank] = slot
            restored: set[str] = set()

            def put(segment: Segment, data: torch.Tensor) -> None:
                tensor = target_of(segment, live, self._optimizers())
                live[segment.name] = tensor
                restored.add(segment.name)
                copy_in(tensor, segment.start, data)

            for rank, slot in found.items():
                arena.restore(files[rank], slot, put, wanted=lambda segment, rank=rank: segment.shared or rank == self.rank)  # type: ignore[misc]
            self._forget_younger_state(restored)
        finally:
            for file in files.values():
                file.close()

    def _forget_younger_state(self, restored: set[str]) -> None:
        """Going back to before an optimizer's first step: state it has made since must not stay."""
        for number, optimizer in enumerate(self._optimizers()):
            if not any(name.startswith(f"optim/{number}/") for name in restored):
                optimizer.state.clear()

    def local_in_arena(self, step: int) -> bytes:
        """The rank-local state stored beside the tensors of `step`."""
        slot = self.arena.find(step)
        assert slot is not None, f"no snapshot of step {step}"
        return arena.manifest_of(self.arena, slot)[0].local

    def donate(self, rank: int, step: int) -> None:
        """Write what dead `rank` owned of `step` into its arena, from this rank's live replica of it, and its local state beside it."""
        file, ledger = SlotFile(self.link.files.arenas[rank]), SlotFile(self.link.files.ledgers[rank])
        try:
            mine, slot = owned(self._entries(), rank, self.link.world), ledger.find(step)
            local = ledger.read(slot) if slot else b""
            if arena.payload_size(mine, local) > file.capacity:
                local = b""  # its new owner has mapped the arena: it must not grow here
            arena.capture(file, step, mine, chunk=self.chunk, local=local)
        finally:
            file.close()
            ledger.close()


def available_memory() -> int:
    """Bytes that can still be taken: the machine's, or the container's limit where that is lower."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = open("/sys/fs/cgroup/memory.max").read().strip()  # noqa: SIM115
        used = int(open("/sys/fs/cgroup/memory.current").read())  # noqa: SIM115
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - used)


def expected_size(entries: list[Entry], optimizers: list[torch.optim.Optimizer], rank: int, world: int) -> int:
    """Bytes of one slot, before the optimizers have made their state: what they hold, or two more copies of the parameters."""
    shared = size_of(entry for entry in entries if entry.shared)
    private = size_of(entry for entry in entries if not entry.shared)
    parameters = size_of(entry for entry in entries if entry.name.startswith("param/"))
    grown = 0 if any(optimizer.state for optimizer in optimizers) else 2 * parameters
    per_rank = (shared + grown) // world + private if shared else private + grown
    return per_rank + 256 * len(entries) * 3 + (1 << 16)
