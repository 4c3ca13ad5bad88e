"""The launch files: scripts are run, with a real torchrun; manifests are read as controllers read them. All must tell a node its place.

Slurm and Kubernetes are not here: `srun` is a script that starts a step's tasks with Slurm's variables, and the environment of a pod is
made as the Job controller and the kubelet make it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_gemini.agent.cluster import Cluster, cluster
from tests.support.meeting import free_port

LAUNCH = Path(__file__).resolve().parents[2] / "recipes" / "launch"
WITH_VALUE = {"--nnodes", "--nproc-per-node", "--node-rank", "--job", "--etcd", "--host", "--domain", "--token-file"}
FLAGS = {"--spare"}
URLS = "http://etcd0:2379,http://etcd1:2379"

RECORDER = f"""#!{sys.executable}
import json, os, sys
json.dump([sys.argv[1:], dict(os.environ)], open(os.environ["RECORDS"] + "/" + str(os.getpid()), "w"))
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> "$RECORDS.srun"; shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES=$SLURM_JOB_NUM_NODES SLURM_STEP_NUM_TASKS=$SLURM_JOB_NUM_NODES SLURM_LOCALID=0
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node SLURM_PROCID=$node SLURM_TOPOLOGY_ADDR=core.rack$((node % 2)).n$node "$@"
done
"""


def place(arguments: list[str], environ: dict[str, str]) -> Cluster:
    """What `lightning-gemini run` makes of a command line that a launch file has composed; options that it does not know fail."""
    assert arguments[0] == "run"
    options: dict[str, str] = {}
    rest = arguments[1:]
    while rest[0].startswith("--"):
        key, equals, value = rest.pop(0).partition("=")
        assert key in WITH_VALUE | FLAGS, f"{key} is no option of run"
        options[key] = value if equals or key in FLAGS else rest.pop(0)
    nodes = options["--nnodes"]
    assert rest[:3] == ["train.py", "strategy=gemini", f"trainer.num_nodes={nodes}"]
    assert options["--etcd"].startswith("http://") and "$" not in " ".join(arguments)
    assert environ["LIGHTNING_GEMINI_TOKEN"]
    return cluster(
        environ,
        nnodes=int(nodes),
        nproc_per_node=int(options["--nproc-per-node"]),
        job=options.get("--job"),
        host=options.get("--host"),
        domain=options.get("--domain"),
    )


# ---- scripts


@pytest.fixture
def tools(tmp_path: Path) -> dict[str, str]:
    """An environment whose `lightning-gemini` writes down how it was called, and whose `srun` starts it."""
    for name, text in (("lightning-gemini", RECORDER), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "records").mkdir()
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(tmp_path), "RECORDS": str(tmp_path / "records"), "ETCD_ENDPOINTS": URLS}


def recorded(tools: dict[str, str]) -> list[Cluster]:
    calls = [json.loads(path.read_text()) for path in Path(tools["RECORDS"]).iterdir()]
    assert len({environ["LIGHTNING_GEMINI_TOKEN"] for _, environ in calls}) == 1
    assert all(arguments[-1] == "trainer.max_steps=7" for arguments, _ in calls), "overrides are handed on"
    return sorted((place(arguments, environ) for arguments, environ in calls), key=lambda found: found.node_rank)


SCRIPTS = ["slurm.sbatch", "torchrun.sh"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_valid(name: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True, timeout=20)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_say_what_is_missing(name: str, tools: dict[str, str]) -> None:
    env = {key: value for key, value in tools.items() if key != "ETCD_ENDPOINTS"}
    env |= {"NODES": "2", "RANKS": "4", "NODE_RANK": "0", "MASTER_ADDR": "localhost"}
    done = subprocess.run(["bash", str(LAUNCH / name)], env=env, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode and "ETCD_ENDPOINTS" in done.stderr and not list(Path(tools["RECORDS"]).iterdir())


def batch_options() -> dict[str, str]:
    """The #SBATCH lines."""
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    return dict(lines)


