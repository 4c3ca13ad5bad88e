"""The process group that DDP, FSDP2 and the user hold: it stays, and what is inside is changed at each recovery.

Seam: a `torch.distributed` backend named "gemini" (`register_backend`, as torchft does), so that the default group, `new_group` and
DeviceMesh all make groups of this class. What a collective does depends on `World.mode`. Inside a step the backend's own operation runs,
so that the order of summation is the backend's. Between steps everything is built from all-reduce, all-gather, broadcast and barrier,
whose results are equal on all members, so that any member's log can serve a replaced one.

Survivors keep the group, and with it DDP's reducer and its rebuilt buckets: a new DDP wrapper would add in another order and break
bit-identity with three and more ranks.
"""

# mypy: disable-error-code="override, assignment, attr-defined, call-arg, comparison-overlap"
# torch's stubs declare each collective twice (torch.distributed calls only the first form) and leave out what its options really are.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

from lightning_gemini.rendezvous.works import AbsorbingWork, DoneWork
from lightning_gemini.rendezvous.world import Mode, World

Tensors = list[torch.Tensor]


class SwappableGroup(dist.ProcessGroup):
    """The group named `name` of global ranks `members`, over backends that are formed lazily, one per device type and generation."""

    def __init__(self, world: World, rank: int, members: Sequence[int], name: str) -> None:
        super().__init__(rank, len(members))
        self._world, self._rank, self._members, self._size, self._name = world, rank, members, len(members), name
        self._inner: dict[str, tuple[int, Any]] = {}

    def getBackendName(self) -> str:
        """A built-in name would make DDP's logger look for that backend."""
        return "gemini"

    @property
    def group_name(self) -> str:
        """The name torch registered; DeviceMesh asks for it."""
        return self._name

    @property
    def group_desc(self) -> str:
        """As `group_name`."""
        return self._name

    # ---- inside

    def inner(self, device: str = "cpu") -> Any:
        """The backend of the current generation."""
        generation, backend = self._inner.get(device, (-1, None))
        if generation != self._world.generation:
            self._inner.pop(device, None)
            backend = self._world.form(self._name, self._rank, self._members, device)
            self._inner[device] = (self._world.generation, backend)
        return backend

    def _in_step(self, tensor: torch.Tensor | None, value: Any, start: Callable[[Any], dist.Work]) -> dist.Work:
        world = self._world
        if world.error is None:
            try:
                world.require_current()
                return self._start(tensor.device.type if tensor is not None else "cpu", world.note, value, start)
            except Exception as error:
                world.note(error)
        return DoneWork(value)

    def _start(self, device: str, note: Callable[[BaseException], None], value: Any, start: Callable[[Any], dist.Work]) -> dist.Work:
        backend = self.inner(device)
        work = AbsorbingWork(start(backend), backend, note, value, self._world.outstanding)
        if self._world.stale:  # announced after we looked: the listening thread may have looked for outstanding work before us
            self._world.outstanding.let_go()
        return work

    def _between(self, tensors: Tensors, start: Callable[[Any], dist.Work]) -> None:
        """Complete the collective, whatever it takes; `tensors` hold the input (where in place) and the result."""
        world = self._world
        while not world.recorded(self._name, tensors):
            if world.stale:
                world.stand_still(None)
                continue
            inputs = [tensor.detach().clone() for tensor in tensors]
            errors: list[BaseException] = []
            try:
                self._start(tensors[0].device.type if tensors else "cpu", errors.append, None, start).wait()
            except Exception as error:
                errors.append(error)
            if not errors:
                world.record(self._name, tensors)
                return
            for tensor, saved in zip(tensors, inputs, strict=True):
                tensor.detach().copy_(saved)
            world.stand_still(errors[0])

    def _run(self, tensors: Tensors, value: Any, start: Callable[[Any], dist.Work], alone: Callable[[], None]) -> dist.Work:
        mode = self._world.mode
        if self._size == 1 or mode is Mode.STAND_IN:
            with torch.no_grad():
                alone()
        elif mode is Mode.STEP:
            return self._in_step(tensors[0] if tensors else None, value, start)
        else:
            self._between(tensors, start)
        return DoneWork(value)

    # ---- the four that everything is made of

    def allreduce(self, tensors: Tensors, opts: Any = None) -> dist.Work:
        """All-reduce in place."""
        if isinstance(tensors, torch.Tensor):
            tensors = [tensors]
        options = opts if isinstance(opts, dist.AllreduceOptions) else dist.AllreduceOptions()
        if options.reduceOp == dist.ReduceOp.AVG and tensors[0].device.type == "cpu":
            return self._average(tensors)

        def alone() -> None:
            if options.reduceOp == dist.ReduceOp.SUM:
                for tensor in tensors:
                    tensor.mul_(self._size)

        return self._run(tensors, tensors, lambda g: g.allreduce(tensors, options), alone)

    def _average(self, tensors: Tensors) -> dist.Work:
        """Gloo has no AVG; Lightning divides a sum where it finds a group of that name, and so do we, in the same way."""
        self.allreduce(tensors).wait()
        for tensor in tensors:
            mean = tensor.detach()
            _ = mean.div_(self._size) if mean.is_floating_point() else mean.copy_(mean / self._size)
        return DoneWork(tensors)

    def broadcast(self, tensors: Tensors, opts: Any = None) -> dist.Work:
        """Broadcast from `opts.rootRank`."""
        options = opts or dist.BroadcastOptions()
        return self._run(tensors, tensors, lambda g: g.broadcast(tensors, options), lambda: None)

    def allgather(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> dist.Work:
        """All-gather into lists."""
        options = opts or AllgatherOptions()

        def alone() -> None:
            for outs, tensor in zip(outputs, inputs, strict=True):
                for out in outs:
                    out.copy_(tensor)

        return self._run([o for outs in outputs for o in outs], outputs, lambda g: g.allgather(outputs, inputs, options), alone)

    def barrier(self, opts: Any = None) -> dist.Work:
        """Barrier."""
        options = opts or dist.BarrierOptions()
        return self._run([], [], lambda g: g.barrier(options), lambda: None)

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        """A barrier; a rank that does not come is the agent's to find, so that the timeout is not used."""
        self.barrier().wait()

    def shutdown(self) -> None:
        """`destroy_process_group`: drop what is inside."""
        self._inner.clear()

    abort = shutdown

    # ---- single-tensor forms, which FSDP2 uses

    def _allgather_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> dist.Work:
        options = opts or AllgatherOptions()

        def alone() -> None:
            output.copy_(torch.cat([input.reshape(-1)] * self._size).view_as(output))

        return self._run([output], [output], lambda g: g._allgather_base(output, input, options), alone)

    def _reduce_scatter_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> dist.Work:
        options = opts or dist.ReduceScatterOptions()
        if self._world.mode is Mode.STEP and self._size > 1:
            return self._in_step(input, [output], lambda g: g._reduce_scatter_base(output, input, options))
        total = self._reduced(input, options)
        output.detach().copy_(total.reshape(self._size, -1)[self._rank].view_as(output))
        return DoneWork([output])

    all_gather_single = _allgather_base
    reduce_scatter_single = _reduce_scatter_base

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> dist.Work:
        """One all-reduce after the other."""
        for tensor in tensors:
            options = dist.AllreduceOptions()
            options.reduceOp = getattr(opts, "reduceOp", options.reduceOp)
            self.allreduce([tensor], options).wait()
        return DoneWork(tensors)

    def allgather_into_tensor_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> dist.Work:
        """One all-gather after the other."""
        for output, tensor in zip(outputs, inputs, strict=True):
            self._allgather_base(output, tensor).wait()
        return DoneWork(outputs)

    def reduce_scatter_tensor_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> dist.Work:
        """One reduce-scatter after the other."""
        for output, tensor in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, tensor, opts).wait()
        return DoneWork(outputs)

    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    # ---- forms with a root or a destination

    def _reduced(self, tensor: torch.Tensor, opts: Any) -> torch.Tensor:
        options = dist.AllreduceOptions()
        options.reduceOp = opts.reduceOp
        total = tensor.detach().clone()
        self.allreduce([total], options).wait()
        return total

    def _gathered(self, tensor: torch.Tensor) -> Tensors:
        parts = [torch.empty_like(tensor) for _ in range(self._size)]
        self.allgather([parts], [tensor.detach()]).wait()
        return parts

    def reduce(self, tensors: Tensors, opts: Any = None) -> dist.Work:
        """Reduce to `opts.rootRank`."""
        options = opts or dist.ReduceOptions()
        if self._world.mode is Mode.STEP and self._size > 1:
            return self._in_step(tensors[0], tensors, lambda g: g.reduce(tensors, options))
        for tensor in tensors:
            total = self._reduced(tensor, options)
            if self._rank == options.rootRank:
                tensor.detach().copy_(total)
        return DoneWork(tensors)

    def gather(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> dist.Work:
        """Gather at `opts.rootRank`."""
        options = opts or dist.GatherOptions()
        if self._world.mode is Mode.STEP and self._size > 1:
            return self._in_step(inputs[0], outputs, lambda g: g.gather(outputs, inputs, options))
        parts = self._gathered(inputs[0])
        if self._rank == options.rootRank:
            for out, part in zip(outputs[0], parts, strict=True):
                out.detach().copy_(part)
        return DoneWork(outputs)

    def scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any = None) -> dist.Work:
        """Scatter from `opts.rootRank`."""
        options = opts or dist.ScatterOptions()
        if self._world.mode is Mode.STEP and self._size > 1:
            return self._in_step(outputs[0], outputs, lambda g: g.scatter(outputs, inputs, options))
        parts = inputs[0] if inputs else [outputs[0]] * self._size
        whole = torch.stack([part.detach() for part in parts])
        root = dist.BroadcastOptions()
        root.rootRank = options.rootRank
        self.broadcast([whole], root).wait()
        outputs[0].detach().copy_(whole[self._rank])
        return DoneWork(outputs)

    def reduce_scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any = None) -> dist.Work:
        """Reduce-scatter from lists."""
        options = opts or dist.ReduceScatterOptions()
        if self._world.mode is Mode.STEP and self._size > 1:
            return self._in_step(outputs[0], outputs, lambda g: g.reduce_scatter(outputs, inputs, options))
        outputs[0].detach().copy_(self._reduced(torch.stack(list(inputs[0])), options)[self._rank])
        return DoneWork(outputs)

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> dist.Work:
        """All-to-all of equal parts."""
        options = opts or dist.AllToAllOptions()
        if self._world.mode is Mode.STEP and self._size > 1:
            return self._in_step(outputs[0], outputs, lambda g: g.alltoall(outputs, inputs, options))
        for output, part in zip(outputs, self._gathered(torch.stack(list(inputs))), strict=True):
            output.detach().copy_(part[self._rank])
        return DoneWork(outputs)

    def alltoall_base(self, output: torch.Tensor, input: torch.Tensor, out_splits: Any, in_splits: Any, opts: Any = None) -> dist.Work:
        """All-to-all of one tensor; unequal parts inside a step only."""
        options = opts or dist.AllToAllOptions()
        out_splits, in_splits = list(map(int, out_splits)), list(map(int, in_splits))  # Megatron gives arrays, which a backend refuses
        if self._world.mode is Mode.STEP and self._size > 1:
            return self._in_step(output, [output], lambda g: g.alltoall_base(output, input, out_splits, in_splits, options))
        if len(set(out_splits)) > 1 or len(set(in_splits)) > 1:
            raise NotImplementedError("all_to_all_single with unequal splits outside a training step: use all_gather, or move it there")
        parts = self._gathered(input.detach().reshape(self._size, -1))
        output.detach().copy_(torch.stack([part[self._rank] for part in parts]).view_as(output))
        return DoneWork([output])

    all_to_all_single = alltoall_base

    def send(self, tensors: Tensors, destination: int, tag: int) -> dist.Work:
        """Point to point, inside a step only: between steps it could not be replayed."""
        self._require_step("send")
        return self._in_step(tensors[0], tensors, lambda g: g.send(tensors, destination, tag))

    def recv(self, tensors: Tensors, source: int, tag: int) -> dist.Work:
        """As `send`."""
        self._require_step("recv")
        return self._in_step(tensors[0], tensors, lambda g: g.recv(tensors, source, tag))

    def _require_step(self, name: str) -> None:
        if self._world.mode is not Mode.STEP:
            raise NotImplementedError(f"{name} outside a training step cannot be recovered: use broadcast, or move it into training_step")


def register(world: Callable[[], World]) -> None:
    """Make "gemini" a backend of torch.distributed; groups belong to the `World` that is current when they are made."""

    def create(options: Any, _: Any) -> SwappableGroup:
        members = options.global_ranks_in_group or range(options.group_size)  # torch leaves the default group's out
        return SwappableGroup(world(), options.group_rank, members, options.group_id)

    if "gemini" not in dist.Backend.backend_list:
        dist.Backend.register_backend("gemini", create, devices=["cpu", "cuda"], extended_api=True)
