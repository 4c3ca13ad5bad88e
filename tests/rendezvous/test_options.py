"""Each option of the rendezvous has an effect, wrong ones are named; the job's secret stays one."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from pathlib import Path

import pytest

from lightning_gemini.config import RendezvousConfig, parse
from lightning_gemini.peers.errors import RendezvousError, Unreachable
from lightning_gemini.rendezvous import initialize
from lightning_gemini.rendezvous.detect import place, token
from tests.support.peers import new_job

SECRET = "8c0ffee5ecre7"
PLAIN = {"RANK": "0", "WORLD_SIZE": "2", "LIGHTNING_GEMINI_JOB": "other", "MASTER_ADDR": "localhost"}


def secret_file(directory: Path, text: str = SECRET + "\n", mode: int = 0o600) -> RendezvousConfig:
    path = directory / "token"
    path.write_text(text)
    path.chmod(mode)
    return RendezvousConfig(token_file=str(path))


# ---- the secret


@pytest.mark.parametrize(("said", "expected"), [("", ""), (SECRET, SECRET), (f" {SECRET}\n", SECRET)])
def test_a_token_in_the_environment(said: str, expected: str) -> None:
    assert token(RendezvousConfig(), {"LIGHTNING_GEMINI_TOKEN": said}) == expected.encode()
    assert token(RendezvousConfig(), {}) == b""


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_token_in_a_file_beats_the_environment(tmp_path: Path, mode: int) -> None:
    assert token(secret_file(tmp_path, mode=mode), {"LIGHTNING_GEMINI_TOKEN": "other"}) == SECRET.encode()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666, 0o601])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    config = secret_file(tmp_path, mode=mode)
    with pytest.raises(ValueError, match=r"rendezvous\.token_file='.*' can be read by others: chmod 600") as refusal:
        token(config, {})
    assert SECRET not in str(refusal.value)


def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    config = secret_file(tmp_path)
    os.chown(str(config.token_file), 12345, -1)
    with pytest.raises(ValueError, match="own it") as refusal:
        token(config, {})
    assert SECRET not in str(refusal.value)


def test_an_empty_or_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"token_file='.*' is empty: .*openssl rand"):
        token(secret_file(tmp_path, " \n"), {"LIGHTNING_GEMINI_TOKEN": SECRET})
    with pytest.raises(ValueError, match=r"token_file='/nowhere/token' cannot be read: No such file"):
        token(RendezvousConfig(token_file="/nowhere/token"), {})


@pytest.mark.parametrize(
    "option",
    [{"hosts": ["198.51.100.1"]}, {"hosts": ["127.0.0.1", "127.0.0.2", "127.0.0.3"]}, {"hosts": ["no.invalid", "::1"]}, {"port": 65535}],
)
def test_the_token_is_in_no_error(monkeypatch: pytest.MonkeyPatch, option: dict[str, object]) -> None:
    for key, value in (PLAIN | {"LIGHTNING_GEMINI_TOKEN": SECRET}).items():
        monkeypatch.setenv(key, value)
    config = parse(RendezvousConfig, {"job": new_job(), "timeout_s": 5.0, **option}, "rendezvous")
    with pytest.raises((ValueError, RendezvousError)) as failure:
        initialize.meet(config)
    assert SECRET not in f"{failure.value!r} {failure.value.__context__!r} {failure.value.__cause__!r}"
    for thread in threading.enumerate():  # those that looked up names end on their own, a moment after their loop
        if thread.name.startswith("asyncio_"):
            thread.join(15)


# ---- options


def test_every_option_has_a_test_of_its_effect() -> None:
    """`hosts`, `port`, `job` here and in test_detect, `token_file` above, `timeout_s` below, `etcd` in test_etcd."""
    assert [field.name for field in dataclasses.fields(RendezvousConfig)] == ["hosts", "port", "job", "timeout_s", "token_file", "etcd"]


def test_hosts_port_and_job_decide_the_addresses() -> None:
    def addresses(**options: object) -> object:
        config = parse(RendezvousConfig, options, "rendezvous")
        return place(config, PLAIN).roster(config.port).addresses

    kinds = [addresses(), addresses(job="mine"), addresses(port=2000), addresses(port=2001), addresses(hosts=["a", "b"])]
    kinds += [addresses(hosts=["b", "a"]), addresses(hosts=["a", "b"], port=2000), addresses(hosts=["a", "b"], job="mine")]
    assert len(set(kinds)) == len(kinds)
    assert addresses(job="mine") == addresses(job="mine")


def test_timeout_s_ends_the_wait_for_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in PLAIN.items():
        monkeypatch.setenv(key, value)
    began = time.monotonic()
    try:
        store, rank, world = initialize.meet(RendezvousConfig(job=new_job(), timeout_s=0.7))
        assert (rank, world) == (0, 2)
        store.set("//cpu//0/0", "me")
        with pytest.raises(Unreachable, match=r"could not reach rank 1 .*within 0\.7 s"):
            store.multi_get(["//cpu//0/0", "//cpu//0/1"])
    finally:
        initialize.leave()
    assert 0.3 < time.monotonic() - began < 3


def test_hosts_are_not_needed_with_etcd() -> None:
    assert place(RendezvousConfig(etcd="http://etcd:2379"), PLAIN | {"MASTER_ADDR": "node0"}).hosts == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hostz": 1}, r"unknown key 'rendezvous\.hostz': did you mean 'hosts'\? Known keys are hosts, port, job"),
        ({"prot": 1}, r"unknown key 'rendezvous\.prot': did you mean 'port'"),
        ({"hosts": []}, r"rendezvous\.hosts=\[\] is not valid: name the hosts"),
        ({"hosts": "a,b"}, r"rendezvous\.hosts='a,b' is not valid: Expected `array \| null`, got `str`"),
        ({"port": "hello"}, r"rendezvous\.port='hello' is not valid: Expected `int \| null`"),
        ({"port": 0}, r"rendezvous\.port=0 is not valid: give a port between 1 and 65535"),
        ({"port": 65536}, r"rendezvous\.port=65536 is not valid"),
        ({"job": 5}, r"rendezvous\.job=5 is not valid"),
        ({"timeout_s": 0}, r"rendezvous\.timeout_s=0\.?0? is not valid: give a positive number"),
        ({"timeout_s": "1m"}, r"rendezvous\.timeout_s='1m' is not valid"),
        ({"token_file": 1}, r"rendezvous\.token_file=1 is not valid"),
        ({"etcd": "etcd:2379"}, r"rendezvous\.etcd='etcd:2379' is not valid: give a URL such as http://"),
        ({"etcd": "http://e", "hosts": ["a"]}, r"rendezvous\.etcd='http://e' is not valid: leave out rendezvous\.hosts"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(RendezvousConfig, options, "rendezvous")