def test_slurm(tools: dict[str, str]) -> None:
    options = batch_options()
    assert options["ntasks-per-node"] == "1" and "no-kill" in options
    env = tools | {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": options["nodes"], "SLURM_NNODES": options["nodes"]}
    env |= {"SLURM_GPUS_ON_NODE": options["gpus-per-node"], "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.switch.node"}
    subprocess.run(["bash", str(LAUNCH / "slurm.sbatch"), "trainer.max_steps=7"], env=env, check=True, timeout=20)
    nodes = int(options["nodes"]) - 1
    found = recorded(tools)
    assert [node.node_rank for node in found] == [-1, *range(nodes)], "all nodes of the world, and a spare"
    assert {(node.nnodes, node.ranks_per_node, node.job) for node in found} == {(nodes, 8, "slurm-77.0")}
    assert {node.domain for node in found} == {"rack0", "rack1"}
    assert {"--no-kill", "--kill-on-bad-exit=0", "--wait=0"} <= set(Path(tools["RECORDS"] + ".srun").read_text().split())


def test_slurm_tells_the_token_to_nobody_else(tools: dict[str, str]) -> None:
    """Made anew for each job, or the one that was given."""
    env = tools | {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    for given in ({}, {}, {"LIGHTNING_GEMINI_TOKEN": "mine"}):
        subprocess.run(["bash", str(LAUNCH / "slurm.sbatch")], env=env | given, check=True, timeout=20)
    calls = [json.loads(path.read_text()) for path in Path(tools["RECORDS"]).iterdir()]
    tokens = {environ["LIGHTNING_GEMINI_TOKEN"] for _, environ in calls}
    assert len(tokens) == 3 and "mine" in tokens and len(min(tokens - {"mine"}, key=len)) == 64
    assert not any(token in " ".join(arguments) for arguments, _ in calls for token in tokens)


def test_torchrun(tools: dict[str, str]) -> None:
    env = tools | {"NODES": "1", "SPARES": "1", "RANKS": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env |= {"LIGHTNING_GEMINI_TOKEN": "secret", "LIGHTNING_GEMINI_DOMAIN": "rack3", "JOB": "mine"}
    line = ["bash", str(LAUNCH / "torchrun.sh"), "trainer.max_steps=7"]
    started = [subprocess.Popen(line, env=env | {"NODE_RANK": str(node)}) for node in range(2)]
    try:
        assert [process.wait(timeout=50) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert recorded(tools) == [Cluster(nnodes=1, node_rank=node, ranks_per_node=4, job="mine", domain="rack3") for node in (-1, 0)]


# ---- manifests


def manifests(name: str) -> dict[str, dict[str, Any]]:
    """The documents of a file, by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all((LAUNCH / name).read_text())}


def jobset() -> dict[str, Any]:
    return manifests("jobset.yaml")["JobSet"]["spec"]


def trainjob() -> dict[str, Any]:
    """The spec of the JobSet that Kubeflow Trainer makes of the two documents."""
    files = manifests("trainjob.yaml")
    runtime, job = files["TrainingRuntime"], files["TrainJob"]["spec"]
    assert job["runtimeRef"] == {"apiGroup": "trainer.kubeflow.org", "kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    assert set(runtime["spec"]["mlPolicy"]) == {"numNodes"}, "no policy that puts another launcher's variables into the environment"
    spec = runtime["spec"]["template"]["spec"]
    (replicated,) = spec["replicatedJobs"]
    template = replicated["template"]
    assert template["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    (container,) = template["spec"]["template"]["spec"]["containers"]
    assert container["name"] == replicated["name"] == "node", "the names by which Trainer finds what to fill in"
    trainer = job["trainer"]
    container |= {"command": trainer["command"], "args": trainer["args"], "resources": trainer["resourcesPerNode"]}
    template["spec"] |= {"completions": trainer["numNodes"], "parallelism": trainer["numNodes"]}
    return spec | {"replicatedJobs": [replicated | {"replicas": 1}]}


def pod(job: dict[str, Any], index: int, labels: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of a pod's container: downward API, secret, and `$(NAME)` expanded, as the kubelet does."""
    (container,) = job["template"]["spec"]["containers"]
    fields = {f"metadata.labels['{key}']": value for key, value in labels.items()} | {"status.podIP": f"10.1.0.{index}"}
    environ = {"JOB_COMPLETION_INDEX": str(index), "HOSTNAME": f"train-x7k2p-workers-0-{index}"}
    for entry in container["env"]:
        source = entry.get("valueFrom", {})
        assert len(source) == ("value" not in entry)
        if "fieldRef" in source:
            environ[entry["name"]] = fields.get(source["fieldRef"]["fieldPath"], "")
        else:
            environ[entry["name"]] = "secret" if "secretKeyRef" in source else entry["value"]
    arguments = [re.sub(r"\$\((\w+)\)", lambda found: environ[found[1]], argument) for argument in container["args"]]
    assert container["command"] == ["lightning-gemini"]
    return arguments, environ


KINDS = {"jobset.yaml": jobset, "trainjob.yaml": trainjob}


@pytest.fixture(params=KINDS)
def job(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The spec of the only Job."""
    spec = KINDS[request.param]()
    (replicated,) = spec["replicatedJobs"]
    assert replicated["replicas"] == 1, "indexes of several Jobs would be the same"
    assert spec["failurePolicy"]["maxRestarts"] == 0
    found: dict[str, Any] = replicated["template"]["spec"]
    return found


def test_versions() -> None:
    assert manifests("jobset.yaml")["JobSet"]["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert {document["apiVersion"] for document in manifests("trainjob.yaml").values()} == {"trainer.kubeflow.org/v1alpha1"}


def test_pods_know_their_places(job: dict[str, Any]) -> None:
    labels = {"batch.kubernetes.io/controller-uid": "7f0e", "topology.kubernetes.io/zone": "zone-b"}
    found = [place(*pod(job, index, labels)) for index in range(job["completions"])]
    nodes = job["completions"] - 1
    assert [node.node_rank for node in found] == [*range(nodes), -1], "all nodes of the world, and a spare"
    assert {(node.nnodes, node.ranks_per_node, node.job, node.domain) for node in found} == {(nodes, 8, "7f0e", "zone-b")}
    assert [node.host for node in found] == [f"10.1.0.{index}" for index in range(nodes + 1)]
    assert place(*pod(job, 0, {"batch.kubernetes.io/controller-uid": "7f0e"})).domain == "", "a cluster without such labels"


def test_the_job_outlives_a_node(job: dict[str, Any]) -> None:
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
    assert job["backoffLimit"] >= 10
    pod_spec = job["template"]["spec"]
    assert pod_spec["restartPolicy"] == "Never", "Kubernetes takes a podFailurePolicy with no other"
    assert pod_spec["terminationGracePeriodSeconds"] > 30
    ignore, fail = job["podFailurePolicy"]["rules"]
    assert (ignore["action"], ignore["onPodConditions"]) == ("Ignore", [{"type": "DisruptionTarget"}])
    replaced = fail["onExitCodes"]["values"]
    assert (fail["action"], fail["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert {128 + 9, 128 + 15} <= set(replaced) and min(replaced) > 128
    assert replaced == sorted(set(replaced)), "Kubernetes wants them sorted"


def test_the_job_ends_without_its_spare() -> None:
    (replicated,) = jobset()["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert spec["successPolicy"]["rules"] == [{"succeededCount": spec["completions"] - 1}]


def test_memory_is_reserved(job: dict[str, Any]) -> None:
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == 8 and "memory" in container["resources"]["limits"]


def test_no_secret_is_in_a_file(job: dict[str, Any]) -> None:
    (container,) = job["template"]["spec"]["containers"]
    (token,) = [entry for entry in container["env"] if entry["name"] == "LIGHTNING_GEMINI_TOKEN"]
    assert set(token["valueFrom"]) == {"secretKeyRef"}


def test_commands_of_the_guide_have_known_options_only() -> None:
    guide = (LAUNCH / "README.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"lightning-gemini run (.*) train\.py", guide)
    assert set(re.findall(r"--[a-z-]+", line)) <= WITH_VALUE | FLAGS
    assert {path.name for path in LAUNCH.iterdir()} - {"README.md"} == set(re.findall(r"^\| .*? \| `(.*?)`", guide, re.MULTILINE))
