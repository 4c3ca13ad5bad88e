"""What rank 0 says of a step: the names that a checkpoint has for the tensors in the arenas, and everything that is in no arena.

Seam: made by a rank (`meta.describe`), published in a `SlotFile` of the node, read by the storage process. Values are pickled by the
rank and stay bytes from there on: the storage process never loads them, so it needs none of the user's classes. No torch here.
"""

from __future__ import annotations

import msgspec

from lightning_gemini.snapshot.slots import SlotFile
from lightning_gemini.storage.layout import Key


class Value(msgspec.Struct, array_like=True, frozen=True):
    """A small tensor that is in no arena: a buffer, a learning rate."""

    source: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Description(msgspec.Struct):
    """The state dict of a step, without the tensors in the arenas."""

    keys: list[Key]
    blobs: dict[str, bytes]
    """source -> what `torch.save` made of the value."""
    tensors: list[Value]
    meta: bytes
    """Of `meta.pt`."""


def publish(file: SlotFile, step: int, description: bytes) -> None:
    """Put rank 0's description of `step` where the storage process finds it. Raises `OSError` when there is no memory."""
    if len(description) > file.capacity:
        file.allocate(2 * len(description), touch=False)  # forgets the last one, which has been read unless persisting is far behind
    file.write(description, step=step, kind=0)


def published(fd: int, step: int) -> Description | None:
    """The description of `step`; None where this node's ranks have published none. Raises `CorruptSnapshot`."""
    file = SlotFile(fd)
    try:
        slot = file.find(step)
        return None if slot is None else msgspec.msgpack.decode(file.read(slot), type=Description)
    finally:
        file.close()
