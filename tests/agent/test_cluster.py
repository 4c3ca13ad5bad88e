"""A node's place in its job, from what launchers tell; what is missing or contradictory is one error that says what to set."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.agent.cluster import Cluster, cluster

Environ = dict[str, str]

TORCHRUN = {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "RANK": "11", "WORLD_SIZE": "16"} | {
    "TORCHELASTIC_RUN_ID": "run", "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "NODE_RANK": "7"
}  # fmt: skip
ONE_EACH = TORCHRUN | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "RANK": "1", "WORLD_SIZE": "2"}
SRUN = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "3", "SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NUM_TASKS": "4"} | {
    "SLURM_NODEID": "2", "SLURM_LOCALID": "0", "SLURM_PROCID": "2",
    "SLURM_TOPOLOGY_ADDR": "core.rack7.node12", "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.switch.node",
}  # fmt: skip
SRUN_RANKS = SRUN | {"SLURM_STEP_NUM_TASKS": "32", "SLURM_LOCALID": "5", "SLURM_PROCID": "21"}
BATCH = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "4", "SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURM_PROCID": "0"}
"""sbatch starts the script itself on the first node only, and srun is what tells of a step."""
POD = {"JOB_COMPLETION_INDEX": "2", "HOSTNAME": "train-workers-0-2", "LIGHTNING_GEMINI_NODES": "4", "LIGHTNING_GEMINI_DOMAIN": "zone-b"}
BY_HAND = {"NODE_RANK": "1", "LIGHTNING_GEMINI_NODES": "2", "LIGHTNING_GEMINI_JOB": "mine"}

TABLE: dict[str, tuple[Environ, dict[str, Any], Cluster]] = {
    "nothing: one node": ({}, {}, Cluster(nnodes=1, ranks_per_node=8)),
    "torchrun, a process for each rank": (
        TORCHRUN, {"nproc_per_node": None},
        Cluster(nnodes=2, node_rank=1, ranks_per_node=8, job="run@node0:29500", local_rank=3, waiting=7),
    ),
    "torchrun, a process on each node": (ONE_EACH, {}, Cluster(nnodes=2, node_rank=1, ranks_per_node=8, job="run@node0:29500")),
    "torchrun inside of Slurm": (
        SRUN | ONE_EACH, {}, Cluster(nnodes=2, node_rank=1, ranks_per_node=8, job="run@node0:29500", domain="rack7"),
    ),
    "srun, a process on each node": (SRUN, {}, Cluster(nnodes=4, node_rank=2, ranks_per_node=8, job="slurm-77.3", domain="rack7")),
    "srun, a process for each rank": (
        SRUN_RANKS, {"nproc_per_node": None},
        Cluster(nnodes=4, node_rank=2, ranks_per_node=8, job="slurm-77.3", domain="rack7", local_rank=5, waiting=7),
    ),
    "srun, one node more than the world has": (
        SRUN | {"SLURM_NODEID": "3"}, {"nnodes": 3},
        Cluster(nnodes=3, ranks_per_node=8, job="slurm-77.3", domain="rack7"),
    ),
    "the others of these keep their place": (
        SRUN, {"nnodes": 3}, Cluster(nnodes=3, node_rank=2, ranks_per_node=8, job="slurm-77.3", domain="rack7"),
    ),
    "a requeued job is another": (
        SRUN | {"SLURM_RESTART_COUNT": "2"}, {},
        Cluster(nnodes=4, node_rank=2, ranks_per_node=8, job="slurm-77.3-2", domain="rack7"),
    ),
    "another step joins as a spare": (
        SRUN | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0", "SLURM_STEP_ID": "4"},
        {"nnodes": 3, "job": "slurm-77.3", "spare": True},
        Cluster(nnodes=3, ranks_per_node=8, job="slurm-77.3", domain="rack7", spare=True),
    ),
    "another step joins, its own numbers do not count": (
        SRUN | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"}, {"nnodes": 3, "job": "j", "domain": "d"},
        Cluster(nnodes=3, ranks_per_node=8, job="j", domain="d"),
    ),
    "a batch script on one node": (BATCH | {"SLURM_NNODES": "1"}, {}, Cluster(nnodes=1, ranks_per_node=8)),
    "a batch script that wants one node": (BATCH, {"nnodes": 1}, Cluster(nnodes=1, ranks_per_node=8)),
    "a pod": (POD, {}, Cluster(nnodes=4, node_rank=2, ranks_per_node=8, job="pods-train-workers-0", domain="zone-b")),
    "a pod more than the world has": (
        POD | {"JOB_COMPLETION_INDEX": "4"}, {},
        Cluster(nnodes=4, ranks_per_node=8, job="pods-train-workers-0", domain="zone-b"),
    ),
    "a pod on a node without the label": (
        POD | {"LIGHTNING_GEMINI_DOMAIN": ""}, {"job": "mine", "host": "10.1.2.3"},
        Cluster(nnodes=4, node_rank=2, ranks_per_node=8, job="mine", host="10.1.2.3"),
    ),
    "by hand": (BY_HAND, {}, Cluster(nnodes=2, node_rank=1, ranks_per_node=8, job="mine")),
    "by hand, without a place": ({}, {"nnodes": 3, "job": "j"}, Cluster(nnodes=3, ranks_per_node=8, job="j")),
    "arguments win": (
        SRUN | {"LIGHTNING_GEMINI_NODES": "3", "LIGHTNING_GEMINI_JOB": "env", "LIGHTNING_GEMINI_DOMAIN": "env"},
        {"nnodes": 2, "node_rank": 0, "job": "j", "domain": "d", "host": "h"},
        Cluster(nnodes=2, node_rank=0, ranks_per_node=8, job="j", domain="d", host="h"),
    ),
    "our own variables come second": (
        SRUN | {"LIGHTNING_GEMINI_NODES": "3", "LIGHTNING_GEMINI_JOB": "env", "LIGHTNING_GEMINI_DOMAIN": "env"}, {},
        Cluster(nnodes=3, node_rank=2, ranks_per_node=8, job="env", domain="env"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("environ", "options", "expected"), TABLE.values(), ids=TABLE)
def test_what_launchers_tell(environ: Environ, options: dict[str, Any], expected: Cluster) -> None:
    assert cluster(environ, **{"nproc_per_node": 8, **options}) == expected


REFUSED: list[tuple[Environ, dict[str, Any], str]] = [
    ({}, {"nnodes": 0}, r"--nnodes=0 is not valid: give the number of nodes"),
    ({"LIGHTNING_GEMINI_NODES": "two"}, {}, r"LIGHTNING_GEMINI_NODES='two' is not a number"),
    ({}, {"nproc_per_node": 0}, r"--nproc-per-node=0 is not valid: give the number of ranks"),
    ({}, {"nproc_per_node": None}, r"--nproc-per-node is missing: give the number of ranks"),
    ({}, {"nnodes": 2}, r"--nnodes=2, but nobody has named the job: give --job"),
    (POD | {"HOSTNAME": ""}, {}, r"nobody has named the job: give --job"),
    ({}, {"nnodes": 2, "job": "j", "node_rank": 2}, r"--node-rank=2 is not a place among 2 nodes: give 0 to 1"),
    ({}, {"nnodes": 2, "job": "j", "node_rank": -1}, r"--node-rank=-1 is not a place among 2 nodes"),
    ({}, {"nnodes": 2, "job": "j", "node_rank": 1, "spare": True}, r"--node-rank=1 is not a place of a spare: leave it out"),
    ({key: POD[key] for key in ("JOB_COMPLETION_INDEX", "HOSTNAME")}, {}, r"--nnodes is missing: this is node 2, and Kubernetes tells"),
    ({"NODE_RANK": "0"}, {}, r"--nnodes is missing: this is node 0, and nobody tells of how many"),
    (TORCHRUN, {"nnodes": 3}, r"--nnodes=3, but torchrun has started 2: .* name it with --job"),
    (SRUN, {"nnodes": 5}, r"--nnodes=5, but srun has started 4: start as many nodes, or more for spares"),
    (SRUN, {"nnodes": 5, "spare": True}, r"--nnodes=5, but srun has started 4: .* name it with --job"),
    (BATCH, {}, r"SLURM_NNODES=4, but srun has not started this process: put srun before the command"),
    (BATCH, {"nnodes": 4}, r"put srun before the command, .* or give --nnodes 1"),
    (SRUN_RANKS, {"nproc_per_node": 4}, r"--nproc-per-node=4, but srun has started 8 processes on each node: start one on each, or 4"),
    (TORCHRUN, {"nproc_per_node": 2}, r"--nproc-per-node=2, but torchrun has started 8 processes"),
    (SRUN | {"SLURM_STEP_NUM_TASKS": "5"}, {}, r"srun has started 5 tasks on 4 nodes: .*--ntasks-per-node"),
    (SRUN | {"SLURM_NODEID": "4"}, {}, r"srun contradicts itself: node 4 of 4, process 0 of 1"),
    (SRUN | {"SLURM_NODEID": ""}, {}, r"SLURM_NODEID='' is not a number"),
    (TORCHRUN | {"GROUP_RANK": "2"}, {}, r"torchrun contradicts itself: node 2 of 2"),
    (TORCHRUN | {"LOCAL_RANK": "8"}, {}, r"torchrun contradicts itself: node 1 of 2, process 8 of 8"),
    ({key: value for key, value in TORCHRUN.items() if key != "LOCAL_WORLD_SIZE"}, {}, r"LOCAL_WORLD_SIZE=None is not a number"),
    (POD | {"JOB_COMPLETION_INDEX": "-3"}, {}, r"Kubernetes contradicts itself: node -3"),
]


@pytest.mark.parametrize(("environ", "options", "message"), REFUSED)
def test_what_is_missing_or_contradictory_is_named(environ: Environ, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster(environ, **{"nproc_per_node": 8, **options})


@pytest.mark.parametrize(
    ("address", "pattern", "domain"),
    [
        ("sw4.sw4-isw-16.sw4-16n05", "switch.switch.node", "sw4-isw-16"),
        (".ib-core.tors-r1pac16.gpu027", "switch.switch.switch.node", "tors-r1pac16"),  # as seen: a top that has no name
        ("rack7.node12", "switch.node", "rack7"),
        ("block3.node12", "block.node", "block3"),  # topology/block
        ("rack7.node12.cluster.example.org", "switch.node", "rack7"),
        ("node12", "node", ""),
        ("localhost.localdomain", "node", ""),
        ("core.rack7", "switch.switch", ""),
        ("node12", "switch.node", ""),
        ("core.rack7.node12", "", ""),
        ("", "", ""),
    ],
)
def test_the_switch_above_a_node(address: str, pattern: str, domain: str) -> None:
    environ = SRUN | {"SLURM_TOPOLOGY_ADDR": address, "SLURM_TOPOLOGY_ADDR_PATTERN": pattern}
    assert cluster(environ, nproc_per_node=8).domain == domain


# ---- all processes of a launch together


def torchrun(nodes: int, each: int) -> list[Environ]:
    start = {"GROUP_WORLD_SIZE": str(nodes), "LOCAL_WORLD_SIZE": str(each), "TORCHELASTIC_RUN_ID": "run"}
    return [start | {"GROUP_RANK": str(node), "LOCAL_RANK": str(local)} for node in range(nodes) for local in range(each)]


def srun(nodes: int, each: int) -> list[Environ]:
    start = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_STEP_NUM_TASKS": str(nodes * each)}
    return [start | {"SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)} for node in range(nodes) for local in range(each)]


def pods(nodes: int, each: int) -> list[Environ]:
    return [{"JOB_COMPLETION_INDEX": str(index), "HOSTNAME": f"train-{index}"} for index in range(nodes)]


@pytest.mark.parametrize("launch", [torchrun, srun, pods])
@given(nodes=st.integers(1, 6), spares=st.integers(0, 2), ranks=st.integers(1, 4), for_each_rank=st.booleans())
def test_all_processes_agree(launch: Any, nodes: int, spares: int, ranks: int, for_each_rank: bool) -> None:
    environs = launch(nodes + spares, ranks if for_each_rank else 1)
    found = [cluster(environ, nnodes=nodes, nproc_per_node=ranks) for environ in environs]
    agents = [place for place in found if place.local_rank == 0]
    assert len({(place.nnodes, place.ranks_per_node, place.job) for place in found}) == 1 and found[0].job
    assert [place.node_rank for place in agents] == [*range(nodes), *[-1] * spares]
