"""Loggers' private corners: a replaced rank 0 goes on in its predecessor's folder, and no row of a CSVLogger is lost or written twice.

CSVLogger keeps rows in memory until it flushes, which a killed process takes with it; a new one opens the next `version_N`, or deletes
`metrics.csv` where it is given the same. So the rows in memory and the number of rows in the file belong to a boundary.
Other loggers get the version only: they append, and a row after the boundary may be there twice.
"""

from __future__ import annotations

import csv
import os
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.loggers import CSVLogger


def versions(trainer: pl.Trainer) -> list[Any]:
    """The version of each logger's folder."""
    return [getattr(logger, "version", None) for logger in trainer.loggers]


def continue_versions(loggers: list[Any], versions_: list[Any]) -> None:
    """Make loggers that have not opened their folder yet use these versions. Call it before anything asks them for their folder."""
    for logger, version in zip(loggers, versions_, strict=False):
        if version is not None and getattr(logger, "_version", version) != version:
            logger._version = version
        if isinstance(logger, CSVLogger) and logger._experiment is None:
            _open_keeping_rows(logger)


def _open_keeping_rows(logger: CSVLogger) -> None:
    check = _ExperimentWriter._check_log_dir_exists  # deletes what is there
    _ExperimentWriter._check_log_dir_exists = lambda self: None  # type: ignore[method-assign]
    try:
        _ = logger.experiment
    finally:
        _ExperimentWriter._check_log_dir_exists = check  # type: ignore[method-assign]


class Rows:
    """The rows of one Trainer's CSVLoggers."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        self._counted: dict[str, tuple[int, int]] = {}
        """path -> (bytes, rows)."""

    def _writers(self) -> list[_ExperimentWriter]:
        """Of rank 0; other ranks have none."""
        return [logger._experiment for logger in self._loggers if logger._experiment is not None]

    def capture(self) -> list[tuple[int, list[dict[str, Any]], list[str]]]:
        """Rows in the file, rows in memory, names of the columns, of each."""
        return [(self._rows(writer.metrics_file_path), list(writer.metrics), list(writer.metrics_keys)) for writer in self._writers()]

    def _rows(self, path: str) -> int:
        if not os.path.isfile(path):
            return 0
        size = os.path.getsize(path)
        if self._counted.get(path, (-1, 0))[0] != size:
            with open(path, "rb") as file:
                self._counted[path] = size, sum(1 for _ in file) - 1
        return self._counted[path][1]

    def restore(self, saved: list[tuple[int, list[dict[str, Any]], list[str]]]) -> None:
        """Drop rows that were written since, which will be written again, and put back those that were in memory."""
        for writer, (rows, metrics, keys) in zip(self._writers(), saved, strict=False):
            writer.metrics, writer.metrics_keys = list(metrics), list(keys)
            path = writer.metrics_file_path
            if os.path.isfile(path) and rows == 0:
                os.remove(path)
            elif rows:
                with open(path, "r+b") as file:
                    header = file.readline()
                    for _ in range(rows):
                        file.readline()
                    file.truncate(file.tell())
                writer.metrics_keys = next(csv.reader([header.decode()]))  # rows written since may have added columns
