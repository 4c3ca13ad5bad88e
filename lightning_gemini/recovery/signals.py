"""How a recovery travels through Python's stack."""

from __future__ import annotations


class StepFault(RuntimeError):
    """A collective of this step failed, or a recovery was announced: the step must be repeated. Never reaches the user."""


class Rewind(BaseException):
    """This rank leaves its loops and re-enters `fit` from a snapshot. A BaseException, so that no `except Exception` on the way (Lightning
    has one around each step's SIGTERM broadcast) swallows it. Caught by the strategy's launcher."""


class Unrecoverable(RuntimeError):
    """The job ends with the error it was raised from."""
