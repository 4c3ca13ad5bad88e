"""Which NeMo this works with, asked before anything of it is imported.

Failure: `ImportError` with the remedy.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

INSTALL = "pip install 'lightning_gemini[nemo-llm]' (docs/nemo_llm.md says which versions go together)"
_LIGHTNING = (2, 4)
"""The newest series that NeMo 2.x works with: it pins lightning<=2.4.0."""


def _version(distribution: str) -> tuple[int, ...] | None:
    try:
        text = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def require_nemo() -> None:
    """Raise `ImportError` where NeMo's language models cannot be imported."""
    nemo, lightning = _version("nemo_toolkit"), _version("lightning")
    if nemo is None or importlib.util.find_spec("nemo") is None:
        raise ImportError(f"lightning_gemini.nemo needs NeMo 2.x, and nemo_toolkit is not installed: {INSTALL}")
    if nemo[0] != 2 or importlib.util.find_spec("nemo.lightning") is None:
        raise ImportError(
            f"lightning_gemini.nemo needs NeMo 2.x, and nemo_toolkit {'.'.join(map(str, nemo))} has no MegatronStrategy: {INSTALL}; "
            "NeMo 3 (speech) takes strategy='gemini'"
        )
    if lightning is not None and lightning > _LIGHTNING:
        raise ImportError(f"NeMo 2.x needs lightning<=2.4.0, and lightning {'.'.join(map(str, lightning))} is installed: {INSTALL}")
    if importlib.util.find_spec("megatron") is None:
        raise ImportError(f"lightning_gemini.nemo needs megatron-core, which is not installed: {INSTALL}")
