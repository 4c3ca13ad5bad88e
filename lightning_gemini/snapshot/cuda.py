"""Copies from a CUDA device to shared memory: pinned, and on a stream of their own. Not run so far: there was no GPU at hand.

Seam: `SideStream(device)` for the background copy: `mark` is called where the state is whole (on the training stream), `with stream:`
in the thread that copies, which then waits for that mark and for nothing else of the training. `pin` registers a mapping with the
driver, so that copies run at the bus's speed and release the thread; a driver that refuses leaves it pageable: slower, nothing else.
"""

from __future__ import annotations

import mmap
from types import TracebackType
from typing import Any

import torch


class SideStream:
    """A context of its own stream on a CUDA device; nothing at all on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._event: Any = torch.cuda.Event() if self._stream is not None else None  # type: ignore[no-untyped-call]
        self._context: Any = None

    def mark(self) -> None:
        """The state is whole at this point of the current stream."""
        if self._event is not None:  # pragma: no cover - needs a GPU
            self._event.record(torch.cuda.current_stream())

    def __enter__(self) -> None:
        if self._stream is not None and self._event is not None:  # pragma: no cover - needs a GPU
            self._stream.wait_event(self._event)
            self._context = torch.cuda.stream(self._stream)
            self._context.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._stream is not None and self._context is not None:  # pragma: no cover - needs a GPU
            self._stream.synchronize()
            self._context.__exit__(kind, error, trace)


def pin(memory: mmap.mmap, device: torch.device) -> bool:
    """Register a mapping with the CUDA driver; whether it did."""
    if device.type != "cuda":
        return False
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()  # pragma: no cover - needs a GPU
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # pragma: no cover - needs a GPU
    return int(runtime.cudaHostRegister(address, len(memory), 0)) == 0  # pragma: no cover - needs a GPU
