"""NeMo 3 is imported once, in the parent from which all ranks are forked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "nemo_asr"
SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")

pytest.importorskip("nemo.collections.asr.models", reason="NeMo 3 is not installed: make test-nemo does that")


@pytest.fixture(scope="session")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the prepared manifests."""
    if not SOUNDS.is_dir():
        reason = "there are no recordings: apt-get install asterisk-core-sounds-en-wav"
        pytest.fail(reason) if "CI" in os.environ else pytest.skip(reason)
    folder = tmp_path_factory.mktemp("manifests")
    subprocess.run([sys.executable, str(RECIPE / "prepare.py"), "--out", str(folder)], check=True, capture_output=True, timeout=60)
    return folder
