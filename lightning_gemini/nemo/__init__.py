"""NeMo 2.x language models: the Strategy over NeMo's `MegatronStrategy`. Nothing of NeMo is imported before it is asked for.

Seam: `GeminiMegatronStrategy`; `Parallel` and `require_runnable` answer without NeMo, before any process is started. Failure: NeMo is
missing, has no language models any more (3.x), or came with another Lightning -> one `ImportError` that names the extra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gemini.nemo.strategy import GeminiMegatronStrategy

__all__ = ["GeminiMegatronStrategy"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_gemini.nemo.versions import require_nemo

    require_nemo()
    from lightning_gemini.nemo.strategy import GeminiMegatronStrategy

    return GeminiMegatronStrategy
