"""The versions this package is tested with; others may work, and are named at start.

Seam: `untested()`. Why it matters: recovery in place goes through corners of Lightning that have no public way (`compat`).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

TESTED = {"lightning": ("2.4.0", "2.5.6", "2.6.6"), "nemo_toolkit": ("2.5.3", "3.0.0")}
"""Distribution -> versions that the tests run with (`make test`, `make test-versions`, `make test-nemo`)."""


def untested() -> list[str]:
    """A sentence for each installed distribution of another version."""
    told = []
    for name, tested in TESTED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if found not in tested:
            told.append(f"lightning_gemini is tested with {name} {', '.join(tested)}, this is {found}: recovery may not be exact")
    return told
