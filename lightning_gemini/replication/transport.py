"""The seam between replication and whatever moves its bytes: messages in order, and ranges of memory put and taken by key.

A lane is one proved connection between two agents. It is one-sided by design: a side *exposes* memory and tells the other its key in a
message; the other side puts bytes there (`push`) or takes them from there (`pull`). This is what RDMA does in hardware: a key is then a
registration with its remote key, `push` a write with immediate data, `pull` a read, `completion` the completion queue. Over TCP the same
happens in software, into the same memory without a copy in between (see `tcp`).

States: open -> closed. Each lane is used by one thread, but for `shut`, which any thread may call and which ends every wait of it. Every
call but `expose`, `hide`, `shut` and `close` can raise `OSError`: the other end is gone, has been silent for too long, or did what it must
not. The lane is of no use then; nothing is known of transfers that have not completed.
"""

from __future__ import annotations

from typing import Protocol


class Lane(Protocol):
    """See the module's docstring. Sizes and positions are bytes."""

    def say(self, message: bytes) -> None:
        """Send a message. Legal at any time; arrives after everything that was said and pushed before it."""

    def hear(self, limit_s: float | None = None) -> bytes:
        """The next message, within `limit_s`; without a limit as long as the other end lives. What the other end pulls meanwhile is
        served here, so the side that exposes memory for pulling must be in `hear`."""

    def expose(self, memory: memoryview, *, writable: bool) -> int:
        """Let the other end take from `memory`, or put into it; returns the key. The memory must stay until `hide` or `close`."""

    def hide(self, key: int) -> None:
        """End it. Legal when nothing is under way there; what the other end still pulls from it completes without bytes."""

    def push(self, key: int, start: int, data: memoryview, number: int) -> None:
        """Put `data` at `start` of what the other end exposes as `key`; `number` completes *there*. Returns when `data` may be changed."""

    def pull(self, key: int, start: int, into: memoryview, number: int) -> None:
        """Ask for len(into) bytes at `start` of what the other end exposes as `key`; `number` completes *here*. Returns at once; several
        may be under way. `into` must stay until then."""

    def completion(self) -> int | None:
        """Wait for the next push of the other end or pull of this one whose bytes have arrived; None when it has said something instead.
        Bytes are as they were sent or damaged on the way: the caller verifies them."""

    def shut(self) -> None:
        """End the lane from any thread: whoever waits in it gets an error."""

    def close(self) -> None:
        """Free everything; called by the thread that uses the lane."""
