"""Each private attribute of Lightning and torch that we touch is there in the installed versions; if not, its name is the error."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.loggers import csv_logs
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops import fetchers
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.strategies.launchers import launcher
from lightning.pytorch.trainer.connectors import signal_connector
from lightning.pytorch.trainer.connectors.logger_connector import result
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from lightning_gemini.compat.torch import OBJECT_BROADCASTS

PACKAGE = Path(__file__).parents[2] / "lightning_gemini"
VERSIONS = f"lightning {lightning.__version__}, torch {torch.__version__}"
SINCE = {name: (2, 5) for name in ("_loaded_from_state_dict", "_resuming_from_checkpoint", "_restart_stage")}
"""Lightning before that has nothing to disarm there."""
PRIVATE = re.compile(r"_[A-Za-z]\w*")


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).mean()
        self.log("loss", loss)
        return loss

    validation_step = training_step  # type: ignore[assignment]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pl.Trainer]:
    with pytest.warns(UserWarning):
        made = pl.Trainer(
            max_steps=2,
            accelerator="cpu",
            devices=1,
            logger=CSVLogger(tmp_path_factory.mktemp("logs")),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = torch.utils.data.DataLoader(torch.ones(4, 2))
        made.fit(Module(), data, data)
    yield made


def logged(trainer: pl.Trainer) -> Any:
    results = result._ResultCollection(training=True)
    results.log("training_step", "loss", torch.ones(()))
    return results["training_step.loss"]


Find = Callable[[pl.Trainer], Any]
# name -> where it must be. On a class where an instance would need a job.
LIGHTNING: dict[str, list[Find]] = {
    "_BaseProgress": [lambda t: importlib.import_module("lightning.pytorch.loops.progress")],
    "_Loop": [lambda t: importlib.import_module("lightning.pytorch.loops.loop")],
    "_callback_metrics": [lambda t: t._logger_connector],
    "_logged_metrics": [lambda t: t._logger_connector],
    "_progress_bar_metrics": [lambda t: t._logger_connector],
    "_first_loop_iter": [lambda t: t._logger_connector],
    "_current_fx": [lambda t: t._logger_connector],
    "_current_fx_name": [lambda t: t.lightning_module],
    "_DataLoaderIterDataFetcher": [lambda t: fetchers],
    "_batch_idx": [lambda t: fetchers._DataLoaderIterDataFetcher()],
    "_dataloader_idx": [lambda t: fetchers._DataLoaderIterDataFetcher()],
    "_logger_connector": [lambda t: t],
    "_signal_connector": [lambda t: t],
    "_HandlersCompose": [lambda t: signal_connector],
    "_checkpoint_connector": [lambda t: t],
    "_data_fetcher": [lambda t: t.fit_loop],
    "_combined_loader": [lambda t: t.fit_loop],
    "_has_run": [lambda t: t.fit_loop.epoch_loop.val_loop],
    "_results": [lambda t: t.fit_loop.epoch_loop, lambda t: t.fit_loop.epoch_loop.val_loop],
    "_should_accumulate": [lambda t: t.fit_loop.epoch_loop],
    "_batches_that_stepped": [lambda t: t.fit_loop.epoch_loop],
    "_should_check_val_fx": [lambda t: t.fit_loop.epoch_loop],
    "_restarting": [lambda t: t.fit_loop, lambda t: t.fit_loop.epoch_loop],
    "_loaded_from_state_dict": [lambda t: t.fit_loop],
    "_resuming_from_checkpoint": [lambda t: t.fit_loop],
    "_restart_stage": [lambda t: t.fit_loop, lambda t: t.fit_loop.epoch_loop, lambda t: t.fit_loop.epoch_loop.val_loop],
    "_result": [lambda t: Closure(lambda: ClosureResult(None))],
    "_version": [lambda t: t.logger],
    "_experiment": [lambda t: t.logger],
    "_ExperimentWriter": [lambda t: csv_logs],
    "_check_log_dir_exists": [lambda t: csv_logs._ExperimentWriter],
    "_per_optimizer_states": [lambda t: torch.amp.GradScaler("cpu")],
    "_ResultMetric": [lambda t: result],
    "_Metadata": [lambda t: result],
    "_Sync": [lambda t: result],
    "_sync": [lambda t: logged(t).meta],
    "_should": [lambda t: logged(t).meta.sync],
    "_op": [lambda t: logged(t).meta.sync],
    "_group": [lambda t: logged(t).meta.sync],
    "_forward_cache": [logged],
    "_computed": [logged],
    "_update_count": [logged],
}
TORCH: dict[str, list[Find]] = {
    "_StorageInfo": [lambda t: importlib.import_module("torch.distributed.checkpoint.filesystem")],
    "_rebuild_buckets": [lambda t: dist.Reducer],
    "_get_fsdp_state": [lambda t: FSDPModule],
    "_share_fd_cpu_": [lambda t: torch.UntypedStorage],
    "_buffers": [lambda t: nn.Module()],
    "_non_persistent_buffers_set": [lambda t: nn.Module()],
    "_is_root": [lambda t: importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_state").FSDPState()],
}
# not underscored, but undocumented, or newer than the oldest version that we name
UNDOCUMENTED: dict[str, list[Find]] = {
    "dump_checkpoint": [lambda t: t._checkpoint_connector],
    "FsspecReader": [lambda t: importlib.import_module("torch.distributed.checkpoint._fsspec_filesystem")],
    "prepare_for_backward": [lambda t: dist.Reducer],
    "reset_iter_state": [lambda t: FSDPModule],
    "reshard": [lambda t: FSDPModule],
    "received_sigterm": [lambda t: t._signal_connector],
    "signal_handlers": [lambda t: signal_connector._HandlersCompose([])],
    "teardown": [lambda t: t._signal_connector, lambda t: fetchers._DataFetcher],
    "on_save_checkpoint": [lambda t: t.fit_loop.epoch_loop],
    "on_load_checkpoint": [lambda t: t.fit_loop.epoch_loop],
    "batch_progress": [lambda t: t.fit_loop.epoch_loop],
    "epoch_progress": [lambda t: t.fit_loop],
    "increment_completed": [lambda t: t.fit_loop.epoch_progress, lambda t: t.fit_loop.epoch_loop.batch_progress],
    "increment_processed": [lambda t: t.fit_loop.epoch_progress],
    "batch_size": [lambda t: t.fit_loop.epoch_loop._results],
    "dataloader_idx": [lambda t: t.fit_loop.epoch_loop._results],
    "_Launcher": [lambda t: launcher],
    "_configure_launcher": [lambda t: pl.strategies.DDPStrategy],
    "_ddp_kwargs": [lambda t: pl.strategies.DDPStrategy()],
    "cumulated_batch_size": [logged],
    "has_reset": [logged],
    "_Options": [lambda t: dist.ProcessGroupGloo],
    "_timeout": [lambda t: dist.ProcessGroupGloo._Options()],
    "_devices": [lambda t: dist.ProcessGroupGloo._Options()],
    "_set_default_timeout": [lambda t: dist.ProcessGroupGloo],
    "create_device": [lambda t: dist.ProcessGroupGloo],
    "AllgatherOptions": [lambda t: dist.distributed_c10d],
    "_version": [lambda t: torch.ones(1)],
}


def touched(path: Path) -> set[str]:
    """Private names of others in a source: attributes of anything but `self`, names in strings, and imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
    return {name for name in found if PRIVATE.fullmatch(name)}


