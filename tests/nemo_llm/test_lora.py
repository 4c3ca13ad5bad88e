"""NeMo's LoRA under Megatron: what a step streams, where the frozen base of a replaced rank comes from (faults: `test_tiny_llama`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nemo_llm.jobs import job, memory_of
from tests.support.jobs import same

pytestmark = [pytest.mark.usefixtures("nemo"), pytest.mark.timeout(300)]

LORA = {"lora": True}


def test_the_base_comes_from_a_live_replica_where_the_replacement_has_another(tmp_path: Path) -> None:
    """Of two data parallel ranks one is replaced; only adapters are in the snapshots."""
    undisturbed = job(tmp_path / "undisturbed", 2, {}, LORA)
    fault = {"kind": "kill", "rank": 1, "step": 3, "where": "backward"}
    result = job(tmp_path / "lost", 2, {}, LORA, faults=[fault], spare_model={"init_method_std": 0.5})
    same(undisturbed, result)
    assert result.injected == 1
    found = [memory_of(result, rank) for rank in range(2)]
    assert found[0]["base"] == found[1]["base"] and any("linear_qkv" in name for name in found[0]["base"])
    parameters = {name for each in found for name in each["owned"] if name.startswith("param/")}
    assert parameters and all(".adapter." in name for name in parameters)
    assert found[0]["received"] == 0 < found[1]["received"]


def test_a_base_that_nobody_else_has_must_be_built_alike(tmp_path: Path) -> None:
    fault = {"kind": "kill", "rank": 1, "step": 3, "where": "backward"}
    result = job(tmp_path, 2, {"tensor_model_parallel_size": 2}, LORA, faults=[fault], spare_model={"init_method_std": 0.5})
    assert result.exit_status != 0
    assert "frozen parameters differ from what they were at the first step, and no live rank can give them" in result.output
