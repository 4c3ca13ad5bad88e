"""A checkpoint in the middle of an epoch, with any strategy: mapped data goes on with the next batch, and with the same random numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn.functional import dropout
from torch.utils.data import DataLoader, IterableDataset

from lightning_gemini import GeminiStrategy, MMapDataModule
from tests.lightning.test_mapped import Augmented, Batches, Plain
from tests.support.jobs import Result, run_job
from tests.support.plain import run_plain

EPOCHS, STEPS = 3, 6
"""Steps of an epoch, of each rank."""


class Words(IterableDataset[Any]):
    """Nested batches with strings and None; no length."""

    def __iter__(self) -> Iterator[Any]:
        for number in range(STEPS):
            yield {"x": torch.rand(4, 16), "of": [f"sample {number}", None], "pair": (torch.tensor(number), number)}


class Model(pl.LightningModule):
    """Draws from the generators in each step, as dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(16, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = batch["words"]["x"] if isinstance(batch, dict) else batch[0]
        return dropout(self.net(x), 0.5).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Module(pl.LightningDataModule):
    """A user's own, with validation and a state of its own."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.workers, self.calls = workers, 0

    def setup(self, stage: str) -> None:
        self.data = Augmented()

    def train_dataloader(self) -> Any:
        self.calls += 1
        return DataLoader(self.data, batch_size=6, shuffle=True, num_workers=self.workers)

    def val_dataloader(self) -> Any:
        return validation()

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}


def validation() -> DataLoader[Any]:
    """With a generator of its own: Lightning does not repeat a validation that followed the checkpoint, and each draws a number."""
    return DataLoader(Plain(), batch_size=36, generator=torch.Generator())


def combined() -> CombinedLoader:
    """A map-style loader and a stream, side by side."""
    return CombinedLoader({"plain": DataLoader(Plain(), batch_size=6, shuffle=True), "words": DataLoader(Words(), batch_size=None)})


class Seen(Batches):
    """Records what arrived, whatever it is. (A checkpoint has rank 0's records, also for rank 1.)"""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses[f"{trainer.current_epoch}/{batch_idx}"] = repr(batch) + f" {float(outputs['loss']).hex()}"


DATA: dict[str, tuple[Callable[[], Any], int]] = {
    "data module": (lambda: MMapDataModule(Module(0)), 2),
    "with workers": (lambda: MMapDataModule(Module(2)), 2),
    "combined": (lambda: MMapDataModule(combined(), validation()), 1),
}


def train(directory: Path, make: Callable[[], Any], world: int, resume: Path | None, strategy: Any, **settings: Any) -> None:
    torch.set_printoptions(precision=10)
    logging.getLogger("lightning_gemini").addHandler(logging.FileHandler(directory / "log"))
    pl.seed_everything(1)
    if resume is not None:
        torch.rand(100)  # the generators of a new process are somewhere else altogether
    keep = ModelCheckpoint(str(directory / "ckpt"), filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, max_epochs=EPOCHS, logger=False, callbacks=[Seen(str(directory)), keep],
        default_root_dir=str(directory), enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **settings,
    )  # fmt: skip
    trainer.fit(Model(), datamodule=make(), ckpt_path=None if resume is None else str(resume))


@pytest.fixture(scope="module", params=DATA)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Result]:
    """An uninterrupted run, with a checkpoint after every step."""
    directory = tmp_path_factory.mktemp("whole")
    make, world = DATA[request.param]
    strategy = DDPStrategy() if world > 1 else "auto"
    result = run_plain(directory, lambda: train(directory, make, world, None, strategy, val_check_interval=3), world)
    assert result.exit_status == 0, result.output[-4000:]
    return request.param, result


@pytest.mark.parametrize("step", [1, 3, 5, 6, 8, 12, 17])
def test_every_sample_once(tmp_path: Path, whole: tuple[str, Result], step: int) -> None:
    """In the middle of an epoch, after a validation in its middle, and at its end; all epochs that follow too."""
    name, expected = whole
    make, world = DATA[name]
    checkpoint = expected.directory / "ckpt" / f"step={step}.ckpt"
    strategy = DDPStrategy() if world > 1 else "auto"
    result = run_plain(tmp_path, lambda: train(tmp_path, make, world, checkpoint, strategy, val_check_interval=3), world)
    assert result.exit_status == 0, result.output[-4000:]
    for rank in range(world):
        first, second = expected.ranks[rank], result.ranks[rank]
        assert len(first["losses"]) == EPOCHS * STEPS
        assert list(second["losses"].items())[step:] == list(first["losses"].items())[step:]
        assert (first["params"], first["rng"], first["steps"]) == (second["params"], second["rng"], second["steps"])


@pytest.mark.parametrize(("kind", "where"), [("kill", "forward"), ("kill", "before_step"), ("raise", "before_step")])
def test_with_our_strategy_too(tmp_path: Path, kind: str, where: str) -> None:
    """The job is resumed in mid-epoch, then a rank dies in it: in its first step, or before that."""

    def run(name: str, resume: Path | None, *faults: Any) -> Result:
        directory = tmp_path / name
        strategy = [{"kind": kind, "rank": 1, "step": step, "where": where} for step in faults]
        make = DATA["with workers"][0]
        result = run_job(directory, lambda: train(directory, make, 2, resume, GeminiStrategy(faults=strategy)), 2)  # type: ignore[arg-type]
        assert result.exit_status == 0 and result.injected == len(faults) == len(result.recoveries), result.output[-4000:]
        return result

    expected = run("whole", None)
    resumed = run("resumed", expected.directory / "ckpt" / "step=4.ckpt", 4, 9)
    for rank in range(2):
        found, wanted = (list(result.ranks[rank]["losses"].items())[4:] for result in (resumed, expected))
        assert found == wanted and len(found) == EPOCHS * STEPS - 4
        assert resumed.ranks[rank]["params"] == expected.ranks[rank]["params"]


def test_another_number_of_ranks(tmp_path: Path, whole: tuple[str, Result]) -> None:
    """In the middle of an epoch it is refused, at its end it goes on."""
    name, expected = whole
    make, world = DATA[name]
    other = 3 - world
    refused = f"was saved in the middle of an epoch by {world} ranks, this job has {other}: resume it with {world}"
    at_end = refused if name == "combined" else None  # a stream: that its sixth batch was the last is known only later
    for step, message in {4: refused, 6: at_end}.items():
        directory, checkpoint = tmp_path / str(step), expected.directory / "ckpt" / f"step={step}.ckpt"
        strategy = DDPStrategy() if other > 1 else "auto"
        result = run_plain(directory, lambda d=directory, c=checkpoint, s=strategy: train(d, make, other, c, s), other)  # type: ignore[misc]
        assert (result.exit_status == 0) == (message is None), result.output[-4000:]
        assert message is None or message in result.output


def test_a_checkpoint_without_mapped_data(tmp_path: Path) -> None:
    """Its place in the epoch is lost, as without us; Lightning, which would say so, takes our loader for one that knows it."""
    said = {}
    for step in (4, 6):
        bare = run_plain(tmp_path / "bare", lambda: train(tmp_path / "bare", lambda: Module(0), 2, None, DDPStrategy()), 2)
        assert bare.exit_status == 0, bare.output[-4000:]
        checkpoint, directory = tmp_path / "bare" / "ckpt" / f"step={step}.ckpt", tmp_path / f"mapped{step}"
        result = run_plain(directory, lambda d=directory, c=checkpoint: train(d, DATA["data module"][0], 2, c, DDPStrategy()), 2)  # type: ignore[misc]
        assert result.exit_status == 0, result.output[-4000:]
        said[step] = (directory / "log").read_text().count("after batch 4 of its epoch, was saved without mapped data")
    assert said == {4: 2, 6: 0}
