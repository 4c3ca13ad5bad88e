"""Two runs of NeMo, bit by bit, from what `exp_manager` has left: ``python recipes/nemo_asr/compare.py RUN RUN``.

A run is a folder under which one ``*-last.ckpt`` and event files of TensorBoard lie. Compared are weights, buffers, the optimizer's state
and each value that was logged at each step (loss, WER, learning rate). Exit status 0 only if all are equal.
"""

import hashlib
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

_APART = ("timing", "gemini/")
"""Parts of tags: the clock, and what a recovery took."""


@dataclass
class Run:
    """What a run left: digests of the last checkpoint, and ``(tag, step) -> bits`` of the values that were logged."""

    step: int
    weights: str
    optimizer: str
    logged: dict[tuple[str, int], set[str]] = field(default_factory=dict)

    def tags(self) -> list[str]:
        """What was logged."""
        return sorted({tag for tag, _ in self.logged})

    def value(self, tag: str) -> float:
        """The last value of a tag."""
        step = max(step for name, step in self.logged if name == tag)
        return struct.unpack(">f", bytes.fromhex(min(self.logged[tag, step])))[0]


def read(folder: Path) -> Run:
    """Raises `ValueError` unless there is one last checkpoint."""
    found = sorted(folder.rglob("*-last.ckpt"))
    if len(found) != 1:
        raise ValueError(f"{str(folder)!r} has {len(found)} files *-last.ckpt, not one: give the folder of one run that has ended")
    checkpoint = torch.load(found[0], map_location="cpu", weights_only=False)
    run = Run(checkpoint["global_step"], digest(checkpoint["state_dict"]), digest(checkpoint["optimizer_states"]))
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        _add_logged(run, file)
    return run


def _add_logged(run: Run, file: Path) -> None:
    """A rank that took over wrote a file of its own; a step that both have logged must have the same values in both."""
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            if value.HasField("tensor") and not any(part in value.tag for part in _APART):
                array = make_ndarray(value.tensor)
                if array.dtype.kind == "f":
                    run.logged.setdefault((value.tag, event.step), set()).add(array.astype(">f4").tobytes().hex())


def digest(value: Any) -> str:
    """SHA-256 of nested containers of tensors and scalars: the order of a dict's keys does not count."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        sha.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            sha.update(f"{key!r}:".encode())
            _feed(sha, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(sha, item)
    else:
        sha.update(f"{value!r};".encode())


def verdict(first: Run, second: Run) -> dict[str, bool]:
    """What is equal."""
    return {
        f"both made {first.step} steps": first.step == second.step,
        "weights and buffers": first.weights == second.weights,
        "the optimizer's state": first.optimizer == second.optimizer,
        f"each of {len(first.logged)} logged values ({', '.join(first.tags())})": first.logged == second.logged,
    }


def main() -> int:
    """Exit status."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        found = verdict(*(read(Path(folder)) for folder in sys.argv[1:]))
    except ValueError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    for name, equal in found.items():
        print(f"{'equal' if equal else 'DIFFERENT':9}  {name}")
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
