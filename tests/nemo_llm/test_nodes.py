"""A node is lost under Megatron, with all that it had in memory: a spare node takes its ranks, bit-identical to the undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.multinode.models import Saboteur, Strike
from tests.nemo_llm.jobs import job, run
from tests.support.cluster import on_nodes
from tests.support.etcd import Etcd

pytestmark = [pytest.mark.usefixtures("nemo"), pytest.mark.timeout(300)]

TP = {"tensor_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("nodes", "per_node", "strategy", "model"),
    [
        (2, 1, {}, {}),
        (2, 1, TP, {}),
        (2, 1, {}, {"distributed": True}),
        (2, 1, {}, {"lora": True}),
        (2, 2, TP, {"distributed": True}),
    ],
    ids=["dp", "tp", "dp-distributed", "dp-lora", "tp-in-dp-across-distributed"],
)
def test_a_node_is_lost(tmp_path: Path, etcd: Etcd, nodes: int, per_node: int, strategy: dict[str, Any], model: dict[str, Any]) -> None:
    expected = job(tmp_path / "undisturbed", nodes * per_node, strategy, model)
    assert expected.exit_status == 0, expected.output
    directory = tmp_path / f"job-{tmp_path.name}"
    given = {**strategy, "replication": {"when_behind": "wait"}}  # else step 3 may have no snapshot
    saboteur = Saboteur(directory, (Strike("before_step", nodes * per_node - 1, 3, kept=True),))
    running = on_nodes(
        directory,
        [etcd.url],
        lambda: run(directory, per_node, given, model, num_nodes=nodes, callbacks=[saboteur]),
        nodes,
        per_node,
        spares=1,
    )
    try:
        running.wait(150.0)
    finally:
        running.stop()
    assert (directory / "struck-0").exists() and len(running.recoveries) == 1, running.outputs()
    for rank, record in expected.ranks.items():
        assert all(record[key] == running.ranks[rank][key] for key in record.keys() - {"pid", "objects"}), running.outputs()
