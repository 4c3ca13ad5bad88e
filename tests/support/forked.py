"""Forked processes that are the ranks of a small job, and tell what they see."""

from __future__ import annotations

import functools
import os
import signal
import traceback
from collections.abc import Callable

Tell = Callable[[str], None]


class Ranks:
    """`size` forked processes that run `body(rank, tell)`; what a rank tells arrives line by line."""

    def __init__(self, body: Callable[[int, Tell], None], size: int, limit_s: int = 60) -> None:
        self.pids: list[int] = []
        self.pipes: list[int] = []
        for rank in range(size):
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    signal.alarm(limit_s)
                    body(rank, functools.partial(_tell, writer))
                except BaseException:
                    os.write(writer, traceback.format_exc().encode())
                finally:
                    os._exit(0)
            os.close(writer)
            self.pids.append(pid)
            self.pipes.append(reader)

    def hear(self, rank: int) -> str:
        text = b""
        while not text.endswith(b"\n"):
            part = os.read(self.pipes[rank], 1)
            if not part:
                break
            text += part
        return text.decode().strip()

    def end(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for pipe in self.pipes:
            os.close(pipe)


def _tell(writer: int, text: str) -> None:
    os.write(writer, f"{text}\n".encode())
