"""How a node comes into a job: its lease, its key, and a first look at the others.

Seam: `register`; afterwards the view has been read and has this node in it. The node registers first and looks then, so that of two that do
not fit, always the later one sees the other and leaves.

What fails: etcd does not answer -> tried again until the deadline, then `ConnectionError`; it refuses, this node cannot be in the job, or
comes back to one that is not there any more -> `ValueError`, and the registration is withdrawn.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from urllib.parse import unquote

from lightning_gemini.membership import roster
from lightning_gemini.membership.etcd_gateway import Access, Gateway, Refused, Unavailable
from lightning_gemini.membership.etcd_keys import create, node_key
from lightning_gemini.membership.etcd_lease import Lease
from lightning_gemini.membership.etcd_view import View
from lightning_gemini.membership.records import NodeInfo

_REQUEST_S = 2.0
_PAUSE_S = 0.1


def register(info: NodeInfo, access: Access, gateway: Gateway, lease: Lease, view: View, ttl_s: int, limit_s: float) -> None:
    """See the module's docstring. `limit_s`: for how long etcd may be silent."""
    where = f"membership.etcd={','.join(access.endpoints)}"
    try:
        _persist(limit_s, lambda: lease.grant(ttl_s, _REQUEST_S))
        _persist(limit_s, lambda: _create(info, gateway, lease, view))
    except Unavailable as error:
        raise ConnectionError(f"{where}: no etcd answers ({error}): is it there, and are address and certificates right?") from None
    except Refused as error:
        raise ValueError(f"{where}: etcd refuses ({error}): {_remedy(access)}") from None
    except BaseException:
        _withdraw(gateway, lease)
        raise


def _remedy(access: Access) -> str:
    who = f"membership.user={access.user!r} and its password" if access.user else "membership.user, which is empty,"
    return f"check that {who} may read and write the keys below /lightning_gemini/"


def _persist(limit_s: float, attempt: Callable[[], object]) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            attempt()
            return
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_S)  # between attempts: nothing tells when a server starts


def _create(info: NodeInfo, gateway: Gateway, lease: Lease, view: View) -> None:
    key = node_key(info.node)
    gateway.ask("/kv/txn", timeout_s=_REQUEST_S, **create(view.prefix + key, info, lease.id))
    view.reset(gateway.ask("/kv/range", timeout_s=_REQUEST_S, **view.keys()))
    held = view.held(key)
    if held is None or held.lease != lease.id:
        raise ValueError(f"node={info.node!r} is in this job already: give each agent a name of its own")
    if info.again and view.formed is None:
        raise ValueError(
            f"membership.etcd: job {unquote(view.prefix.split('/')[-2])!r} is not there any more. It has ended, or etcd was wiped, while "
            "this node was cut off: if it was not done, start it again"
        )
    others = view.formed.nodes if view.formed is not None else view.nodes
    roster.agree(next(iter(others.values())), info)


def _withdraw(gateway: Gateway, lease: Lease) -> None:
    with contextlib.suppress(Unavailable, Refused):  # then it ends by itself
        if lease.id:
            gateway.ask("/lease/revoke", timeout_s=_REQUEST_S, ID=lease.id)
