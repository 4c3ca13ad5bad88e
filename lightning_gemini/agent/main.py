"""`lightning-gemini run` and `python -m lightning_gemini.agent`: a command line becomes a supervised job, or a node of one."""

from __future__ import annotations

import argparse
import json
import os
import sys

from lightning_gemini.agent import waiting
from lightning_gemini.agent.cluster import Cluster, cluster
from lightning_gemini.agent.job import Join, alone
from lightning_gemini.agent.lives import live
from lightning_gemini.agent.spawn import ExecSpawner
from lightning_gemini.agent.supervisor import Supervisor
from lightning_gemini.config import MembershipConfig, parse
from lightning_gemini.peers import secret
from lightning_gemini.peers.wire import require_token


def parser() -> argparse.ArgumentParser:
    """The options of `run`."""
    made = argparse.ArgumentParser(
        prog="lightning-gemini run",
        description="Run a script under the node agent, one process per rank. On several nodes: the same command on each.",
    )
    add = made.add_argument
    add("--nproc-per-node", type=int, metavar="N", help="ranks on this node, as the Trainer's devices")
    add("--nnodes", type=int, metavar="N", help="nodes of the job, as the Trainer's num_nodes; those started beyond it are spares")
    add("--node-rank", type=int, metavar="I", help="this node's place, where the launcher does not tell and it matters")
    add("--job", metavar="NAME", help="name of the job, the same on all nodes and in no other job")
    add("--etcd", metavar="URL[,URL…]", default="", help="members of an etcd cluster; needed for more than one node")
    add("--host", metavar="ADDRESS", help="address at which the others reach this node (default: the one that reaches etcd)")
    add("--domain", metavar="LABEL", help="failure domain of this node: its rack, switch or zone")
    add("--spare", action="store_true", help="take part only in place of a node that is lost")
    add("--token-file", metavar="FILE", help="file with the job's secret (default: LIGHTNING_GEMINI_TOKEN)")
    own = 'more options of the group membership, such as {"lease_ttl_s": 6}: those of the script do not count here'
    add("--membership", metavar="JSON", default="{}", help=own)
    add("command", nargs=argparse.REMAINDER, help="script.py and its arguments, or a whole command after --")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run a job; returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        return _run(options)
    except (ValueError, ConnectionError) as error:
        print(f"lightning-gemini: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    command = _command(options.command)
    here = cluster(
        os.environ,
        nnodes=options.nnodes,
        nproc_per_node=options.nproc_per_node,
        node_rank=options.node_rank,
        job=options.job,
        host=options.host,
        domain=options.domain,
        spare=options.spare,
    )
    if here.nnodes * here.ranks_per_node < 2:
        raise ValueError(f"--nproc-per-node={here.ranks_per_node}: a rank can only be recovered by others, give 2 or more")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // here.ranks_per_node)))
    place = f"{here.node_rank} {here.host}"  # only tests have several nodes on one kernel
    if here.local_rank:
        return waiting.wait(here.job, place)
    door = waiting.Door(here.job, place) if here.job else None
    status = 1
    try:
        status = _supervise(here, options, command)
    finally:
        if door is not None:
            door.close(status, here.waiting)
    return status


def _supervise(here: Cluster, options: argparse.Namespace, command: list[str]) -> int:
    spawner = ExecSpawner(command)
    if here.nnodes == 1:
        status = Supervisor(spawner, here.ranks_per_node, alone).run()
        assert status is not None, "nobody can expel the only node"
        return status
    return live(here, lambda here: Supervisor(spawner, here.ranks_per_node, _join(here, options, command)))


def _join(here: Cluster, options: argparse.Namespace, command: list[str]) -> Join:
    from lightning_gemini.agent import joining  # needs the extra `etcd`

    endpoints = [url for url in options.etcd.split(",") if url]
    if not endpoints:
        raise ValueError(f"--nnodes={here.nnodes} needs an etcd to agree in: give --etcd http://host:2379 (see docs/nodes.md)")
    membership = parse(MembershipConfig, {**json.loads(options.membership), "etcd": endpoints}, "membership")
    token = secret.read(options.token_file, os.environ, "--token-file")
    require_token(token)
    return joining.through_etcd(here, joining.Options(membership=membership, token=token, script=command))


def _command(given: list[str]) -> list[str]:
    if given[:1] == ["--"]:
        given = given[1:]
    elif given:
        given = [sys.executable, *given]
    if not given:
        raise ValueError("no script given: lightning-gemini run --nproc-per-node 4 train.py")
    return given
