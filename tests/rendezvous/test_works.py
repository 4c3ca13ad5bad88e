"""A collective that its backend never completes must not hold anybody."""

from __future__ import annotations

import threading
import time

import torch
import torch.distributed as dist

from lightning_gemini.rendezvous.works import AbsorbingWork, Outstanding


class Sleeping(dist.Work):
    """As gloo's, when the wake-up was lost."""

    def __init__(self) -> None:
        super().__init__()
        self.future: torch.futures.Future[object] = torch.futures.Future()

    def get_future(self) -> torch.futures.Future[object]:
        return self.future

    def wait(self, timeout: object = None) -> bool:
        raise AssertionError("nobody may wait for the backend itself")


def test_a_sleeping_operation_is_let_go() -> None:
    outstanding, errors = Outstanding(), list[BaseException]()
    inner = Sleeping()
    work = AbsorbingWork(inner, object(), errors.append, ["value"], outstanding)
    waiter = threading.Thread(target=work.wait)
    waiter.start()
    began = time.monotonic()
    assert outstanding.let_go() == 1
    waiter.join(5)
    assert not waiter.is_alive() and time.monotonic() - began < 5
    assert work.is_completed() and work.get_future().wait() == ["value"]
    assert isinstance(errors[0], TimeoutError)
    inner.future.set_result(None)  # it wakes up later: too late to matter
    assert len(errors) == 1 and outstanding.let_go() == 0


def test_one_that_ends_in_time_is_not() -> None:
    outstanding, errors = Outstanding(), list[BaseException]()
    inner = Sleeping()
    inner.wait = lambda timeout=None: True  # type: ignore[method-assign]
    work = AbsorbingWork(inner, object(), errors.append, 1, outstanding)
    inner.future.set_result(None)
    assert outstanding.let_go() == 0 and work.wait() and not errors
