"""Jobs whose batches are mapped: each sample is trained on exactly as without faults, and as with Lightning's own DDP and loaders.

A replaced rank attaches to the loader process of its predecessor; where that has died too, another one is started at the position.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_gemini import GeminiFSDP2Strategy, GeminiStrategy, use_mapped_data
from tests.lightning import recipes
from tests.lightning.recipes import WORLD, Streaming, Struck, trainer
from tests.lightning.sabotage import Saboteur, Strike, struck
from tests.support.jobs import Recorder, Result, run_job, same
from tests.support.models import Net
from tests.support.plain import run_plain

Recipe = Callable[..., None]


class Batches(Recorder):
    """Records each batch's hash in place of its loss."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        data = b"".join(part.numpy().tobytes() for part in batch)
        self.losses[f"{trainer.current_epoch}/{batch_idx}"] = hashlib.sha256(data).hexdigest()


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Draws from the global generators of the process that reads."""

    def __len__(self) -> int:
        return 72

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.rand(16, generator=torch.Generator().manual_seed(index)) + torch.rand(16) / 100
        return x, x.sum(0, keepdim=True).sin()


class Plain(Augmented):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.rand(16, generator=torch.Generator().manual_seed(index))
        return x, x.sum(0, keepdim=True).sin()


class Counting(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Shuffles by an epoch that it counts itself."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.epoch += 1
        for index in torch.randperm(24, generator=torch.Generator().manual_seed(self.epoch)).tolist():
            x = torch.rand(16, generator=torch.Generator().manual_seed(index))
            yield x, x.sum(0, keepdim=True).sin()


class Broken(Plain):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == 17:
            raise LookupError("sample 17 is broken")
        return super().__getitem__(index)


def with_data(data: Dataset[Any], workers: int, **settings: Any) -> Recipe:
    def recipe(directory: Path, strategy: Any, *strikes: Strike) -> None:
        train = DataLoader(data, batch_size=3, shuffle=not isinstance(data, IterableDataset), num_workers=workers)
        pl_trainer = trainer(directory, strategy, Batches(str(directory)), **settings)
        pl_trainer.callbacks = [c for c in pl_trainer.callbacks if type(c) is not Recorder]  # type: ignore[attr-defined]
        pl_trainer.fit(Struck(Saboteur(directory, strikes)), train)

    return recipe


def streaming(workers: int) -> Recipe:
    def recipe(directory: Path, strategy: Any, *strikes: Strike) -> None:
        trainer(directory, strategy).fit(Streaming(Saboteur(directory, strikes), workers))

    return recipe


RECIPES: dict[str, Recipe] = {
    "shuffled": with_data(Plain(), 0),
    "accumulated": with_data(Plain(), 2, accumulate_grad_batches=3),
    "augmented in workers": with_data(Augmented(), 2),
    "augmented": with_data(Augmented(), 0),
    "streaming": streaming(0),
    "streaming with workers": streaming(2),
    "counting": with_data(Counting(), 0),
    "everything": recipes.accumulating,
}
NOT_AS_BARE = {"augmented", "streaming", "everything"}
"""Data that draws in the main process for each sample: it no longer mixes with the draws of training."""
PLACES = {"forward", "backward", "optimizer", "after_step", "before_step", "callback"}


def job(recipe: Recipe, directory: Path, *faults: Strike, during: Callable[[int], None] | None = None, **options: Any) -> Result:
    configured: list[Any] = [{"kind": f.kind, "rank": f.rank, "step": f.count, "where": f.where} for f in faults if f.where in PLACES]
    strikes = [fault for fault in faults if fault.where not in PLACES]

    def target() -> None:
        use_mapped_data(**options)
        recipe(directory, GeminiStrategy(faults=configured), *strikes)

    result = run_job(directory, target, WORLD, during=during)
    assert result.injected + struck(directory) == len(faults), result.output[-6000:]
    assert not still_there(result), "loader processes are left behind"
    return result


def loaders(result: Result) -> list[int]:
    """Process ids of the loader processes of a job."""
    return [event["loader_pid"] for event in result.agent_events if event["event"] == "loader_started"]


def still_there(result: Result) -> list[int]:
    return [pid for pid in loaders(result) if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


class Undisturbed:
    """Runs without faults, once per recipe; equal to Lightning's own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._done: dict[str, Result] = {}

    def __call__(self, name: str) -> Result:
        if name not in self._done:
            plain = self.directory / f"{name}-plain"
            result = job(RECIPES[name], self.directory / name)
            assert len(loaders(result)) == 2 * WORLD, "one per rank and epoch"
            if name not in NOT_AS_BARE:
                same(run_plain(plain, lambda: RECIPES[name](plain, DDPStrategy()), WORLD), result)
            self._done[name] = result
        return self._done[name]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    yield Undisturbed(tmp_path_factory.mktemp("undisturbed"))


