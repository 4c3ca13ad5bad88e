"""From the user's process to ranks under an agent, and the wider circle of recovery around `fit`.

Seam: Lightning's `_Launcher`; the Trainer calls `launch(fit_impl, …)`. In the process that the user started it does not return: the
process becomes the agent by exec, which starts the same script anew for each rank and each spare. In those it runs `fit`, and runs it
again, in the same process, when a rank must leave its loops: its own exception outside of a step, or a rewind.

Failure: started where exec would replace the wrong process (a fork of the script, a notebook) -> `ValueError` that says so.
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer.states import TrainerFn

from lightning_gemini.config import MembershipConfig
from lightning_gemini.environment import in_agent
from lightning_gemini.recovery.signals import Rewind
from lightning_gemini.storage.given import is_gone

if TYPE_CHECKING:
    from lightning_gemini.hooks.joining import Joining


class GeminiLauncher(_Launcher):
    """See the module's docstring."""

    def __init__(self, strategy: Joining) -> None:
        self.strategy = strategy

    @property
    def is_interactive_compatible(self) -> bool:
        """A notebook's kernel cannot become an agent."""
        return False

    def kill(self, signum: int) -> None:
        """Lightning passes signals on to ranks it started; the agent does that here."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Run `function` in every rank."""
        if not in_agent():
            if trainer is not None:
                self.strategy.check_directory(trainer)
            become_agent(self.strategy.num_nodes, self.strategy.num_processes, self.strategy.config.membership)  # type: ignore[attr-defined]
        if trainer is None or trainer.state.fn is not TrainerFn.FITTING:
            return function(*args, **kwargs)
        strategy = self.strategy
        given = str(inspect.signature(function).bind(*args, **kwargs).arguments.get("ckpt_path") or trainer.ckpt_path or "")
        strategy.connect_to_agent(trainer, given)
        if strategy.load_from or (strategy.stands_in and is_gone(given)):
            args, kwargs = _with_checkpoint(function, args, kwargs, strategy.load_from or None, trainer)
        while True:
            try:
                out = function(*args, **kwargs)
                strategy.left_fit()
                return out
            except Rewind:
                strategy.reenter(trainer, None)
                args, kwargs = _with_checkpoint(function, args, kwargs, None, trainer)  # it goes on with what it has
            except MisconfigurationException as error:
                strategy.give_up(error)
                raise
            except Exception as error:
                if not strategy.reenter(trainer, error):
                    raise
                args, kwargs = _with_checkpoint(function, args, kwargs, None, trainer)


def _with_checkpoint(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], path: str | None, trainer: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call of `fit` with this `ckpt_path`, whatever the user gave, there or (as NeMo does) to the Trainer."""
    trainer.ckpt_path = None
    call = inspect.signature(function).bind(*args, **kwargs)
    call.arguments["ckpt_path"] = path
    return call.args, call.kwargs


def become_agent(nodes: int, ranks_per_node: int, membership: MembershipConfig) -> NoReturn:
    """Replace this process by an agent that runs this script."""
    if multiprocessing.parent_process() is not None:
        raise ValueError(
            f"trainer.fit was called in process {os.getpid()}, which the script started through multiprocessing: "
            "call it in the script's main process, gemini starts the ranks itself"
        )
    script = sys.orig_argv[1:]
    while script and script[0].startswith("-") and script[0] not in ("-m", "-c", "-"):
        script = script[1:]  # interpreter options are kept by `flags`
    if not script or script[0] in ("-c", "-"):
        raise ValueError("strategy='gemini' starts the script anew in each rank: put the program into a file and run `python file.py`")
    flags = sys.orig_argv[1 : len(sys.orig_argv) - len(script)]
    command = [sys.executable, *flags, *script, *_hydra_overrides()]
    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir(_original_cwd())
    where = ["--nnodes", str(nodes), "--nproc-per-node", str(ranks_per_node)]
    if nodes > 1:
        if not membership.etcd:
            raise ValueError(
                f"num_nodes={nodes} needs an etcd in which the nodes agree, and membership.etcd=[] names none: set it to the URLs of its "
                "members, or start the script with lightning-gemini run --etcd (see docs/nodes.md)"
            )
        where += ["--etcd", ",".join(membership.etcd), "--membership", json.dumps(asdict(membership))]
    os.execv(sys.executable, [sys.executable, "-m", "lightning_gemini.agent", *where, "--", *command])


def _hydra() -> Any:
    if "hydra.core.hydra_config" not in sys.modules:
        return None
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.get() if HydraConfig.initialized() else None


def _hydra_overrides() -> list[str]:
    """All ranks use the run directory of the process the user started."""
    config = _hydra()
    return [] if config is None else [f"hydra.run.dir={config.runtime.output_dir!r}", "hydra.output_subdir=null", "hydra.mode=RUN"]


def _original_cwd() -> str:
    config = _hydra()
    return os.getcwd() if config is None else str(config.runtime.cwd)
