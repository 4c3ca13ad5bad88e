"""Host lists as launchers write them: Slurm's compressed ones, and the pods of a Kubernetes Indexed Job.

Pure functions. Failure: a list that cannot be read raises `ValueError` with the list and what to set instead.
"""

from __future__ import annotations

import ipaddress
import itertools
import re

_REMEDY = "name the hosts yourself with rendezvous.hosts=[a,b,…]"
_MOST_HOSTS = 100_000


def expand(text: str) -> list[str]:
    """`"node[01-03,07],gpu-a"` -> `["node01", "node02", "node03", "node07", "gpu-a"]`, as `scontrol show hostnames` does."""
    try:
        hosts = [host for part in _split(text) for host in _expand_one(part.strip())]
    except ValueError as error:
        raise ValueError(f"the host list {text!r} cannot be read, {error}: {_REMEDY}") from None
    if not hosts or not all(hosts) or len(hosts) > _MOST_HOSTS:
        raise ValueError(f"the host list {text!r} cannot be read: {_REMEDY}")
    return hosts


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            break
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth:
        raise ValueError("its brackets do not match")
    return parts


def _expand_one(pattern: str) -> list[str]:
    pieces = re.split(r"\[([^\]]*)\]", pattern)
    choices = [[piece] if number % 2 == 0 else _numbers(piece) for number, piece in enumerate(pieces)]
    return ["".join(choice) for choice in itertools.islice(itertools.product(*choices), _MOST_HOSTS + 1)]


def _numbers(ranges: str) -> list[str]:
    """`"01-03,7"` -> `["01", "02", "03", "7"]`."""
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]) or int(match[2] or 0) - int(match[1]) > _MOST_HOSTS:
            raise ValueError(f"{part!r} is no range")
        numbers += [str(number).zfill(len(match[1])) for number in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return numbers


def tasks_per_node(text: str) -> list[int]:
    """Slurm's `"4(x2),3"` -> `[4, 4, 3]`."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={text!r} cannot be read: {_REMEDY}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def split_hosts(text: str) -> tuple[list[str], int | None]:
    """`"a,b:29500"` -> `(["a", "b"], 29500)`; with a port, an IPv6 address stands in brackets. Raises `ValueError`."""
    text = text.strip()
    match = re.fullmatch(r"(.*?)(?::(\d+))?", text) if text.count(":") < 2 or "]" in text else None
    hosts, port = (match[1], match[2]) if match else (text, None)
    names = [host.strip() for host in hosts.split(",") if host.strip()]
    for name in names:
        if ":" in name and not _is_ipv6(name.removeprefix("[").removesuffix("]")):
            raise ValueError(f"{name!r} in {text!r} is no host: name hosts alone, and one port for all of them at the end, as in a,b:29500")
    return names, int(port) if port else None


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def pods(name: str, index: int, count: int) -> list[str]:
    """The pods of an Indexed Job or JobSet from the full name of one: `job-3.service` of 4 -> `job-0.service`, …"""
    host, dot, domain = name.partition(".")
    stem, dash, own = host.rpartition("-")
    if own != str(index) or not dash:
        raise ValueError(f"this pod is called {name!r} and has JOB_COMPLETION_INDEX={index}, but its name does not end so: {_REMEDY}")
    return [f"{stem}-{number}{dot}{domain}" for number in range(count)]