CASES = [
    ("shuffled", Strike("training", 1, 3)),
    ("shuffled", Strike("training", 0, 7)),  # the last batch but one of the epoch
    ("shuffled", Strike("after_step", 2, 7)),  # between the epochs
    ("shuffled", Strike("training", 1, 4, "raise")),
    ("shuffled", Strike("before_step", 1, 0, "raise")),
    ("accumulated", Strike("training", 1, 5)),
    ("accumulated", Strike("training", 1, 4, "raise")),
    ("augmented in workers", Strike("training", 1, 5)),
    ("augmented in workers", Strike("callback", 1, 5, "raise")),
    ("augmented", Strike("training", 1, 5)),
    ("augmented", Strike("optimizer", 0, 6, "raise")),
    ("streaming", Strike("training", 1, 4)),
    ("streaming", Strike("after_step", 1, 4, "raise")),
    ("streaming with workers", Strike("training", 0, 10)),
    ("counting", Strike("training", 1, 5)),
    ("counting", Strike("training", 1, 10)),
    ("everything", Strike("validation", 2, 1)),
    ("everything", Strike("training", 1, 3)),
]
IDS = [f"{name}-{fault.kind}-{fault.where}{fault.count}-rank{fault.rank}".replace(" ", "_") for name, fault in CASES]


@pytest.mark.parametrize(("name", "fault"), CASES, ids=IDS)
def test_fault(tmp_path: Path, undisturbed: Undisturbed, name: str, fault: Strike) -> None:
    expected = undisturbed(name)
    result = job(RECIPES[name], tmp_path, fault)
    same(expected, result)
    assert len(result.recoveries) == 1
    assert len(loaders(result)) == len(loaders(expected)), "the replaced rank did not read from its predecessor's loader process"


class Slow(pl.LightningDataModule):
    """Tells when its set-up is done, and by which process."""

    def __init__(self, directory: Path, setups: int) -> None:
        super().__init__()
        self.directory, self.setups = directory, setups

    def setup(self, stage: str) -> None:
        with open(self.directory / "setups", "a") as file:
            file.write(f"{os.getpid()} {time.monotonic()} {torch.rand(()).item()}\n")

    def train_dataloader(self) -> Any:
        deadline = time.monotonic() + 60
        while len((self.directory / "setups").read_text().splitlines()) < self.setups:  # training begins when the spare is there
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return DataLoader(Plain(), batch_size=3, shuffle=True)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_spare_sets_its_data_up_ahead(tmp_path: Path, ahead: bool) -> None:
    """Once, with the generators of every other rank, and before the rank dies whose place it takes."""

    def recipe(directory: Path, strategy: Any, *strikes: Strike) -> None:
        pl_trainer = trainer(directory, strategy, Batches(str(directory)))
        pl_trainer.callbacks = [c for c in pl_trainer.callbacks if type(c) is not Recorder]  # type: ignore[attr-defined]
        pl_trainer.fit(Struck(Saboteur(directory, strikes)), datamodule=Slow(directory, WORLD + ahead))

    result = job(recipe, tmp_path / "struck", Strike("training", 1, 5), setup_ahead=ahead)
    same(job(recipe, tmp_path / "whole", setup_ahead=ahead), result)
    setups = [line.split() for line in (result.directory / "setups").read_text().splitlines()]
    spare = str(result.pids()[1][-1])
    mine = [(float(when), drawn) for pid, when, drawn in setups if pid == spare]
    assert len(mine) == 1 and len({drawn for _, _, drawn in setups}) == 1
    death = (result.directory / "struck-0").stat().st_mtime - time.time() + time.monotonic()
    assert (mine[0][0] < death) is ahead


def kill_loader(directory: Path, which: int) -> Callable[[int], None]:
    """SIGKILL for the loader process that is started as number `which`, and its workers, when the job has got to it."""

    def during(agent: int) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = loaders(Result(directory, 0, "", {})) if (directory / "gemini" / "agent.jsonl").exists() else []
            if len(found) > which:
                (directory / "loader-killed").touch()
                os.killpg(found[which], signal.SIGKILL)
                return
            time.sleep(0.001)

    return during


@pytest.mark.parametrize("name", ["shuffled", "augmented in workers", "augmented", "streaming with workers", "counting"])
@pytest.mark.parametrize("which", [1, 4])
def test_a_loader_process_that_dies_is_replaced(tmp_path: Path, undisturbed: Undisturbed, name: str, which: int) -> None:
    """No rank dies of it, and no sample is lost or seen twice."""
    result = job(RECIPES[name], tmp_path, during=kill_loader(tmp_path, which), prefetch_length=1)
    same(undisturbed(name), result)
    assert (tmp_path / "loader-killed").exists() and not result.recoveries
    assert len(loaders(result)) == 2 * WORLD + 1


