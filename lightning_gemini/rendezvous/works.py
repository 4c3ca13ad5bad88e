"""Handles of collectives that cannot fail in the hands of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class DoneWork(dist.Work):
    """A collective that is complete."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self._future.set_result(value)

    def wait(self, timeout: Any = None) -> bool:
        """Returns at once."""
        return True

    def is_completed(self) -> bool:
        """True."""
        return True

    def is_success(self) -> bool:
        """True."""
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """A completed future of the value."""
        return self._future


class AbsorbingWork(dist.Work):
    """A running collective whose failure is told to `note` and not raised: DDP's reducer would be left unfinished by an exception."""

    def __init__(self, work: dist.Work, note: Callable[[BaseException], None], value: Any) -> None:
        super().__init__()
        self._work, self._note, self._value = work, note, value

    def wait(self, timeout: Any = None) -> bool:
        """Wait; a failure is noted."""
        try:
            self._work.wait()
        except Exception as error:
            self._note(error)
        return True

    def is_completed(self) -> bool:
        """Whether it has ended, well or not."""
        return bool(self._work.is_completed())

    def get_future(self) -> torch.futures.Future[Any]:
        """A future that always completes with the value."""
        out: torch.futures.Future[Any] = torch.futures.Future()

        def finish(inner: torch.futures.Future[Any]) -> None:
            try:
                inner.value()
            except Exception as error:
                self._note(error)
            out.set_result(self._value)

        self._work.get_future().add_done_callback(finish)
        return out
