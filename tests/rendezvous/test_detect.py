"""What launchers tell their processes, as one place; what is missing is one error that says what to set."""

from __future__ import annotations

import pytest

from lightning_gemini.config import RendezvousConfig
from lightning_gemini.peers.roster import CANDIDATES
from lightning_gemini.rendezvous.detect import Place, place

Environ = dict[str, str]

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"} | {
    "TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_RESTART_COUNT": "2"
}  # fmt: skip
TORCHRUN_2 = TORCHRUN | {"LOCAL_WORLD_SIZE": "4", "LIGHTNING_GEMINI_HOSTS": "node0,node1", "LIGHTNING_GEMINI_START": "1"}
SRUN = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "3", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"} | {
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_DISTRIBUTION": "block"
}  # fmt: skip
SRUN_1 = SRUN | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "gpu07", "SLURM_STEP_TASKS_PER_NODE": "8"}
SRUN_TORCHRUN = SRUN | TORCHRUN | {"LOCAL_WORLD_SIZE": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_DISTRIBUTION": "cyclic"}
POD = {"JOB_COMPLETION_INDEX": "2", "HOSTNAME": "train-2", "LIGHTNING_GEMINI_PODS": "3"}
POD_TORCHRUN = TORCHRUN | {"JOB_COMPLETION_INDEX": "1", "HOSTNAME": "train-1", "LOCAL_WORLD_SIZE": "4"}
NAMES = "127.0.0.1 localhost\n# train-2.old\n10.1.0.7\ttrain-2.svc.team.svc.cluster.local train-2\n"
LIGHTNING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "41234", "NODE_RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
PLAIN = {"RANK": "1", "WORLD_SIZE": "4", "LIGHTNING_GEMINI_JOB": "mine"}

PODS = tuple(f"train-{number}.svc.team.svc.cluster.local" for number in range(3))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCHRUN, Place("run@node0:29500", 5, 8, (), 2)),
        (TORCHRUN_2, Place("run@node0:29500", 5, 8, ("node0", "node1"), 1)),
        (SRUN, Place("slurm-77.3", 5, 8, ("gpu07", "gpu08"), 0)),
        (SRUN | {"SLURM_RESTART_COUNT": "4"}, Place("slurm-77.3", 5, 8, ("gpu07", "gpu08"), 4)),
        (SRUN_1, Place("slurm-77.3", 5, 8, (), 0)),
        (SRUN_TORCHRUN, Place("slurm-77.3", 5, 8, ("gpu07", "gpu08"), 0)),
        (POD, Place("pods-train", 2, 3, PODS, 0)),
        (POD_TORCHRUN, Place("run@node0:29500", 5, 8, ("train-0", "train-1"), 0)),
        (PLAIN, Place("mine", 1, 4, (), 0)),
        (PLAIN | {"MASTER_ADDR": "node0", "LIGHTNING_GEMINI_HOSTS": "a, b"}, Place("mine", 1, 4, ("a", " b"), 0)),
        (PLAIN | {"LIGHTNING_GEMINI_HOSTS": "127.0.0.1"}, Place("mine", 1, 4, (), 0)),
        (PLAIN | {"LIGHTNING_GEMINI_HOSTS": "node0"}, Place("mine", 1, 4, ("node0",), 0)),
        (PLAIN | {"LIGHTNING_GEMINI_START": "7"}, Place("mine", 1, 4, (), 7)),
    ],
)
def test_what_launchers_tell(environ: Environ, expected: Place) -> None:
    assert place(RendezvousConfig(), environ, names=NAMES) == expected


def test_lightnings_launcher_gives_rank_and_world_as_arguments() -> None:
    assert place(RendezvousConfig(), LIGHTNING, 1, 2) == Place("@127.0.0.1:41234", 1, 2, (), 0)


def test_a_pod_without_its_full_name_in_etc_hosts_uses_the_short_one() -> None:
    assert place(RendezvousConfig(), POD, names="10.1.0.7 other.svc\n").hosts == ("train-0", "train-1", "train-2")


def test_arguments_beat_the_environment() -> None:
    assert place(RendezvousConfig(), SRUN_1, 0, 3) == Place("slurm-77.3", 0, 3, (), 0)


@pytest.mark.parametrize("environ", [SRUN, SRUN_1, TORCHRUN, TORCHRUN_2, POD_TORCHRUN, PLAIN | {"LIGHTNING_GEMINI_JOB": "other"}])
def test_options_beat_the_environment(environ: Environ) -> None:
    found = place(RendezvousConfig(hosts=["x", "y"], job="mine"), environ, names=NAMES)
    assert (found.hosts, found.job) == (("x", "y"), "mine")


def test_restarts_of_torchrun_count_on_one_node_only() -> None:
    """On several hosts each agent has a count of its own: peers would never agree on a generation."""
    assert place(RendezvousConfig(), TORCHRUN | {"LIGHTNING_GEMINI_START": "9"}).generation == 2
    two = {key: value for key, value in TORCHRUN_2.items() if key != "LIGHTNING_GEMINI_START"}
    assert place(RendezvousConfig(), two).generation == 0
    assert place(RendezvousConfig(etcd="http://e:1"), TORCHRUN).generation == 0


