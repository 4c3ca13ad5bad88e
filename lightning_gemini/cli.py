"""The command line: `lightning-gemini run | demo | report`. Imports neither torch nor lightning: `run` becomes the agent."""

from __future__ import annotations

import sys

USAGE = """usage: lightning-gemini COMMAND …

  run --nproc-per-node N train.py …   run a script under the node agent, one process per rank
  demo [data.path=…]                  kill a rank of a small GPT, compare with an undisturbed run
  report DIRECTORY                    recoveries, phases and goodput of a run, from its telemetry

`lightning-gemini COMMAND --help` says more."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command == "run":
        from lightning_gemini.agent.main import main as run

        return run(rest)
    if command == "demo":
        from lightning_gemini.demo import main as demo

        return demo(rest)
    if command == "report" and len(rest) == 1 and rest[0] not in ("-h", "--help"):
        return _report(rest[0])
    print(USAGE, file=sys.stdout if command in ("-h", "--help") or rest else sys.stderr)
    return 0 if command in ("-h", "--help") or rest else 2


def _report(directory: str) -> int:
    from lightning_gemini.telemetry import report

    try:
        print(report.text(report.summarize(directory)))
    except ValueError as error:
        print(f"lightning-gemini: {error}", file=sys.stderr)
        return 2
    return 0
