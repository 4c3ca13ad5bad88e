"""What all process groups of a rank share: the generation, the mode, the first error, the log of collectives.

Modes, set by the recovery:
    STAND_IN  nobody is there: a replaced rank runs the script's set-up, each collective answers as if all ranks had sent what we send.
    BETWEEN   between steps (callbacks, validation, barriers): a collective either completes or waits, through any number of recoveries,
              and is tried again; its result is logged. The caller never sees a fault of somebody else.
    STEP      inside a training step: an error is absorbed and remembered, every further collective completes at once, so that DDP's
              reducer and FSDP2's hooks finish in good order; the step is then repeated (see `recovery.step`).

Failure: a group that cannot be formed (a member died meanwhile) is an error of the collective that asked for it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch

from lightning_gemini.rendezvous import backends
from lightning_gemini.rendezvous.link import Link, StaleGeneration
from lightning_gemini.rendezvous.store import AgentStore
from lightning_gemini.rendezvous.works import Outstanding
from lightning_gemini.snapshot.collective_log import CollectiveLog


class Mode(enum.Enum):
    """See the module's docstring."""

    STAND_IN = "stand_in"
    BETWEEN = "between"
    STEP = "step"


class World:
    """Shared state of a rank's groups; `stand_still` is installed by the recovery and returns when the job has regrouped."""

    def __init__(self, link: Link, collective_timeout_s: float) -> None:
        self.link = link
        self.size = link.world
        self.generation = link.announced
        self.mode = Mode.BETWEEN
        self.error: BaseException | None = None
        self.counters: dict[str, int] = {}
        self.log: CollectiveLog | None = None
        self.replay: dict[tuple[str, int], bytes | None] = {}
        """Results of collectives that peers completed without this rank, by (group, index)."""
        self.outstanding = Outstanding()
        self.stand_still: Callable[[BaseException | None], None] = _no_recovery
        self._timeout_s = collective_timeout_s
        self._nccl: list[Any] = []

    @property
    def rank(self) -> int:
        """Global rank."""
        assert self.link.rank is not None, "a spare has no rank yet"
        return self.link.rank

    @property
    def address(self) -> str:
        """This rank's loopback address."""
        return backends.loopback_address(self.link.rank or 0, self.link.files.board)

    @property
    def stale(self) -> bool:
        """Whether a recovery has been announced that this rank has not joined yet."""
        return self.link.announced != self.generation

    def require_current(self) -> None:
        """Raise `StaleGeneration` once a recovery has been announced."""
        if self.stale:
            raise StaleGeneration(f"generation {self.generation} is over, {self.link.announced} has begun")

    def note(self, error: BaseException) -> None:
        """Remember the first error of a step."""
        if self.error is None:
            self.error = error

    def form(self, name: str, rank: int, size: int, device: str) -> Any:
        """A backend for group `name` in the current generation. All members call it."""
        self.require_current()
        store = AgentStore(self.link, self.generation, f"{name}/{device}/", self._timeout_s)
        if device == "cuda":  # pragma: no cover - needs a GPU
            self._nccl.append(backends.form_nccl(store, rank, size, self._timeout_s))
            return self._nccl[-1]
        store.set(f"here/{rank}", b"")  # so that connecting, which no one can interrupt, begins when all are there
        store.wait([f"here/{other}" for other in range(size)])
        return backends.form_gloo(store, rank, size, self.address, self._timeout_s)

    def free(self) -> None:
        """Get this process's threads out of collectives of the old generation; called in the listening thread."""
        backends.free(self.address)
        while self._nccl:  # pragma: no cover - needs a GPU
            backends.abort_nccl(self._nccl.pop())
        self.outstanding.let_go()

    # ---- the log

    def recorded(self, group: str, tensors: list[torch.Tensor]) -> bool:
        """Take the result of the next collective of `group` from a peer's log, if it is there."""
        index = self.counters.get(group, 0)
        if (group, index) not in self.replay:
            return False
        data = self.replay.pop((group, index))
        if data is None:
            raise RuntimeError(
                f"the result of collective {index} of group {group!r} did not fit its log: raise snapshot.collective_log_mib"
            )
        unpack(data, tensors)
        self.record(group, tensors)
        return True

    def record(self, group: str, tensors: list[torch.Tensor]) -> None:
        """Log a completed collective."""
        index = self.counters.get(group, 0)
        if self.log is not None:
            self.log.append(group, index, pack(tensors))
        self.counters[group] = index + 1


def _no_recovery(error: BaseException | None) -> None:
    raise error or RuntimeError("a recovery was announced before this process could take part in one")


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous CPU tensor as a flat uint8 view of the same memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def pack(tensors: list[torch.Tensor]) -> bytes:
    """The bytes of small tensors, one after the other."""
    return b"".join(as_bytes(tensor.cpu().contiguous()).numpy().tobytes() for tensor in tensors)


def unpack(data: bytes, tensors: list[torch.Tensor]) -> None:
    """Inverse of `pack`, into existing tensors."""
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    expected = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if flat.numel() != expected:
        raise RuntimeError(f"a replayed collective has {flat.numel()} bytes where {expected} are expected: the script is not deterministic")
    position = 0
    with torch.no_grad():
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            tensor.copy_(flat[position : position + size].clone().view(tensor.dtype).view(tensor.shape))
            position += size
