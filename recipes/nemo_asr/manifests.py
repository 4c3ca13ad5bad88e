"""NeMo's manifests: the check that all recordings are there.

A manifest has a JSON object a line: ``audio_filepath`` (absolute, or relative to the manifest's folder), ``duration`` in seconds, ``text``.
NeMo opens a recording when a batch needs it, hours into a training perhaps; `CheckManifests` looks before any process is started.
"""

import json
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

_KEYS = ("audio_filepath", "duration", "text")


def check(key: str, manifest: str) -> None:
    """Raise `ValueError` with the key, the value and the remedy unless the manifest and its recordings are there."""
    path = Path(manifest)
    where = f"{key}={manifest!r}"
    if not path.is_file():
        raise ValueError(f"{where}: there is no such file; make one with python recipes/nemo_asr/prepare.py, or give data.manifest=")
    missing, count = [], 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        count += 1
        recording = _recording(path, number, line, where)
        if not recording.is_file():
            missing.append(str(recording))
    if not count:
        raise ValueError(f"{where}: it has no entry; give a manifest with one JSON object a line ({', '.join(_KEYS)})")
    if missing:
        raise ValueError(
            f"{where}: {len(missing)} of {count} recordings are missing, the first is {missing[0]!r}; correct audio_filepath, "
            "or make the manifest anew"
        )


def _recording(manifest: Path, number: int, line: str, where: str) -> Path:
    try:
        entry = json.loads(line)
        lacking = [name for name in _KEYS if name not in entry]
    except (ValueError, TypeError):
        raise ValueError(f"{where}: line {number} is not a JSON object; write one a line, with {', '.join(_KEYS)}") from None
    if lacking:
        raise ValueError(f"{where}: line {number} has no {lacking[0]!r}; each line needs {', '.join(_KEYS)}")
    return manifest.parent / str(entry["audio_filepath"])  # an absolute path stays as it is


class CheckManifests(Callback):
    """Hydra calls it before the script's function, in the process that the user starts too."""

    def on_job_start(self, config: DictConfig, **_: object) -> None:
        """Check the manifests of the model's data sets."""
        try:
            for part in ("train_ds", "validation_ds"):
                for manifest in _manifests(config, part):
                    check(f"model.{part}.manifest_filepath", manifest)
        except ValueError as error:
            raise SystemExit(f"nemo_asr: {error}") from None  # Hydra turns any other exception of a callback into a warning


def _manifests(config: DictConfig, part: str) -> list[str]:
    """NeMo takes one, several separated by commas, or a list; those of tarred data sets name no files."""
    options = config.model.get(part) or {}
    if options.get("is_tarred"):
        return []
    found = options.get("manifest_filepath")
    if OmegaConf.is_list(found):
        return [str(manifest) for manifest in found]
    return [manifest for manifest in str(found or "").split(",") if manifest]
