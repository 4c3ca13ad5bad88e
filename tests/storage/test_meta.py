"""What a rank says of a step: names, aliases, users' hooks, empty optimizers; and what it does not do: copy tensors or step optimizers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import msgspec
import pytest
import torch
from torch import nn

from lightning_gemini.compat import lightning as compat
from lightning_gemini.snapshot.slots import CorruptSnapshot, SlotFile
from lightning_gemini.storage import meta
from lightning_gemini.storage.description import Description, publish, published
from tests.storage.helpers import memfd
from tests.storage.lightning import Net, loader


class Fitted(pl.Callback):
    """Describes the first step."""

    def __init__(self) -> None:
        self.data = b""
        self.epoch = -1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.data = meta.describe(trainer)


def described(module: pl.LightningModule, *callbacks: pl.Callback) -> tuple[Description, pl.Trainer]:
    made = Fitted()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        callbacks=[made, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader())
    return msgspec.msgpack.decode(made.data, type=Description), trainer


def loaded(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def sources(description: Description) -> dict[str, str]:
    return {key.name: key.source for key in description.keys}


def test_names() -> None:
    found, _ = described(Net())
    names = sources(found)
    assert names["state_dict.first.weight"] == "param/first.weight"
    assert names["state_dict.again.weight"] == names["state_dict.last.weight"] == "param/last.weight", "a shared parameter"
    assert names["optimizer_0.state.last.weight.exp_avg"] == names["optimizer_states.0.state.last.weight.exp_avg"] == "optim/0/2/exp_avg"
    assert names["optimizer_0.param_groups.1.betas"] == names["optimizer_states.0.param_groups.1.betas"]
    body = [f"body.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    assert loaded(found.blobs[names["optimizer_0.param_groups.1.params"]]) == body
    buffers = {f"value/state_dict/norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert {value.source for value in found.tensors} == buffers
    trainer_state = loaded(found.meta)
    assert trainer_state["global_step"] == 1 and trainer_state["hyper_parameters"] == {"width": 10}
    assert not {"state_dict", "optimizer_states"} & trainer_state.keys()
    assert loaded(found.blobs[names["loops"]]) == trainer_state["loops"]


def test_lightning_says_the_same() -> None:
    """Its own checkpoint of this moment has these names and values, and no others."""
    module = Net()
    found, trainer = described(module)
    own = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    assert {name.removeprefix("state_dict.") for name in sources(found) if name.startswith("state_dict.")} == own["state_dict"].keys()
    assert set(sources(found)) >= own.keys() - {"state_dict", "optimizer_states"}
    assert {"lightning_module_state_dict", "optimizer_state"} & vars(trainer.strategy).keys() == set(), "nothing stays behind"


class Hooked(Net):
    """Drops a tensor, replaces one and adds values of its own."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]["fixed"]
        checkpoint["state_dict"]["norm.bias"] = torch.full((10,), 2.0)
        checkpoint["mine"] = {"tokens": 17}

    def get_extra_state(self) -> Any:
        return {"extra": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_hooks_of_users() -> None:
    found, _ = described(Hooked())
    names = sources(found)
    assert "state_dict.fixed" not in names
    assert names["state_dict.norm.bias"] == "value/state_dict/norm.bias"
    assert loaded(found.blobs[names["mine"]]) == {"tokens": 17} == loaded(found.meta)["mine"]
    assert loaded(found.blobs[names["state_dict._extra_state.extra"]]) == 3


class Stateless(Net):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.body.parameters(), lr=torch.tensor(0.5)), torch.optim.SGD(self.first.parameters(), lr=0.1)]

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


def test_optimizers_without_state() -> None:
    found, _ = described(Stateless())
    names = sources(found)
    assert loaded(found.blobs[names["optimizer_states.1.state"]]) == {}
    lr = next(value for value in found.tensors if value.source == names["optimizer_0.param_groups.0.lr"])
    assert (lr.dtype, lr.shape) == ("float32", ())


class Unpicklable(Net):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = lambda: None


def test_a_value_that_cannot_be_saved_is_named() -> None:
    with pytest.raises(ValueError, match="value/mine cannot be saved in a checkpoint"):
        described(Unpicklable())


def test_the_trainer_is_as_before() -> None:
    """Described or not, a job ends with the same bits."""

    class Counted(torch.optim.SGD):
        steps = 0

        def step(self, *args: Any, **options: Any) -> Any:
            Counted.steps += 1
            return super().step(*args, **options)

    class One(Net):
        def configure_optimizers(self) -> Any:
            return Counted(self.parameters(), lr=0.1, momentum=0.9)

    described(One())
    assert Counted.steps == 1


def test_names_of_wrappers_are_left_out() -> None:
    assert meta.clean("net._orig_mod.0._checkpoint_wrapped_module.weight") == "net.0.weight"
    plain = nn.Linear(2, 2)
    assert meta.names_of(nn.Sequential(plain)) == {id(plain.weight): "0.weight", id(plain.bias): "0.bias"}
    assert not meta.is_sharded(plain)


def test_publishing(tmp_path: Path) -> None:
    fd = memfd("description")
    assert published(fd, 1) is None
    file = SlotFile(fd)
    small, large = (msgspec.msgpack.encode(Description([], {"x": bytes(n)}, [], b"m")) for n in (10, 100_000))
    publish(file, 1, small)
    publish(file, 2, large)
    found = published(fd, 2)
    assert found is not None and len(found.blobs["x"]) == 100_000
    publish(file, 3, small)
    assert published(fd, 2) and published(fd, 3) and published(fd, 4) is None
    slot = file.find(3)
    assert slot is not None
    with file.payload(slot.place) as view:
        view[3] ^= 1
    with pytest.raises(CorruptSnapshot):
        published(fd, 3)
    file.close()


def test_lightnings_own_dump_is_whole() -> None:
    """`compat.dump_checkpoint` gives what it is given, and what Lightning adds."""
    _, trainer = described(Net())
    state, optimizers = {"x": torch.ones(1)}, [{"state": {}, "param_groups": []}]
    found = compat.dump_checkpoint(trainer, state, optimizers)
    assert found["state_dict"] is state and found["optimizer_states"] == optimizers
    assert {"epoch", "global_step", "loops", "callbacks", "lr_schedulers", "hyper_parameters", "pytorch-lightning_version"} <= found.keys()
