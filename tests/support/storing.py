"""A storage process in a fork of pytest, which has torch imported."""

from __future__ import annotations

import os

from lightning_gemini.agent.spawn import ForkSpawner
from lightning_gemini.storage.process import ENVIRONMENT
from lightning_gemini.storage.writer import serve

storage_process = ForkSpawner(lambda: serve(os.environ[ENVIRONMENT]))
