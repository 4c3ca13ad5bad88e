"""Host lists are read as `scontrol show hostnames` reads them; what cannot be read is named, with a way out."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.rendezvous.hostlist import expand, pods, split_hosts, tasks_per_node

STEMS = st.from_regex(r"[a-z]([a-z0-9-]{0,6}[a-z])?", fullmatch=True)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[01-03,07],gpu-a", ["node01", "node02", "node03", "node07", "gpu-a"]),
        ("gpu-a,node[1-2],b[5]", ["gpu-a", "node1", "node2", "b5"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("n[1,003]", ["n1", "n003"]),
        ("n[3,1-2]", ["n3", "n1", "n2"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
        ("r[1-2]-n[01,03]-ib", ["r1-n01-ib", "r1-n03-ib", "r2-n01-ib", "r2-n03-ib"]),
        ("node[1-2].example.org", ["node1.example.org", "node2.example.org"]),
        (" a , b[1] ", ["a", "b1"]),
        ("[1-2]", ["1", "2"]),
    ],
)
def test_expand(text: str, hosts: list[str]) -> None:
    assert expand(text) == hosts


@pytest.mark.parametrize(
    "text",
    ["", " ", ",", "a,,b", "a,", "a[1", "a1]", "a[1]]", "a[[1]]", "a[]", "a[x]", "a[2-1]", "a[1-]", "a[-1]", "a[1-2-3]", "a[1,,2]", "]a["],
)
def test_a_broken_list_is_named_with_the_remedy(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be read.*rendezvous\.hosts=\[") as refusal:
        expand(text)
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize("text", ["a[1-999999999999]", "a[1-99999][1-99999]", "a[1-999][1-999][1-999]"])
def test_a_list_of_absurd_length_is_refused_at_once(text: str) -> None:
    with pytest.raises(ValueError, match="cannot be read") as refusal:
        expand(text)
    assert repr(text) in str(refusal.value)


@given(STEMS, st.lists(st.tuples(st.integers(0, 300), st.integers(0, 20)), min_size=1, max_size=5), st.integers(1, 5))
def test_ranges_expand_to_the_names_they_were_made_from(stem: str, ranges: list[tuple[int, int]], width: int) -> None:
    inside = ",".join(f"{first:0{width}}-{first + more:0{width}}" for first, more in ranges)
    names = [f"{stem}{number:0{width}}" for first, more in ranges for number in range(first, first + more + 1)]
    assert expand(f"{stem}[{inside}]") == names


@given(st.lists(STEMS, min_size=1, max_size=6))
def test_plain_names_stay_as_they_are(names: list[str]) -> None:
    assert expand(",".join(names)) == names


@pytest.mark.parametrize(("text", "counts"), [("4", [4]), ("4(x2),3", [4, 4, 3]), ("1(x3)", [1, 1, 1]), ("2,1(x2),5", [2, 1, 1, 5])])
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


@given(st.lists(st.integers(1, 200), min_size=1, max_size=20))
def test_tasks_written_as_slurm_does(counts: list[int]) -> None:
    runs = [(count, len([*same])) for count, same in itertools.groupby(counts)]
    assert tasks_per_node(",".join(f"{count}(x{times})" if times > 1 else f"{count}" for count, times in runs)) == counts


@pytest.mark.parametrize("text", ["", "four", "4x2", "4(x)", "4(2)", "4,", "-1"])
def test_broken_tasks_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"SLURM_STEP_TASKS_PER_NODE={text!r} cannot be read") + r".*rendezvous\.hosts"):
        tasks_per_node(text)


@pytest.mark.parametrize(
    ("name", "index", "names"),
    [
        ("train-1", 1, ["train-0", "train-1", "train-2"]),
        ("train-0.train-svc", 0, ["train-0.train-svc", "train-1.train-svc", "train-2.train-svc"]),
        ("my-job-2.svc.team.svc.cluster.local", 2, [f"my-job-{number}.svc.team.svc.cluster.local" for number in range(3)]),
        ("set-workers-0-2.set", 2, ["set-workers-0-0.set", "set-workers-0-1.set", "set-workers-0-2.set"]),  # a JobSet
    ],
)
def test_pods(name: str, index: int, names: list[str]) -> None:
    assert pods(name, index, 3) == names


@pytest.mark.parametrize("name", ["train-1", "train", "2", "", "train-2x", "train-12.svc-2"])
def test_a_pod_whose_name_does_not_end_with_its_index(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(repr(name))}.*JOB_COMPLETION_INDEX=2.*rendezvous\.hosts"):
        pods(name, 2, 3)


@pytest.mark.parametrize(
    ("text", "hosts", "port"),
    [
        ("", [], None),
        (":29500", [], 29500),
        ("a", ["a"], None),
        ("a:1", ["a"], 1),
        ("node0,node1", ["node0", "node1"], None),
        ("node0, node1:29500", ["node0", "node1"], 29500),
        ("10.0.0.1,10.0.0.2", ["10.0.0.1", "10.0.0.2"], None),
        ("10.0.0.1,10.0.0.2:80", ["10.0.0.1", "10.0.0.2"], 80),
        ("::1", ["::1"], None),
        ("fe80::1,fe80::2", ["fe80::1", "fe80::2"], None),
        ("[::1]", ["[::1]"], None),
        ("[::1]:80", ["[::1]"], 80),
        ("[fe80::1],b:80", ["[fe80::1]", "b"], 80),
        ("[fe80::1],[fe80::2]:80", ["[fe80::1]", "[fe80::2]"], 80),
    ],
)
def test_split_hosts(text: str, hosts: list[str], port: int | None) -> None:
    assert split_hosts(text) == (hosts, port)


@pytest.mark.parametrize(("text", "wrong"), [("a:1,b:2", "a:1"), ("a:b", "a:b"), ("a:", "a:"), ("a:1,[::1]:2", "a:1")])
def test_a_port_at_each_host_is_refused(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match="one port for all of them at the end") as refusal:
        split_hosts(text)
    assert repr(wrong) in str(refusal.value)


@given(st.lists(STEMS | st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(lambda ip: f"[{ip}]"), min_size=1), st.integers(1, 65535))
def test_hosts_and_port_are_split_where_they_were_joined(hosts: list[str], port: int) -> None:
    assert split_hosts(f"{','.join(hosts)}:{port}") == (hosts, port)
