"""NeMo is imported when it is asked for, and not before; where it cannot be, one error says what to install."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_gemini.nemo import versions

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environ)


def test_nothing_of_nemo_is_imported_unasked() -> None:
    code = "import sys, lightning_gemini, lightning_gemini.nemo.checks; assert not {'nemo', 'megatron'} & {*sys.modules}"
    done = run(code)
    assert done.returncode == 0, done.stderr


def distribution(directory: Path, name: str, version: str, *modules: str) -> None:
    """An installed distribution, as far as its metadata and empty modules go."""
    info = directory / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for module in modules:
        package = directory / Path(*module.split("."))
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")


@pytest.mark.parametrize(
    ("toolkit", "lightning", "modules", "message"),
    [
        ("3.0.0", "2.5.6", ("nemo",), "nemo_toolkit 3.0 has no MegatronStrategy"),
        ("2.5.3", "2.5.6", ("nemo", "nemo.lightning"), "NeMo 2.x needs lightning<=2.4.0, and lightning 2.5 is installed"),
    ],
)
def test_versions_that_do_not_go_together(tmp_path: Path, toolkit: str, lightning: str, modules: tuple[str, ...], message: str) -> None:
    """The metadata found first counts."""
    distribution(tmp_path, "nemo_toolkit", toolkit, *modules)
    distribution(tmp_path, "lightning", lightning)
    done = run("import lightning_gemini.nemo as n; n.GeminiMegatronStrategy", tmp_path)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1] and "lightning_gemini[nemo-llm]" in done.stderr.splitlines()[-1]


def test_without_nemo() -> None:
    try:
        importlib.metadata.version("nemo_toolkit")
    except importlib.metadata.PackageNotFoundError:
        with pytest.raises(ImportError, match=r"nemo_toolkit is not installed: pip install 'lightning_gemini\[nemo-llm\]'"):
            versions.require_nemo()
    else:
        pytest.skip("NeMo is installed")
