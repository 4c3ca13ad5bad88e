"""Any text as blocks of bytes for a language model, read through one memory-mapped cache file."""

import errno
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

FORMAT = 1  # part of the cache key; raise it when the content of a cache file changes meaning


class ByteBlocks(Dataset[tuple[Tensor, Tensor]]):
    """Map-style dataset over ``file[start:stop]``: item ``i`` is ``(x, y)``, two ``block_size`` runs of bytes, y one byte ahead.

    Blocks do not overlap (but for that one byte). With ``limit`` it holds that many blocks, spread evenly over the text.
    The file is mapped on first use in each process; a pickled dataset carries the path only.
    """

    def __init__(self, file: str, start: int, stop: int, block_size: int, limit: int | None = None) -> None:
        self.file, self.start, self.stop, self.block_size = file, start, stop, block_size
        self.blocks = (stop - start - 1) // block_size
        self.length = self.blocks if limit is None else min(limit, self.blocks)
        self._map: np.ndarray | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        if self._map is None:
            self._map = np.memmap(self.file, dtype=np.uint8, mode="r")
        at = self.start + index * self.blocks // self.length * self.block_size
        run = torch.from_numpy(self._map[at : at + self.block_size + 1].astype(np.int64))
        return run[:-1], run[1:]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}


class TextDataModule(L.LightningDataModule):
    """Bytes of text files, split by position into training and validation text.

    Args:
        path: ``None`` for the Python standard library's own sources, or a file, a glob (``**`` recurses), or a list of these.
        block_size: bytes of context per sample.
        batch_size: samples per rank and step.
        num_workers: of the data loaders.
        max_bytes: text beyond this is left out (files are taken in sorted order).
        val_fraction: the part at the end of the text that is kept for validation.
        samples_per_epoch: training samples of an epoch, over all ranks, spread over the whole text; ``None`` for all.
        cache_dir: where the cache file lives; ``None`` for a directory of this user under the system's temporary one.
    """

    def __init__(
        self,
        path: str | Sequence[str] | None = None,
        block_size: int = 128,
        batch_size: int = 4,
        num_workers: int = 0,
        max_bytes: int = 16_000_000,
        val_fraction: float = 0.05,
        samples_per_epoch: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        for key, value in (("block_size", block_size), ("batch_size", batch_size), ("max_bytes", max_bytes)):
            if value < 1:
                raise ValueError(f"data.{key}={value}: give a number of 1 or more")
        if num_workers < 0:
            raise ValueError(f"data.num_workers={num_workers}: give 0 (load in the training process) or more")
        if samples_per_epoch is not None and samples_per_epoch < 1:
            raise ValueError(f"data.samples_per_epoch={samples_per_epoch}: give a number of 1 or more, or null for all samples")
        if not 0 < val_fraction < 1:
            raise ValueError(
                f"data.val_fraction={val_fraction}: give a number between 0 and 1 (trainer.limit_val_batches=0 stops validation)"
            )
        self.path = path if path is None or isinstance(path, str) else list(path)
        self.block_size, self.batch_size, self.num_workers = block_size, batch_size, num_workers
        self.max_bytes, self.val_fraction, self.samples_per_epoch = max_bytes, val_fraction, samples_per_epoch
        self.cache_dir = cache_dir
        self.train_set: ByteBlocks | None = None
        self.val_set: ByteBlocks | None = None
        # Now, while there is one process: in prepare_data or setup the error would come from one rank amid the others' noise.
        self._cut(_listing(self.path, max_bytes)[1])
        _cache_dir(cache_dir)

    def prepare_data(self) -> None:
        cache_file(self.path, self.max_bytes, self.cache_dir)

    def setup(self, stage: str) -> None:
        # Not left to prepare_data alone: that runs in one process per node, maybe before this process existed.
        file = cache_file(self.path, self.max_bytes, self.cache_dir)
        size = os.path.getsize(file)
        cut = self._cut(size)
        self.train_set = ByteBlocks(file, 0, cut, self.block_size, self.samples_per_epoch)
        self.val_set = ByteBlocks(file, cut, size, self.block_size)

    def _cut(self, size: int) -> int:
        """Where the validation text begins; it has one block at least."""
        cut = size - max(int(size * self.val_fraction), self.block_size + 1)
        if cut <= self.block_size:
            raise ValueError(
                f"data.path={self.path!r}: {size} bytes of text are too few for one training and one validation block of "
                f"data.block_size={self.block_size}; give at least {2 * (self.block_size + 1)} bytes (data.path, data.max_bytes), "
                f"a smaller data.block_size, or a smaller data.val_fraction (now {self.val_fraction})"
            )
        return cut

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader(self.val_set, shuffle=False)

    def _loader(self, dataset: ByteBlocks | None, shuffle: bool) -> DataLoader[tuple[Tensor, Tensor]]:
        if dataset is None:
            raise RuntimeError("TextDataModule.setup() has not run; let the Trainer call it, or call it first")
        return DataLoader(dataset, self.batch_size, shuffle=shuffle, num_workers=self.num_workers, persistent_workers=self.num_workers > 0)


def source_files(path: str | Sequence[str] | None) -> list[str]:
    """The files that ``path`` means (see ``TextDataModule``), sorted within each entry, absolute, without repeats."""
    if path is None:
        files = []
        for root, dirs, names in os.walk(os.path.dirname(os.__file__)):
            dirs[:] = [d for d in dirs if d not in ("site-packages", "dist-packages", "__pycache__")]
            files += [os.path.join(root, name) for name in names if name.endswith(".py")]
        if not files:
            raise ValueError(
                "data.path=None: this Python has no .py sources of its standard library; set data.path to a text file or a glob"
            )
        return sorted(files)
    found: dict[str, None] = {}
    for entry in [path] if isinstance(path, str) else path:
        entry = os.path.abspath(os.path.expanduser(entry))
        if os.path.isdir(entry):
            raise ValueError(f"data.path={path!r}: {entry} is a directory; name its files by a glob, as in data.path='{entry}/**/*.txt'")
        matches = [entry] if os.path.isfile(entry) else sorted(f for f in glob.glob(entry, recursive=True) if os.path.isfile(f))
        if not matches:
            raise ValueError(
                f"data.path={path!r}: no file at {entry}; give an existing file, a glob, a list of files, or null for the Python sources"
            )
        found.update(dict.fromkeys(matches))
    if not found:
        raise ValueError(
            f"data.path={path!r}: the list is empty; give an existing file, a glob, a list of files, or null for the Python sources"
        )
    return list(found)


def cache_file(path: str | Sequence[str] | None, max_bytes: int, cache_dir: str | None = None) -> str:
    """The cache file with the first ``max_bytes`` bytes of ``path``'s files, written first where it does not exist.

    It is named by a hash of the files' paths, sizes and times, and appears by an atomic rename: any number of processes
    may call this at once, and none ever sees a part of a file.
    """
    listing, size = _listing(path, max_bytes)
    key = hashlib.sha256(json.dumps([FORMAT, max_bytes, listing]).encode()).hexdigest()[:32]
    file = os.path.join(_cache_dir(cache_dir), f"text-{key}.bin")
    if os.path.exists(file) and os.path.getsize(file) == size:  # a size can be wrong after a power failure
        return file
    fd, part = tempfile.mkstemp(prefix=f".text-{key}-", suffix=".part", dir=os.path.dirname(file))
    try:
        with open(fd, "wb") as out:
            for name, length, _ in listing:
                out.write(_read(name, min(length, max_bytes - out.tell())))
        os.replace(part, file)
    except BaseException:
        os.unlink(part)
        raise
    return file


def _listing(path: str | Sequence[str] | None, max_bytes: int) -> tuple[list[tuple[str, int, int]], int]:
    """The files that the first ``max_bytes`` bytes come from, as (path, size, time), and how many bytes these are."""
    listing = []
    total = 0
    for name in source_files(path):
        if total >= max_bytes:
            break
        stat = os.stat(name)
        listing.append((name, stat.st_size, stat.st_mtime_ns))
        total += stat.st_size
    return listing, min(total, max_bytes)


def _read(name: str, length: int) -> bytes:
    try:
        with open(name, "rb") as text:
            return text.read(length)
    except OSError as e:
        raise ValueError(f"data.path: cannot read {name} ({e.strerror}); make it readable, or leave it out of data.path") from e


def _cache_dir(cache_dir: str | None) -> str:
    directory = cache_dir or os.path.join(tempfile.gettempdir(), f"lightning_gemini_text_cache-{os.getuid()}")
    directory = os.path.abspath(os.path.expanduser(directory))
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as e:
        raise ValueError(f"data.cache_dir={cache_dir!r}: cannot write to {directory} ({e.strerror}); set it to a writable directory") from e
    if cache_dir is None and os.stat(directory).st_uid != os.getuid():
        raise ValueError(f"data.cache_dir=None: {directory} belongs to another user; set data.cache_dir to a directory of your own")
    return directory
