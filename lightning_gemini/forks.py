"""What a forked child (a loader's worker, a feeder) must not do with what it inherited.

Seam: importing the module is enough; `not_in_children` names sockets that a child closes at once. A child that held them would keep an
address taken, and peers from seeing the end of a connection, after this process has died.

A child also never collects its parent's garbage: a process group that was replaced may wait there for the collector, and its destructor
joins threads that exist only in the parent (it crashes or hangs in the child).
"""

from __future__ import annotations

import gc
import os
import socket
import weakref

_OPEN: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def not_in_children(sock: socket.socket) -> None:
    """Close `sock` in every child that is forked from now on, for as long as it exists here."""
    _OPEN.add(sock)


def keep(sock: socket.socket) -> None:
    """Children may have it again."""
    _OPEN.discard(sock)


def _in_child() -> None:
    gc.freeze()
    for sock in list(_OPEN):
        sock.close()  # without a shutdown, which would end the parent's connection
    _OPEN.clear()


os.register_at_fork(after_in_child=_in_child)
