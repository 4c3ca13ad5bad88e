"""The storage process: one per node, `python -m lightning_gemini.storage.writer`, off the ranks' path; it writes at a low priority.

Seam: started by the agent (`storage.process`) with the node's arenas and its end of a `SOCK_SEQPACKET` pair; `messages` says what it
answers. One request at a time, in order. It holds no state between requests: everything is in the arenas and in the checkpoint's folder,
so a process that died is replaced by another and the request made again, with a new path.

Failure: a request that fails is answered by `Failed` and leaves what is older as it was. End of file on the channel: the process ends
when it has done what it was asked. When the agent is killed the kernel kills it too. A message that does not decode ends the process:
its two ends are of one installation.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from lightning_gemini.agent.channel import Channel
from lightning_gemini.snapshot.slots import SlotFile
from lightning_gemini.storage import catalog, commit, messages, persist, reader
from lightning_gemini.storage.description import Description, published
from lightning_gemini.storage.files import Folder, explain
from lightning_gemini.storage.gather import Gathered, gather
from lightning_gemini.storage.messages import Answer, Commit, Discard, Fill, Open, Persist
from lightning_gemini.storage.process import ENVIRONMENT, Descriptors

_PR_SET_PDEATHSIG = 1
_PROBE = ".lightning_gemini-probe"


class Writer:
    """Answers requests until its channel ends."""

    def __init__(self, channel: Channel, descriptors: Descriptors) -> None:
        self._channel, self._descriptors = channel, descriptors
        # Writing takes long and must not disturb; copying holds captures back and must be over soon. On Linux each thread has its priority.
        self._quiet = ThreadPoolExecutor(1, "quiet", os.nice, (10,))
        self._handlers: dict[type[Any], Callable[[Any], Answer]] = {
            Open: self._open,
            Persist: self._persist,
            Commit: self._commit,
            Discard: self._discard,
            Fill: self._fill,
        }

    def run(self) -> None:
        """Until end of file."""
        with self._quiet:
            self._answer()

    def _answer(self) -> None:
        while (data := self._channel.receive(wait=True)) is not None:
            request = messages.decode_request(data)
            url = request.url if isinstance(request, Open) else request.path
            try:
                answer = self._handlers[type(request)](request)
            except Exception as error:  # whatever a file system raises is an answer, not the end of persisting
                answer = messages.Failed(id=request.id, error=explain(error, url))
            try:
                self._channel.send(messages.encode(answer))
            except (BrokenPipeError, ConnectionResetError):
                return

    def _open(self, request: Open) -> Answer:
        folder = Folder(request.url)
        folder.make()
        folder.write(_PROBE, b"")
        folder.remove(_PROBE)
        found = catalog.start(request.url, request.resume)
        if found is None:
            return messages.Opened(id=request.id)
        about = catalog.summary(found.path)
        return messages.Opened(
            id=request.id, path=found.path, step=found.step, world=about.world, nodes=about.nodes, replicated=about.replicated
        )

    def _persist(self, request: Persist) -> Answer:
        began = time.monotonic()
        files = [SlotFile(self._descriptors.arenas[place.arena]) for place in request.places]
        try:
            found = gather(request.places, files, request.step)
        finally:
            for file in files:
                file.close()
        description = published(self._descriptors.description, request.step)
        if description is None and any(place.rank == 0 for place in request.places):
            raise ValueError(f"rank 0 has not said what step {request.step} is: `meta.describe` and `publish` come before `Persist`")
        self._channel.send(messages.encode(messages.Copied(id=request.id, step=request.step)))
        size = self._quiet.submit(_write, request, found, description).result()
        return messages.Written(id=request.id, step=request.step, bytes=size, seconds=time.monotonic() - began)

    def _commit(self, request: Commit) -> Answer:
        commit.commit(Folder(request.path), request.step, request.nodes, replicated=request.replicated)
        url, removed, warning = request.path.rpartition("/")[0], [], ""
        try:
            removed = catalog.retain(url, keep_last=request.keep_last, keep_every_n_steps=request.keep_every_n_steps, in_use=request.in_use)
        except Exception as error:  # the new checkpoint is complete: that old ones stay is a warning
            warning = explain(error, url)
        return messages.Committed(id=request.id, step=request.step, removed=removed, warning=warning)

    def _discard(self, request: Discard) -> Answer:
        catalog.discard(request.path)
        return messages.Discarded(id=request.id)

    def _fill(self, request: Fill) -> Answer:
        step = reader.fill(Folder(request.path), request.places, self._descriptors.arenas)
        return messages.Filled(id=request.id, step=step)


def _write(request: Persist, found: Gathered, description: Description | None) -> int:
    folder = Folder(request.path)
    persist.begin(folder)
    size = persist.write_part(folder, found, request.step, request.node)
    if description is not None:
        persist.write_names(folder, description)
    return size


def serve(text: str) -> None:
    """Be the storage process; `text` is that of `Descriptors`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the agent ends this one
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it may hang in a file system that does not answer
    torch.set_num_threads(1)
    descriptors = Descriptors.from_text(text)
    channel = Channel(socket.socket(fileno=descriptors.channel))
    try:
        Writer(channel, descriptors).run()
    finally:
        channel.close()


if __name__ == "__main__":
    serve(os.environ[ENVIRONMENT])
