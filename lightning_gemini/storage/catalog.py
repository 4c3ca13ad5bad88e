"""Which checkpoints are at a URL, and which of them are kept.

Seam: `complete`, `newest`, `retain`, `discard`. A checkpoint counts when its `.metadata` is there, which is written last and removed
first: a half-written or half-removed one is never listed. Every attempt has a folder of its own, so that a process that wakes late harms
no other's.

What is never removed: the newest complete checkpoint, those in use, folders that are not ours, and files in ours that somebody else put
there. A reader outside of this job is not asked: locks at object stores do not hold, and a dead reader's would stay. It has read
`.metadata` before and fails with a missing file; it never gets wrong bytes. No torch here.
"""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

from lightning_gemini.storage.files import Folder
from lightning_gemini.storage.layout import FOLDER, FORMAT, METADATA, SUMMARY, Summary, decode, is_ours


class Checkpoint(NamedTuple):
    """A complete checkpoint."""

    step: int
    path: str
    """URL of its folder."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.path.rpartition("/")[2]


def _ours(folder: Folder) -> list[tuple[int, str]]:
    """(step, name) of the folders at a URL that we made, oldest first."""
    found = [(int(match[1]), name) for name in folder.folders() if (match := FOLDER.fullmatch(name))]
    return sorted((step, name) for step, name in found if folder.size(f"{name}/{FORMAT}") >= 0)


def complete(url: str) -> list[Checkpoint]:
    """All complete checkpoints at `url`, oldest step first. Raises `ValueError` for a URL that fsspec does not know, `OSError`."""
    folder = Folder(url)
    return [Checkpoint(step, f"{folder.url}/{name}") for step, name in _ours(folder) if folder.size(f"{name}/{METADATA}") > 0]


def newest(url: str) -> Checkpoint | None:
    """The complete checkpoint of the highest step."""
    return next(reversed(complete(url)), None)


def summary(path: str) -> Summary:
    """What a complete checkpoint is of. Raises `ValueError` when `path` is none of ours."""
    folder = Folder(path)
    try:
        if folder.size(METADATA) > 0:
            return decode(folder.read(SUMMARY), Summary, SUMMARY)
    except FileNotFoundError:
        pass
    raise ValueError(
        f"persistent.resume={path!r} is no complete checkpoint of lightning_gemini: give a folder step-<n>.* with a {METADATA}, or auto"
    )


def start(url: str, resume: str) -> Checkpoint | None:
    """The checkpoint that a job goes on from; None when it begins anew.

    Args:
        resume: auto (the newest), never, or a checkpoint's path.

    Raises:
        ValueError: `url` has checkpoints newer than the one to go on from. They are of another history: the next resume would take them.
    """
    last = newest(url)
    if resume == "auto":
        return last
    found = None if resume == "never" else Checkpoint(summary(resume).step, resume.rstrip("/"))
    if last is not None and (found is None or last.step > found.step):
        raise ValueError(
            f"persistent.resume={resume!r}, but persistent.url={url!r} has a newer checkpoint of step {last.step}, which the next "
            "resume would take: give another persistent.url, or auto"
        )
    return found


def chosen(checkpoints: list[Checkpoint], *, keep_last: int, keep_every_n_steps: int | None) -> set[str]:
    """Paths to keep: the last ones, and the first one of every n steps."""
    kept = {checkpoint.path for checkpoint in checkpoints[-max(1, keep_last) :]}
    spans: set[int] = set()
    for checkpoint in checkpoints if keep_every_n_steps else ():
        assert keep_every_n_steps
        span = checkpoint.step // keep_every_n_steps
        if span not in spans:
            spans.add(span)
            kept.add(checkpoint.path)
    return kept


def retain(url: str, *, keep_last: int, keep_every_n_steps: int | None = None, in_use: Container[str] = ()) -> list[str]:
    """Remove old checkpoints, and what attempts older than the newest complete one have left; returns the names."""
    checkpoints = complete(url)
    if not checkpoints:
        return []
    kept = chosen(checkpoints, keep_last=keep_last, keep_every_n_steps=keep_every_n_steps)
    folder, removed = Folder(url), []
    for step, name in _ours(folder):
        path = f"{folder.url}/{name}"
        if path not in kept and path not in in_use and step < checkpoints[-1].step:
            discard(path)
            removed.append(name)
    return removed


def discard(path: str) -> None:
    """Remove our files of a checkpoint, `.metadata` first and the sign that it is ours last; then its folder, if nothing else is in it."""
    folder = Folder(path)
    folder.remove(METADATA)
    for name in filter(is_ours, folder.files()):
        if name != FORMAT:
            folder.remove(name)
    folder.remove(FORMAT)
    folder.remove_folder("gemini")
    folder.remove_folder()
