"""A storage process in a fork of pytest, which has torch imported. In a folder with a file `storage-is-slow` it does nothing at first."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lightning_gemini.agent.spawn import ForkSpawner
from lightning_gemini.storage.process import ENVIRONMENT
from lightning_gemini.storage.writer import serve

SLOW = "storage-is-slow"
_LIMIT_S = 10.0


def _run() -> None:
    deadline = time.monotonic() + _LIMIT_S
    while Path(SLOW).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    serve(os.environ[ENVIRONMENT])


storage_process = ForkSpawner(_run)
