"""What the Strategy refuses when it is made, and before it starts a process."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("nemo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensor_parallel_size": 2}, "unknown key 'tensor_parallel_size'=2 for GeminiMegatronStrategy: .*tensor_model_parallel_size"),
        ({"persistent": {"url": "/checkpoints"}}, "persistent.url='/checkpoints' is not supported .*ModelCheckpoint"),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            "virtual_pipeline_model_parallel_size=2 .*set virtual_pipeline_model_parallel_size=null",
        ),
        ({"snapshot": {"every": 1}}, "snapshot.every"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    from lightning_gemini.nemo import GeminiMegatronStrategy

    with pytest.raises(ValueError, match=message):
        GeminiMegatronStrategy(**arguments)


def test_sizes_that_do_not_divide_the_world() -> None:
    import nemo.lightning as nl

    from lightning_gemini.nemo import GeminiMegatronStrategy

    strategy = GeminiMegatronStrategy(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with pytest.raises(ValueError, match="= 4 does not divide the world of 6 ranks"):
        nl.Trainer(accelerator="cpu", devices=6, strategy=strategy, logger=False, enable_checkpointing=False)
