"""The first batch of a replaced rank: from the loader process its predecessor left, or from a loader that starts anew.

Every clock runs in a process of its own, forked from one that has imported everything and drawn nothing; the text lies in the page cache.
Each round kills a rank in the middle of the epoch; four successors then get the same batch, which is compared bit by bit.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from benchmarks.data_throughput import Child, Feeders, mapped
from lightning_gemini.mapped.loader import MappedLoader

SAMPLES = 1_000_000
WORKERS = 2
_DIFFERENT = 50_000
_WORDS, _LENGTH, _LONGEST = 20_000, 12, 128
_VOCABULARY = 8_000
_SEED = 1
BATCH = 64
COLD, AGAIN, ONLY_WORKERS, READY = (
    "cold: data set + bare loader",
    "replaced rank: data set + mapped loader",
    "bare loader, data set is there",
    "replaced rank: mapped loader, data set is there",
)


def lines() -> list[str]:
    """Made-up text: words of a made-up language, the usual ones more often."""
    rng = np.random.default_rng(_SEED)
    letters = rng.integers(ord("a"), ord("z") + 1, (_WORDS, 9), dtype=np.uint8)
    words = [letters[i, : 3 + i % 7].tobytes().decode() for i in range(_WORDS)]
    chosen = np.minimum(rng.zipf(1.2, (_DIFFERENT, _LENGTH)), _WORDS) - 1
    return [" ".join(words[word] for word in line) for line in chosen]


def write(directory: Path) -> None:
    """The text, one sample a line, and what the tokenizer is read from."""
    text = lines()
    block = "".join(f"{line}\n" for line in text)
    with (directory / "text").open("w") as file:
        for _ in range(SAMPLES // _DIFFERENT):
            file.write(block)
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        (directory / "vocabulary").write_text("\n".join(sorted({word for line in text for word in line.split()})))
        return
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(text[:10_000], trainers.BpeTrainer(vocab_size=_VOCABULARY, show_progress=False))
    tokenizer.save(str(directory / "tokenizer.json"))


def load_tokenizer(directory: Path) -> Callable[[str], list[int]]:
    """From the file; without the package, a table of words."""
    if (directory / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        return lambda text: list(tokenizer.encode(text).ids)
    table = {word: i for i, word in enumerate((directory / "vocabulary").read_text().split("\n"))}
    return lambda text: [table[word] for word in text.split()]


class Text(Dataset[torch.Tensor]):
    """Lines of a file as tokens. Its index is made as fast as numpy can, not by a loop over the lines."""

    def __init__(self, directory: Path) -> None:
        self.tokenize = load_tokenizer(directory)
        self.text = np.memmap(directory / "text", np.uint8, "r")
        ends = np.flatnonzero(self.text == ord("\n"))
        starts = np.concatenate([[0], ends[:-1] + 1])
        order = np.random.default_rng(_SEED).permutation(len(ends))
        self.starts, self.ends = starts[order], ends[order]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> torch.Tensor:
        tokens = self.tokenize(self.text[self.starts[index] : self.ends[index]].tobytes().decode())[:_LONGEST]
        return torch.tensor(tokens + [0] * (_LONGEST - len(tokens)))


class _From:
    """A batch sampler without its first batches."""

    def __init__(self, sampler: Iterable[list[int]], skip: int) -> None:
        self.sampler, self.skip = sampler, skip

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(iter(self.sampler), self.skip, None)


def _digest(batch: torch.Tensor) -> str:
    return hashlib.sha256(batch.numpy().tobytes()).hexdigest()


def _bare(directory: Path, number: int, counted: bool) -> Callable[[Connection], None]:
    """A new loader that begins with batch `number`; `counted`: the clock also runs while the data set is built."""

    def body(talk: Connection) -> None:
        begun = time.perf_counter()
        data = Text(directory)
        begun = begun if counted else time.perf_counter()
        torch.manual_seed(_SEED)
        sampler: Any = _From(BatchSampler(RandomSampler(data), BATCH, drop_last=False), number)
        batches = iter(DataLoader(data, batch_sampler=sampler, num_workers=WORKERS))
        batch = next(batches)
        batch.sum()
        talk.send((time.perf_counter() - begun, _digest(batch)))

    return body


def _whole(directory: Path) -> DataLoader[torch.Tensor]:
    return DataLoader(Text(directory), batch_size=BATCH, shuffle=True, num_workers=WORKERS)


def _dying(directory: Path, name: str, number: int, feeders: Feeders) -> Callable[[Connection], None]:
    """A rank that has batch `number` in hand, has told so, and waits for its end."""

    def body(talk: Connection) -> None:
        torch.manual_seed(_SEED)
        loader = mapped(_whole(directory), name, feeders)
        for batch in itertools.islice(loader, number, number + 1):
            (directory / "position").write_bytes(pickle.dumps(loader.position()))
            talk.send(_digest(batch))
            time.sleep(60)

    return body


def _replacing(directory: Path, name: str, feeders: Feeders, counted: bool) -> Callable[[Connection], None]:
    def body(talk: Connection) -> None:
        begun = time.perf_counter()
        bare = _whole(directory)
        begun = begun if counted else time.perf_counter()
        loader: MappedLoader = mapped(bare, name, feeders)
        loader.begin_at(pickle.loads((directory / "position").read_bytes()))
        batch = next(iter(loader))
        batch.sum()
        talk.send((time.perf_counter() - begun, _digest(batch)))

    return body


def measure(directory: Path, number: int, rounds: int) -> dict[str, list[float]]:
    """Seconds until batch `number` of the epoch is there, by side; one rank is killed per round."""
    found: dict[str, list[float]] = {side: [] for side in (COLD, AGAIN, ONLY_WORKERS, READY)}
    for turn in range(rounds):
        with Feeders(os.getpid()) as feeders:
            name = f"bench-{uuid.uuid4().hex}/0"
            with Child(_dying(directory, name, number, feeders)) as dying:
                digest = dying.hear()
                time.sleep(0.5)  # its loader process gets ahead, as it does between two steps
                dying.kill()
            sides = {
                READY: _replacing(directory, name, feeders, counted=False),
                COLD: _bare(directory, number, counted=True),
                AGAIN: _replacing(directory, name, feeders, counted=True),
                ONLY_WORKERS: _bare(directory, number, counted=False),
            }
            for side in list(sides)[:: 1 if turn % 2 == 0 else -1]:
                with Child(sides[side]) as child:
                    seconds, seen = child.hear()
                if seen != digest:
                    raise AssertionError(f"{side}: another batch than the one of the rank that was killed")
                found[side].append(seconds)
            if len(feeders.pids()) != 1:
                raise AssertionError(f"{len(feeders.pids())} loader processes were started: no replaced rank was to start one")
    return found
