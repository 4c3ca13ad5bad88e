"""The frozen base: parameters that a job only reads. They are kept out of the snapshots of each step.

What is base: at the first boundary, a parameter that does not require grad and that no optimizer holds. From then on the base only
shrinks. At each boundary a parameter leaves it for good, and is state like any other, when

    it requires grad, or an optimizer holds it (fine-tuning callbacks that unfreeze, `add_param_group`);
    its version counter or the address of its memory has moved: somebody has written to it (a momentum encoder);
    64 bytes in its middle have changed although neither has: somebody writes through `.data`, which torch does not count. Who does that
    to one tensor may do it to all, so then the whole base becomes state.

What is written to without being trained is *watched* from then on. It is written between steps too, so it is copied before the step
returns, not in the background, and its 64 bytes tell whether it must be copied again.

All this follows from the program, so ranks that hold the same tensors agree on it. The names, each with the checksum of this rank's bytes
(taken once, at the first boundary), are in the rank-local state of every boundary, so a replaced rank knows them on any node.

A replaced rank's base comes from its own script, which has built it or read it again. `differing` says which parameters do not match
their checksum; these come from a live replica (`recovery.base`). A rank that goes back in its own process needs no checksum where nothing
has moved.

What this cannot give back: a base parameter that is written for the first time inside a step that is then repeated. No snapshot has what
it was, so the recovery ends with an error that names it. From the next boundary on it is state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec
import torch
import xxhash

from lightning_gemini.state.catalogue import Entry, bytes_of
from lightning_gemini.state.raw import as_bytes

_WINDOW = 64
_CHUNK = 16 << 20


class Mark(NamedTuple):
    """What changes when a tensor is written."""

    version: int
    address: int
    window: bytes


class Frozen:
    """The base of one rank. `names` are those of entries of the catalogue."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.ever = False
        """Whether the job began with a base; equal on all ranks."""
        self.watched: set[str] = set()
        """What has left the base because somebody writes to it."""
        self._digests: dict[str, int] = {}
        self._marks: dict[str, Mark] = {}
        self._record = b""

    def expect(self, entries: list[Entry]) -> None:
        """Before the first boundary: what will be base, as it looks now."""
        self.names = {entry.name for entry in entries if not entry.trained}

    def begin(self, entries: list[Entry]) -> None:
        """The first boundary."""
        self.expect(entries)
        self.ever = bool(self.names)
        self._digests = {entry.name: digest(entry.tensor) for entry in self.of(entries)}
        self.mark(entries)
        self._encode()

    def of(self, entries: Iterable[Entry]) -> list[Entry]:
        """The base."""
        return [entry for entry in entries if entry.name in self.names]

    def state(self, entries: Iterable[Entry]) -> list[Entry]:
        """All the rest: what a step may change."""
        return [entry for entry in entries if entry.name not in self.names]

    def review(self, entries: list[Entry]) -> None:
        """At a boundary: whatever is base no more leaves it."""
        base = self.of(entries)
        if not base:
            return
        now = marks(base)
        trained = {entry.name for entry in base if entry.trained}
        written = {name for name, mark in now.items() if mark[:2] != self._marks[name][:2]} - trained
        if any(mark.window != self._marks[name].window for name, mark in now.items() if name not in trained | written):
            written = self.names - trained
        if trained or written:
            self.names -= trained | written
            self.watched |= written
            self._encode()

    def mark(self, entries: list[Entry]) -> None:
        """The base is right as it is now: whatever has been written to it until now is no reason to leave it."""
        self._marks = marks(self.of(entries))

    def differing(self, entries: Iterable[Entry]) -> list[Entry]:
        """Those of the base that are not what they were at the first boundary."""
        base = self.of(entries)
        now = marks(base)
        suspects = [entry for entry in base if now[entry.name] != self._marks.get(entry.name)]
        return [entry for entry in suspects if digest(entry.tensor) != self._digests[entry.name]]

    # ---- in the rank-local state

    @property
    def record(self) -> bytes:
        """Names and checksums; empty for a job that began without a base."""
        return self._record

    def _encode(self) -> None:
        present = {name: self._digests[name] for name in sorted(self.names)}
        self._record = msgspec.msgpack.encode((present, sorted(self.watched))) if self.ever else b""

    def load(self, record: bytes) -> None:
        """Take what a boundary says; marks are kept. Raises `msgspec.DecodeError`."""
        self.ever = bool(record)
        present, watched = msgspec.msgpack.decode(record, type=tuple[dict[str, int], list[str]]) if record else ({}, [])
        self._digests |= present
        self.names, self.watched, self._record = set(present), set(watched), record

    def seen(self, entries: Iterable[Entry]) -> dict[str, bytes]:
        """Of what is watched: what tells that it was written."""
        return {name: mark.window for name, mark in marks([entry for entry in entries if entry.name in self.watched]).items()}


def digest(tensor: torch.Tensor) -> int:
    """xxh3, 64 bits, of a tensor's bytes."""
    flat, hasher = as_bytes(tensor.contiguous()), xxhash.xxh3_64()
    for start in range(0, flat.numel(), _CHUNK):
        hasher.update(flat[start : start + _CHUNK].cpu().numpy().data)
    return hasher.intdigest()


def marks(entries: list[Entry]) -> dict[str, Mark]:
    """Of these entries; one copy from the device for all."""
    windows = [_window(entry) for entry in entries]
    if len({window.device for window in windows}) > 1:  # a part of the model is kept on the CPU
        windows = [window.cpu() for window in windows]
    data = memoryview(torch.cat(windows).cpu().numpy().tobytes()) if windows else memoryview(b"")
    found, position = {}, 0
    for entry, window in zip(entries, windows, strict=True):
        part = bytes(data[position : position + window.numel()])
        found[entry.name] = Mark(entry.tensor._version, entry.tensor.data_ptr(), part)
        position += window.numel()
    return found


def _window(entry: Entry) -> torch.Tensor:
    if not entry.tensor.is_contiguous():  # it would have to be copied whole, in each step
        return torch.empty(0, dtype=torch.uint8, device=entry.tensor.device)
    middle = bytes_of(entry) // 2
    return as_bytes(entry.tensor)[max(0, middle - _WINDOW // 2) : middle + _WINDOW // 2]
