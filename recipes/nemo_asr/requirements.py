"""What the recipe needs is there, in the versions that work together; imported for that check alone.

NeMo fails in its own way, deep in an import, where it is missing or Lightning is of a version that it does not know: here it is one
message, before any process is started.
"""

from importlib.metadata import PackageNotFoundError, version

_REMEDY = "make venv-nemo, or pip install -c constraints-nemo.txt 'lightning_gemini[nemo]'"


def problem() -> str | None:
    """What is wrong with the installed packages, with the remedy; None if nothing is."""
    try:
        nemo = version("nemo_toolkit")
    except PackageNotFoundError:
        return f"NeMo (nemo_toolkit) is not installed: {_REMEDY}"
    if not nemo.startswith("3."):
        return f"nemo_toolkit {nemo} is installed, and this recipe is for 3.x: {_REMEDY}; for language models see recipes/nemo_llm"
    lightning = version("lightning")
    if not (2, 4) <= _release(lightning) < (2, 6):
        return f"lightning {lightning} does not work with nemo_toolkit {nemo}, which needs lightning>=2.4,<2.6: {_REMEDY}"
    return None


def _release(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


if (_found := problem()) is not None:
    raise SystemExit(f"nemo_asr: {_found}")
