"""Whether an agent is dead for sure, as far as its machine can tell."""

from __future__ import annotations

import socket
import time

_TRIES = 6
_ANSWER_S = 0.5
_PAUSE_S = 0.02


def refuses(host: str, port: int) -> bool:
    """Whether the machine is there and nobody listens at the port. Half a second for an agent that lives, or a machine that is gone.

    A process that dies closes its connections and its listening socket one after the other. So being connected proves nothing until the
    other side keeps it, and one that was closed is tried again.
    """
    for _ in range(_TRIES):
        try:
            with socket.create_connection((host, port), timeout=_ANSWER_S) as sock:
                if sock.recv(1):
                    return False  # it speaks
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            pass
        except OSError:
            return False  # silent, or there is no way: the lease will tell
        time.sleep(_PAUSE_S)  # nothing tells when a process that dies is gone
    return False