def test_a_job_in_another_step_or_job_has_another_name() -> None:
    jobs = {place(RendezvousConfig(), SRUN_1 | change).job for change in ({}, {"SLURM_JOB_ID": "78"}, {"SLURM_STEP_ID": "4"})}
    assert len(jobs) == 3


@pytest.mark.parametrize(
    ("environ", "rank", "message"),
    [
        ({"WORLD_SIZE": "4"}, -1, r"its rank \(RANK, .*torchrun or srun, or pass rank="),
        ({"RANK": "1"}, -1, r"its world_size \(WORLD_SIZE, .*or pass world_size="),
        (PLAIN | {"RANK": "one"}, -1, r"RANK='one' is no number.*its rank"),
        (PLAIN | {"WORLD_SIZE": "4.0"}, -1, r"WORLD_SIZE='4\.0' is no number"),
        (PLAIN | {"RANK": "4"}, -1, r"rank=4 is not in a world of 4: give ranks 0 to 3"),
        (PLAIN, 9, r"rank=9 is not in a world of 4"),
        (PLAIN | {"RANK": "-1"}, -1, r"rank=-1 is not in a world of 4"),
        ({"RANK": "1", "WORLD_SIZE": "4"}, -1, r"named this job: set rendezvous\.job, or LIGHTNING_GEMINI_JOB"),
        (PLAIN | {"MASTER_ADDR": "node0"}, -1, r"which hosts the 4 ranks run on: set rendezvous\.hosts .*in the order of their ranks"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}, -1, r"which hosts the 8 ranks run on: set rendezvous\.hosts .*LIGHTNING_GEMINI_HOSTS=a,b"),
        (PLAIN | {"LIGHTNING_GEMINI_START": "x"}, -1, r"LIGHTNING_GEMINI_START='x' is no number: .* count of restarts"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "5,3"}, -1, r"\[5, 3\] tasks on the nodes gpu\[07-08\]: use --ntasks-per-node"),
        (SRUN | {"SLURM_DISTRIBUTION": "cyclic:block"}, -1, r"SLURM_DISTRIBUTION='cyclic' .*--distribution=block"),
        (SRUN | {"SLURM_DISTRIBUTION": "plane"}, -1, r"SLURM_DISTRIBUTION='plane' .*--distribution=block"),
        (SRUN | {"SLURM_STEP_NODELIST": "gpu[7-"}, -1, r"host list 'gpu\[7-' cannot be read"),
        (SRUN | {"SLURM_STEP_NODELIST": ""}, -1, r"host list '' cannot be read.*rendezvous\.hosts"),
        (POD | {"HOSTNAME": "else-1"}, -1, r"'else-1' and has JOB_COMPLETION_INDEX=2"),
        (POD | {"HOSTNAME": "", "LIGHTNING_GEMINI_JOB": "j"}, -1, r"pod is called ''"),
        ({key: POD[key] for key in ("JOB_COMPLETION_INDEX", "HOSTNAME")}, -1, r"its world_size \(.*LIGHTNING_GEMINI_PODS\)"),
    ],
)
def test_what_is_missing_or_wrong_is_named(environ: Environ, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place(RendezvousConfig(), environ, rank, names=NAMES)


@pytest.mark.parametrize("distribution", ["block", "block:cyclic", "block,Pack", "unknown", "block:block:cyclic"])
def test_orders_that_fill_node_after_node(distribution: str) -> None:
    assert place(RendezvousConfig(), SRUN | {"SLURM_DISTRIBUTION": distribution}).hosts == ("gpu07", "gpu08")


def test_with_one_task_a_node_all_orders_are_one() -> None:
    """srun itself says "cyclic" then."""
    one = SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_DISTRIBUTION": "cyclic"}
    assert place(RendezvousConfig(), one) == Place("slurm-77.3", 1, 2, ("gpu07", "gpu08"), 0)


# ---- from a place to a roster


def test_one_node_needs_no_port() -> None:
    assert all(address.is_unix for candidates in place(RendezvousConfig(), SRUN_1).roster(None).addresses for address in candidates)


def test_ranks_are_spread_over_the_hosts_in_order() -> None:
    roster = place(RendezvousConfig(), SRUN).roster(2000)
    assert [candidates[0].host for candidates in roster.addresses] == ["gpu07"] * 4 + ["gpu08"] * 4
    assert {candidates[0].port for candidates in roster.addresses} == {2000, 2001, 2002, 2003}
    assert all(len(candidates) == CANDIDATES for candidates in roster.addresses)


def test_a_port_on_one_node_is_used() -> None:
    (first, *_), *_ = place(RendezvousConfig(port=2000), PLAIN).roster(2000).addresses
    assert (first.host, first.port) == ("127.0.0.1", 2000)
    (first, *_), *_ = place(RendezvousConfig(hosts=["::1"], port=2000), PLAIN).roster(2000).addresses
    assert (first.host, first.port) == ("::1", 2000)


def test_ranks_that_do_not_fit_the_hosts() -> None:
    with pytest.raises(ValueError, match=r"4 ranks cannot be spread evenly over the 3 hosts a, b, c.*rendezvous\.hosts"):
        place(RendezvousConfig(hosts=["a", "b", "c"]), PLAIN).roster(None)
