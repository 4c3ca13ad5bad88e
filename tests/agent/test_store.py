"""The rendezvous keys of a generation."""

from __future__ import annotations

from lightning_gemini.agent.messages import StoreGet, StoreSet, StoreValues
from lightning_gemini.agent.store import KeyStore


class Mailbox:
    """Answers, in order."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, list[bytes] | None]] = []

    def __call__(self, message: StoreValues) -> None:
        self.answers.append((message.request, message.values))


def put(store: KeyStore, key: str, value: bytes = b"v", generation: int = 0) -> None:
    store.set(StoreSet(generation=generation, key=key, value=value))


def ask(store: KeyStore, box: Mailbox, request: int, *keys: str, generation: int = 0) -> None:
    store.get(StoreGet(request=request, generation=generation, keys=list(keys)), box)


def test_what_is_there_is_answered_at_once() -> None:
    store, box = KeyStore(), Mailbox()
    put(store, "a", b"1")
    put(store, "b", b"2")
    ask(store, box, 7, "b", "a", "b")
    assert box.answers == [(7, [b"2", b"1", b"2"])]


def test_no_keys_are_always_there() -> None:
    box = Mailbox()
    ask(KeyStore(), box, 1)
    assert box.answers == [(1, [])]


def test_a_request_waits_for_all_of_its_keys() -> None:
    store, box = KeyStore(), Mailbox()
    ask(store, box, 1, "a", "b")
    ask(store, box, 2, "b")
    put(store, "a")
    assert box.answers == []
    put(store, "c")
    put(store, "b", b"late")
    assert sorted(box.answers) == [(1, [b"v", b"late"]), (2, [b"late"])]
    put(store, "b", b"again")
    assert len(box.answers) == 2, "answered once"


def test_the_newest_value_counts() -> None:
    store, box = KeyStore(), Mailbox()
    put(store, "a", b"1")
    put(store, "a", b"2")
    ask(store, box, 1, "a")
    assert box.answers == [(1, [b"2"])]


def test_a_new_generation_sends_waiters_away_and_forgets_the_keys() -> None:
    store, box = KeyStore(), Mailbox()
    put(store, "a")
    ask(store, box, 1, "never")
    store.open(1)
    assert box.answers == [(1, None)]
    ask(store, box, 2, "a", generation=1)
    assert len(box.answers) == 1, "the key of generation 0 is gone"
    put(store, "a", b"new", generation=1)
    assert box.answers[1:] == [(2, [b"new"])]


def test_a_late_message_of_an_older_generation_changes_nothing() -> None:
    store, box = KeyStore(), Mailbox()
    store.open(2)
    put(store, "a", b"stale", generation=1)
    ask(store, box, 1, "a", generation=1)
    assert box.answers == [(1, None)]
    ask(store, box, 2, "a", generation=2)
    assert len(box.answers) == 1
    put(store, "a", b"fresh", generation=2)
    assert box.answers[1:] == [(2, [b"fresh"])]


def test_a_message_of_a_generation_that_has_not_begun_is_refused() -> None:
    store, box = KeyStore(), Mailbox()
    put(store, "a", generation=1)
    ask(store, box, 1, "a", generation=1)
    store.open(1)
    ask(store, box, 2, "a", generation=1)
    assert box.answers == [(1, None)]


def test_a_waiter_that_asks_again_when_sent_away() -> None:
    """The reply runs inside `open`: what it asks for belongs to the new generation."""
    store, box = KeyStore(), Mailbox()

    def again(message: StoreValues) -> None:
        if message.values is None:
            ask(store, box, 2, "a", generation=1)

    store.get(StoreGet(request=1, generation=0, keys=["a"]), again)
    store.open(1)
    put(store, "a", b"x", generation=1)
    assert box.answers == [(2, [b"x"])]
