"""Requests to an etcd of one or several members, through the HTTP gateway that each of them has.

Seam: `Gateway.ask` sends one request and returns the answer; `Gateway.watch` yields messages of a watch until it breaks. A gateway belongs
to one thread; only `shut` is for others. etcd3gw's client knows one server, has no place for a token and swallows what goes wrong in a
watch, so there is a client for each member, used through its `post` and its session.

What fails: a member that does not answer, or has no leader -> the next one is asked; none does -> `Unavailable`; etcd says no -> `Refused`
with its words; a token that has expired -> a new one, once. A request may have been carried out although its answer was lost: ask only for
what may be done twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_STALE_TOKEN = ("invalid auth token", "revision in header is old")
_PORT = 2379


class Unavailable(ConnectionError):
    """No member answers."""


class Refused(Exception):
    """etcd has answered, and the answer is no."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Where an etcd is, and what it wants to see."""

    endpoints: tuple[str, ...]
    """URLs of its members."""
    ca: str | None = None
    """File with the certificates that its own is checked against."""
    cert: str | None = None
    """File with the certificate that is shown to it, and that one's key."""
    key: str | None = None
    user: str = ""
    password: str = ""

    def __post_init__(self) -> None:
        for url in self.endpoints or ("",):
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"membership.etcd={url!r} is not valid: give URLs, such as http://10.0.0.1:{_PORT}")
        if (self.cert is None) != (self.key is None):
            raise ValueError(f"membership.cert={self.cert!r} is not valid with membership.key={self.key!r}: give both, or neither")


class Gateway:
    """See the module's docstring."""

    def __init__(self, access: Access) -> None:
        """Raises `ValueError` where etcd3gw is not installed."""
        self._access = access
        self._clients = [_client(access, url) for url in access.endpoints]
        self._current = 0
        self._authenticated = not access.user
        self._shutting = threading.Lock()
        self._line: socket.socket | None = None
        """Another descriptor of the watch's connection: its number cannot be somebody else's by the time it is shut."""

    def ask(self, path: str, *, timeout_s: float, **body: Any) -> dict[str, Any]:
        """One request, for which each member has `timeout_s` until the connection stands and again until it answers."""
        problems = []
        for _ in self._clients:
            try:
                return self._ask(path, timeout_s, body)
            except Unavailable as error:
                problems.append(f"{self._clients[self._current].base_url}: {error}")
                self.move_on()
        raise Unavailable("; ".join(problems))

    def move_on(self) -> None:
        """Begin with the next member from now on."""
        self._current = (self._current + 1) % len(self._clients)

    def _ask(self, path: str, timeout_s: float, body: dict[str, Any]) -> dict[str, Any]:
        if not self._authenticated:
            self._authenticate(timeout_s)
        try:
            return self._post(path, timeout_s, body)
        except Refused as error:
            if not self._access.user or not any(words in str(error) for words in _STALE_TOKEN):
                raise
        self._authenticate(timeout_s)
        return self._post(path, timeout_s, body)

    def _authenticate(self, timeout_s: float) -> None:
        for client in self._clients:
            client.session.headers.pop("Authorization", None)  # with an old token, etcd 3.4 refuses to give a new one
        token = self._post("/auth/authenticate", timeout_s, {"name": self._access.user, "password": self._access.password})["token"]
        for client in self._clients:
            client.session.headers["Authorization"] = token
        self._authenticated = True

    def _post(self, path: str, timeout_s: float, body: dict[str, Any]) -> dict[str, Any]:
        from etcd3gw import exceptions

        client = self._clients[self._current]
        client.timeout = timeout_s
        try:
            answer: dict[str, Any] = client.post(client.get_url(path), json=body)
        except (exceptions.ConnectionFailedError, exceptions.ConnectionTimeoutError, exceptions.InternalServerError, OSError) as error:
            raise Unavailable(_brief(error)) from error
        except exceptions.Etcd3Exception as error:
            raise Refused(_brief(error)) from error
        return answer

    def watch(self, *, idle_s: float, **create: Any) -> Generator[dict[str, Any], None, None]:
        """Messages of a watch, the first of them when it stands. Ends after `idle_s` without any; raises `Unavailable` when it breaks."""
        if not self._authenticated:
            self._authenticate(idle_s)
        client = self._clients[self._current]
        try:
            request = {"create_request": create}
            with client.session.post(client.get_url("/watch"), json=request, stream=True, timeout=idle_s) as response:
                with self._shutting:
                    self._line = socket.socket(fileno=os.dup(response.raw.fileno()))
                yield from _messages(response)
        except OSError as error:
            if self._line is None or "timed out" not in _brief(error):
                raise Unavailable(_brief(error)) from error
        finally:
            self._hang_up()

    def _hang_up(self) -> None:
        with self._shutting:
            if self._line is not None:
                self._line.close()
                self._line = None

    def authenticate_again(self) -> None:
        """The token is of no use any more: only a request hears of it, a watch just ends."""
        self._authenticated = not self._access.user

    def shut(self) -> None:
        """Break the watch, if there is one, from any thread."""
        with self._shutting, contextlib.suppress(OSError):  # the other end may have closed it
            if self._line is not None:
                self._line.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients:
            client.session.close()


def _messages(response: Any) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines(chunk_size=1 << 16):
        message = json.loads(line) if line else {}
        if "error" in message:
            raise Unavailable(str(message["error"]))
        if message:
            yield message["result"]


def _client(access: Access, url: str) -> Any:
    try:
        from etcd3gw.client import Etcd3Client
    except ImportError:
        raise ValueError(f"membership.etcd={url!r} needs a client: pip install 'lightning_gemini[etcd]'") from None
    parts = urlsplit(url)
    client = Etcd3Client(
        str(parts.hostname),
        parts.port or _PORT,
        parts.scheme,
        ca_cert=access.ca,
        cert_cert=access.cert,
        cert_key=access.key,
        api_path="/v3/",
    )
    client.session.trust_env = False  # a proxy for the web, or a .netrc, is no way to etcd
    client.session.headers["Grpc-Metadata-hasleader"] = "true"  # a member that is cut off from the others says so, instead of waiting
    return client


def _brief(error: BaseException) -> str:
    """What etcd has said, or what lies at the bottom of an error of requests. Its frames are emptied: they hold each other, and with them a
    socket, until Python's collector comes by."""
    traceback.clear_frames(error.__traceback__)
    try:
        said = json.loads(getattr(error, "detail_text", None) or "")
        return str(said.get("message") or said.get("error"))
    except ValueError:
        while error.__context__ is not None:
            error = error.__context__
            traceback.clear_frames(error.__traceback__)
        return str(error) or repr(error)
