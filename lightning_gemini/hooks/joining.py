"""How a rank gets into a job and out of it: from `fit` to the first step, and back into `fit`.

Seam to Lightning: `_configure_launcher`, `setup_environment`, `setup`, `barrier("run-stage")`, `broadcast`, `process_dataloader`;
`launcher` calls `connect_to_agent`, `reenter`, `give_up`, `left_fit`. A spare waits in `setup_environment`, before any hook of the user
could depend on its rank. What fails here fails before the first step, with one error: `give_up` tells the agent, which shows it once.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed

from lightning_gemini import checks, faults
from lightning_gemini.agent.messages import Due, Fault, Hello, Left, LoaderStarted, Recovered, Waiting
from lightning_gemini.agent.variables import rank_variables
from lightning_gemini.compat import lightning as compat
from lightning_gemini.compat import loggers, nemo
from lightning_gemini.compat.torch import OBJECT_BROADCASTS, keep_groups_swappable
from lightning_gemini.data.position import PositionedLoader
from lightning_gemini.environment import GeminiEnvironment
from lightning_gemini.hooks.base import _process
from lightning_gemini.hooks.stepping import Stepping
from lightning_gemini.launcher import GeminiLauncher
from lightning_gemini.mapped.forking import Owner
from lightning_gemini.mapped.trainer import close_all, set_up_ahead
from lightning_gemini.peers.roster import Roster
from lightning_gemini.recovery.engine import Engine, announcement_s, patience_s
from lightning_gemini.recovery.landing import Landing
from lightning_gemini.recovery.memory import Memory
from lightning_gemini.recovery.room import of_node
from lightning_gemini.rendezvous import group
from lightning_gemini.rendezvous.link import Link
from lightning_gemini.rendezvous.world import Mode, World
from lightning_gemini.snapshot.slots import CorruptSnapshot, SlotFile
from lightning_gemini.state.catalogue import size_of
from lightning_gemini.state.local import LocalState
from lightning_gemini.storage import description, meta, resume
from lightning_gemini.storage.given import step_of
from lightning_gemini.telemetry import banner
from lightning_gemini.telemetry.events import EventLog

_WAIT_FOR_END_S = 30.0
_WAIT_FOR_STORAGE_S = 600.0
"""It may be far away, and its process imports torch first."""


class Joining(Stepping):
    """See the module's docstring."""

    def _configure_launcher(self) -> None:
        checks.world_of(self)
        self._launcher = GeminiLauncher(self)

    @property
    def stands_in(self) -> bool:
        """Whether this process is a spare, or was one: its state is its predecessor's."""
        return self.link.rank is None or self.landing is not None

    def connect_to_agent(self, trainer: pl.Trainer, given: str = "") -> None:
        """First thing in `fit`: tell the agent that this process is there. `given`: the user's own checkpoint to go on from."""
        if "link" not in _process:
            _process["link"] = Link()
            _process["world"] = World(_process["link"], self.config.recovery.collective_timeout_s)
            group.register(lambda: _process["world"])
        link = self.link
        link.on_recover, link.on_recovered = self._on_recover, self._on_recovered
        if self.engine is None:
            self.world.stand_still = self._before_the_engine
        self._loggers = trainer.loggers
        self._callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
        try:
            checks.same_world(self, link.world, link.per_node)
            self._directory = self.check_directory(trainer)
        except ValueError as error:
            self.give_up(error)
            raise
        step = step_of(given) if given and self.config.persistent.url else -1
        config = asdict(self.config) | {"replicated": self.replicated}
        link.send(Hello(pid=os.getpid(), config=config, directory=self._directory, given=given, given_step=step))
        link.voting |= bool(self.config.persistent.url)
        if self.config.persistent.url and link.rank is not None:
            link.wait(lambda: link.begin is not None, _WAIT_FOR_STORAGE_S, "persistent storage")
            begin, link.begin = link.begin, None
            assert begin is not None
            self.landing = Landing(link, first=True) if begin.land else None
            self.load_from = begin.load

    def check_directory(self, trainer: pl.Trainer) -> str:
        """The folder of the event files; also asked before the first process is started."""
        directory = self.config.telemetry.directory or os.path.join(trainer.default_root_dir, "gemini")
        checks.writable(directory, "telemetry.directory")
        return os.path.abspath(directory)

    def _on_recover(self) -> None:  # in the listening thread
        landing = self.landing
        if landing is None and self.engine is None:  # there is nothing to stop, and nothing to keep: it will be started anew
            landing = Landing(self.link)
        if landing is not None:
            landing.answer()
        self.world.free()

    def _before_the_engine(self, error: BaseException | None) -> None:
        """A collective of the set-up has failed. Returns never: where others died, the agent starts everybody anew."""
        link, limit_s = self.link, announcement_s(self.link, self.config)
        with contextlib.suppress(TimeoutError):
            link.wait(lambda: self.world.stale, limit_s, "the agent's word on a failed collective")
        if self.world.stale:
            link.wait(lambda: False, patience_s(self.config), "the agent to start this rank anew")
        raise error or RuntimeError("a collective failed while the job was set up")

    def _on_recovered(self, message: Recovered) -> None:  # in the listening thread
        self.recoveries.append(message)

    def setup_environment(self) -> None:
        """Take a rank (a spare waits for one here) and make the default group."""
        link, environment = self.link, self.cluster_environment
        assert isinstance(environment, GeminiEnvironment)
        if link.rank is None:
            self.landing = Landing(link)
            set_up_ahead(self.lightning_module.trainer)  # type: ignore[attr-defined]
            link.send(Waiting())
            link.wait(lambda: link.rank is not None, float(2**31), "a rank")
            self.world.enter(link.announced)
        self._take_rank()
        assert link.rank is not None
        environment.rank = link.rank
        os.environ.update(rank_variables(link.rank, link.world, link.per_node))
        self.set_world_ranks()  # type: ignore[attr-defined]
        if self.landing is not None:
            self.world.mode = Mode.STAND_IN
            self._continue_loggers()
        if self.events is None:
            self.events = EventLog(self._directory, f"rank{link.rank}", os.environ["LIGHTNING_GEMINI_JOB"])
            self.events.emit("joined", rank=link.rank, spare=self.landing is not None, generation=link.announced)
        if not dist.is_initialized():
            reset_seed()
            dist.init_process_group("gemini", store=dist.HashStore(), rank=self.world.rank, world_size=self.world.size)  # type: ignore[attr-defined]
            keep_groups_swappable()
        super().setup_environment()  # type: ignore[misc]

    def _take_rank(self) -> None:
        """Listen for the other ranks; they know where, because everybody knows the job's name."""
        if not self.world.joined:
            link, job = self.link, os.environ["LIGHTNING_GEMINI_JOB"]
            assert link.rank is not None
            roster = Roster.on_hosts(job, link.hosts, link.per_node) if link.hosts else Roster.on_one_node(job, link.world)
            atexit.register(self.world.leave)
            self.world.join(roster, link.rank, os.environ.get("LIGHTNING_GEMINI_TOKEN", "").encode())

    def _continue_loggers(self) -> None:
        """In the folders that rank 0 has opened; whoever looked for the next free one would find another."""
        link = self.link
        assert link.rank is not None and self.landing is not None
        place = link.place(0 if link.is_here(0) else link.rank)
        for data in self._blobs(place) or self.landing.fetched(place):
            with contextlib.suppress(CorruptSnapshot):  # its owner may be alive, and write another
                loggers.continue_versions(self._loggers, LocalState.logger_versions(data(), foreign=bool(link.hosts)))
                return

    def _blobs(self, place: int) -> list[Callable[[], bytes]]:
        ledger = SlotFile(self.link.files.ledgers[place])
        return [functools.partial(ledger.read, slot) for slot in reversed(ledger.slots())]

    def setup(self, trainer: pl.Trainer) -> None:
        """Lightning's set-up, then ours: memory, engine, callback."""
        if trainer.state.fn != "fit":
            super().setup(trainer)  # type: ignore[misc]
            return
        checks.trainer(self, trainer)
        if self.landing is None:
            self.check_layout()
        self._attach_callback(trainer)
        super().setup(trainer)  # type: ignore[misc]
        self._trainer = trainer
        self._start_engine(trainer)

    def _start_engine(self, trainer: pl.Trainer) -> None:
        """Model and optimizers are what will be trained."""
        for optimizer in compat.unwrap_optimizers(trainer):
            checks.optimizer(optimizer)
            optimizer.register_step_pre_hook(self._gate)
            optimizer.register_step_post_hook(self._note_used)
        self._make_engine(trainer)

    def _attach_callback(self, trainer: pl.Trainer) -> None:
        from lightning_gemini.callback import GeminiCallback

        if not any(isinstance(callback, GeminiCallback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.callbacks.append(GeminiCallback())  # type: ignore[attr-defined]
        if self.config.faults and not any(isinstance(callback, faults.FaultCallback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.callbacks.append(faults.FaultCallback(self))  # type: ignore[attr-defined]

    def _make_engine(self, trainer: pl.Trainer) -> None:
        entries = self.entries()
        if self.engine is not None:
            self.engine.memory.close()
        layout = self.layout()
        memory = Memory(
            self.link, self.config.snapshot, layout, self.entries, lambda: compat.unwrap_optimizers(trainer), replicated=self.replicated,
            persistent=self.config.persistent,
        )  # fmt: skip
        accumulating = trainer.accumulate_grad_batches > 1 or not self.lightning_module.automatic_optimization  # type: ignore[attr-defined]
        gradients = size_of(entries) if accumulating else 0
        need = memory.expected_size()
        if self.landing is None:
            memory.allocate(need, gradients)
        else:
            self.landing.room = need, gradients
        previous = None if self.engine is None else self.engine.local
        local = LocalState(trainer, previous, foreign=layout.nodes > 1)
        self.engine = Engine(self.world, self.link, self.config, memory, local, self)
        self.world.log = memory.log
        self.world.stand_still = self.engine.stand_still
        begins = self.landing is None or self.landing.first
        if begins and self.config.telemetry.banner and self.world.rank == 0:
            banner.show(self.config, layout, of_node(need, memory.owned(), layout), layout.per_node > 1 and self.has_donors())

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning's; the one before the loops start is where a replaced rank finds its place."""
        name = args[0] if args else kwargs.get("name")
        landing = self.landing
        if name == "run-stage" and landing is not None and landing.boundary is None and self.engine is not None:
            landing.position(self.engine)
            assert landing.boundary is not None
            self._trainer.num_sanity_val_steps = 0  # its peers did that long ago
        super().barrier(*args, **kwargs)  # type: ignore[misc]

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """As Lightning's; nobody is there to receive from while a replaced rank sets itself up. What its predecessor has sent it takes from
        a peer's log: the object may depend on the moment. (Before 2.6 a checkpoint's name depends on which files rank 0 has seen.)"""
        if dist.is_initialized():
            world = self.world
            if world.mode is Mode.STAND_IN:
                return obj
            if src == world.rank and world.replays(_default_group().group_name, OBJECT_BROADCASTS):
                src = (src + 1) % world.size  # torch gives what was sent to receivers only
        return super().broadcast(obj, src)  # type: ignore[misc]

    def form_groups(self) -> None:
        """Form the default group of the present generation, so that the first collective does not have to."""
        _default_group().inner("cuda" if self.root_device.type == "cuda" else "cpu")  # type: ignore[attr-defined]

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """As Lightning's, which also reads what `persistent` has written for a job of another size."""
        if self.load_from and str(checkpoint_path) == self.load_from:
            return resume.load(self.lightning_module.trainer, self.load_from, weights_only=weights_only)  # type: ignore[attr-defined]
        given = {} if weights_only is None else {"weights_only": weights_only}  # before Lightning 2.6 there was none
        return super().load_checkpoint(checkpoint_path, **given)  # type: ignore[misc, no-any-return]

    def persist(self, trainer: pl.Trainer) -> None:
        """After a step: have it persisted if it is due."""
        engine = self.engine
        if engine is None or not engine.persist_due() or self._persisted == engine.step:
            return
        self._persisted = engine.step
        described = meta.describe(trainer)
        if trainer.global_rank == 0:
            description.publish(SlotFile(self.link.files.description), engine.step, described)
        twins = engine.memory.owned(engine.step).twins
        self.link.send(Due(step=engine.step, position=twins.index(self.world.rank), count=len(twins)))

    def process_dataloader(self, dataloader: Any) -> Any:
        """Training loaders know their position; a replaced rank's begin at its predecessor's. (`mapped.trainer` may have wrapped it.)"""
        dataloader = super().process_dataloader(dataloader)  # type: ignore[misc]
        if not getattr(self, "_trainer", None) or not self._trainer.training:
            return dataloader
        if self.load_from and not isinstance(dataloader, PositionedLoader):  # a mapped one does so when it is given its place
            compat.finish_saved_batch(self._trainer)
        loader = dataloader if isinstance(dataloader, PositionedLoader) else PositionedLoader(dataloader)
        if self.loader_positions:
            loader.begin_at(self.loader_positions.pop(0))
        return loader

    def loader_owner(self) -> Owner:
        """Loader processes of mapped data are the agent's: they stay when this rank dies."""
        link = self.link
        return Owner(link.agent_pid, forked=link.forget, started=lambda pid: link.send(LoaderStarted(pid=pid)))

    def reenter(self, trainer: pl.Trainer, error: Exception | None) -> bool:
        """Prepare to enter `fit` again in this process. False when the error must reach the user."""
        engine = self.engine
        if engine is None or engine.step < 0:
            if error is not None:
                self.give_up(error)
            return error is None
        engine.memory.settle()
        self.landing = Landing(self.link)
        if error is not None:
            generation = self.world.generation
            engine.report(error, "a callback, the data or validation")
            self.link.wait_for_generation_after(generation, self.config.recovery.regroup_timeout_s)
            error.__traceback__ = error.__context__ = None
        self.world.enter(self.link.announced)
        self.landing.answer()
        self.world.mode, self.world.error = Mode.STAND_IN, None
        self.world.replay.clear()
        engine.in_step = False
        self.world.stand_still = engine.stand_still
        close_all(bye=False)
        compat.forget_loaders(trainer)
        trainer.callbacks = list(self._callbacks)  # type: ignore[attr-defined]  # hooks of set-up, as NeMo's, add theirs again
        nemo.reenter()
        self.loader_positions = []
        self.model = self.lightning_module  # type: ignore[attr-defined]
        trainer.state.status = trainer.state.status.__class__.RUNNING
        trainer.training = True
        return True

    def give_up(self, error: BaseException) -> None:
        """Tell the agent that the job must end with this error; it ends this process, so that the error is shown once."""
        text = "".join(traceback.format_exception(error))
        self.link.send(Fault(generation=self.link.announced, step=-1, where="set-up", error=text, recoverable=False))
        with contextlib.suppress(TimeoutError):
            self.link.wait(lambda: False, _WAIT_FOR_END_S, "the agent to end the job")

    def left_fit(self) -> None:
        """`fit` has returned."""
        if self.engine is not None:
            dist.barrier()  # together: a rank that dies after its last step is still replaced, and finishes what follows it
            self.engine.memory.settle()
            self.engine.report_resumed()
            self.engine.finished = True
        self.emit("left_fit")
        self.link.send(Left())


def _default_group() -> group.SwappableGroup:
    default = dist.group.WORLD
    assert isinstance(default, group.SwappableGroup)
    return default