def test_every_private_name_in_compat_is_in_a_table() -> None:
    """Those of Megatron are in `tests/nemo_llm`, where it is installed."""
    found = set().union(*(touched(path) for path in (PACKAGE / "compat").glob("*.py") if path.stem != "megatron"))
    assert found == {*LIGHTNING, *TORCH}, "compat has changed: say where the attribute must be"


def skip_before(name: str) -> None:
    if tuple(map(int, lightning.__version__.split(".")[:2])) < SINCE.get(name, (0, 0)):
        pytest.skip(f"Lightning has {name} since {SINCE[name]}")


@pytest.mark.parametrize("name", [*LIGHTNING, *TORCH])
def test_private_attributes_exist(trainer: pl.Trainer, name: str) -> None:
    skip_before(name)
    for find in LIGHTNING.get(name) or TORCH[name]:
        holder = find(trainer)
        assert hasattr(holder, name), f"{name} is not an attribute of {holder!r} in {VERSIONS}"


@pytest.mark.parametrize("name", UNDOCUMENTED)
def test_undocumented_attributes_exist(trainer: pl.Trainer, name: str) -> None:
    skip_before(name)
    for find in UNDOCUMENTED[name]:
        holder = find(trainer)
        assert hasattr(holder, name), f"{name} is not an attribute of {holder!r} in {VERSIONS}"


def test_what_is_read_ahead_of_a_stream_is_in_the_fetcher() -> None:
    assert fetchers._PrefetchDataFetcher().batches == []


def test_the_reducer_of_ddp_is_the_class_that_is_checked() -> None:
    source = inspect.getsource(DistributedDataParallel)
    assert "self.reducer = dist.Reducer(" in source
    for flag in ("require_forward_param_sync", "require_backward_grad_sync"):
        assert f"self.{flag} = " in source, flag


def test_broadcasts_of_objects_are_as_many_as_are_replayed() -> None:
    source = inspect.getsource(dist.broadcast_object_list)
    assert len(re.findall(r"^    broadcast\(", source, re.MULTILINE)) == source.count(" broadcast(") == OBJECT_BROADCASTS
    assert "if my_group_rank != group_src:" in source, "the sender gets what was sent too"