@pytest.mark.parametrize("name", ["shuffled", "augmented in workers", "augmented"])
def test_rank_and_loader_process_die_together(tmp_path: Path, undisturbed: Undisturbed, name: str) -> None:
    """As when a node is replaced: nothing is left but the position in the snapshot."""

    def both(directory: Path, strategy: Any, *strikes: Strike) -> None:
        class KillAll(pl.Callback):
            def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
                marker = directory / "killed"
                if trainer.global_rank == 1 and trainer.global_step == 5 and not marker.exists():
                    marker.touch()
                    for pid in loaders(Result(directory, 0, "", {})):
                        if psutil.pid_exists(pid):
                            os.killpg(pid, signal.SIGKILL)
                    os.kill(os.getpid(), signal.SIGKILL)

        original = pl.Trainer.__init__
        pl.Trainer.__init__ = lambda self, *a, callbacks=(), **k: original(self, *a, callbacks=[*callbacks, KillAll()], **k)  # type: ignore[method-assign]
        RECIPES[name](directory, strategy, *strikes)

    result = job(both, tmp_path)
    same(undisturbed(name), result)
    assert (tmp_path / "killed").exists() and len(result.recoveries) == 1
    assert len(loaders(result)) > 2 * WORLD


def test_loaders_that_are_made_anew_each_epoch(tmp_path: Path) -> None:
    """Those of the epochs before do not pile up."""

    class Watched(Batches):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.global_rank == 0 and trainer.current_epoch == 4:
                (tmp_path / "alive").write_text(str(len(still_there(Result(tmp_path, 0, "", {})))))

    def recipe(directory: Path, strategy: Any, *strikes: Strike) -> None:
        pl_trainer = trainer(directory, strategy, Watched(str(directory)), max_epochs=5, reload_dataloaders_every_n_epochs=1)
        pl_trainer.fit(Struck(Saboteur(directory, strikes)), datamodule=Slow(directory, 0))

    result = job(recipe, tmp_path)
    assert result.exit_status == 0 and len(loaders(result)) == 5 * WORLD
    assert int((tmp_path / "alive").read_text()) <= 2 * WORLD


def test_what_is_older_than_the_window_is_made_again(tmp_path: Path, undisturbed: Undisturbed) -> None:
    result = job(RECIPES["accumulated"], tmp_path, Strike("training", 1, 5), lookback_length=0, prefetch_length=2)
    same(undisturbed("accumulated"), result)
    assert len(result.recoveries) == 1


def test_an_error_in_the_data_is_the_user_s_own(tmp_path: Path) -> None:
    """It names the sample, also from a worker, and is never an early end of the epoch."""
    for workers in (0, 2):
        directory = tmp_path / str(workers)
        result = job(with_data(Broken(), workers), directory)
        assert result.exit_status == 1
        assert "LookupError" in result.output and "sample 17 is broken" in result.output and "in sample 17 of Broken" in result.output


def test_nothing_stays_behind_when_the_agent_is_killed(tmp_path: Path) -> None:
    recipe = with_data(Plain(), 2, max_epochs=1000)
    seen: list[int] = []

    def kill_agent(agent: int) -> None:
        deadline = time.monotonic() + 60
        while len(seen) < WORLD and time.monotonic() < deadline:
            seen[:] = loaders(Result(tmp_path, 0, "", {})) if (tmp_path / "gemini" / "agent.jsonl").exists() else []
            time.sleep(0.01)
        groups = [psutil.Process(pid) for pid in seen]
        workers = [child for process in groups for child in process.children(recursive=True)]
        os.kill(agent, signal.SIGKILL)
        gone, alive = psutil.wait_procs([*groups, *workers], timeout=10)
        assert not alive and len(gone) >= WORLD

    run_job(tmp_path, lambda: (use_mapped_data(), recipe(tmp_path, GeminiStrategy())), WORLD, during=kill_agent)  # type: ignore[arg-type, func-returns-value]
    assert len(seen) >= WORLD


def tensor_parallel(directory: Path, faults: list[Any]) -> None:
    """Two ranks, one data-parallel replica: they read the same data. (The model is not split: that is not the point here.)"""
    pl.seed_everything(1)
    use_mapped_data()
    pl_trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=GeminiFSDP2Strategy(data_parallel_size=1, tensor_parallel_size=2, faults=faults),
        max_epochs=2, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, logger=False,
        default_root_dir=str(directory), callbacks=[Batches(str(directory))], num_sanity_val_steps=0,
    )  # fmt: skip
    pl_trainer.fit(Net(), DataLoader(Plain(), batch_size=6, shuffle=True))


def test_ranks_that_read_the_same_data_share_a_loader_process(tmp_path: Path) -> None:
    expected = run_job(tmp_path / "a", lambda: tensor_parallel(tmp_path / "a", []), 2)
    assert expected.exit_status == 0, expected.output[-4000:]
    assert len(loaders(expected)) == 2, "one per epoch"
    assert expected.ranks[0]["losses"] == expected.ranks[1]["losses"] and len(expected.ranks[0]["losses"]) == 24
    fault = [{"kind": "kill", "rank": 1, "step": 5, "where": "forward"}]
    result = run_job(tmp_path / "b", lambda: tensor_parallel(tmp_path / "b", fault), 2)
    same(expected, result)
    assert len(loaders(result)) == 2 and result.injected == 1 and len(result.recoveries) == 1
