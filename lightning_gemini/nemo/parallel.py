"""Who holds the same bytes under Megatron's parallelisms: a pure function of the parallel sizes and of Megatron's order of ranks.

Seam: `Parallel(world, tp=…, …)` checks sizes; `holders(rank, …)` gives the ranks that hold the same bytes of a parameter or of its
optimizer state. No torch, no Megatron: it is compared with `megatron.core.parallel_state.RankGenerator` in tests, and can be asked before a
process is started.

Megatron numbers ranks along its axes, the first one fastest: `tp-cp-ep-dp-pp`, or `tp-cp-ep-pp-dp` with `use_tp_pp_dp_mapping`. Dense
parameters and experts see the same ranks through two grids: the dense one has no `ep`, that of the experts no `cp`, and a `tp` of its own.

    a dense parameter                   the same along dp and cp
    one that tp replicates (a norm)     along tp too
    an expert's parameter               along the experts' dp
    optimizer state, not distributed    as its parameter
    optimizer state, distributed        one rank of each instance: the one at the same place; and along tp where tp replicates the parameter

Failure: sizes that do not divide the world -> `ValueError` that names key, value and remedy.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

ORDER = ("tp", "cp", "ep", "dp", "pp")
ORDER_PP_FIRST = ("tp", "cp", "ep", "pp", "dp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """Parallel sizes of a job. Raises `ValueError` where they do not fit its world."""

    world: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 0
    """Tensor parallelism of experts; 0: as `tp`."""
    instances: int = 1
    """Copies of the distributed optimizer (`num_distributed_optimizer_instances`)."""
    pp_before_dp: bool = False
    """`use_tp_pp_dp_mapping`."""

    def __post_init__(self) -> None:
        named = {"tensor_model_parallel_size": self.tp, "pipeline_model_parallel_size": self.pp, "context_parallel_size": self.cp,
                 "expert_model_parallel_size": self.ep, "num_distributed_optimizer_instances": self.instances}  # fmt: skip
        for key, value in named.items():
            if value < 1:
                raise ValueError(f"{key}={value} is not valid: give 1 or more")
        self._require(self.tp * self.pp * self.cp, f"tensor_model_parallel_size={self.tp} x pipeline_model_parallel_size={self.pp} x "
                      f"context_parallel_size={self.cp}")  # fmt: skip
        self._require(self.expert_tp * self.ep * self.pp, f"expert_tensor_parallel_size={self.expert_tp} x expert_model_parallel_size="
                      f"{self.ep} x pipeline_model_parallel_size={self.pp}")  # fmt: skip
        for name, size in (("data", self.dp * self.cp), ("expert data", self.expert_dp)):
            if size % self.instances:
                raise ValueError(
                    f"num_distributed_optimizer_instances={self.instances} does not divide the {name} parallel size {size}: "
                    f"use a divisor of {math.gcd(self.dp * self.cp, self.expert_dp)}"
                )
        if self.pp_before_dp and self.pp > 1 and self.expert_dp != self.dp:
            raise ValueError(
                f"use_tp_pp_dp_mapping=true with pipeline_model_parallel_size={self.pp} needs experts with the data parallel size of the "
                f"rest ({self.dp}), not {self.expert_dp}: set use_tp_pp_dp_mapping=false"
            )

    def _require(self, product: int, text: str) -> None:
        if self.world % product:
            raise ValueError(
                f"{text} = {product} does not divide the world of {self.world} ranks: change a parallel size, or set num_nodes x devices "
                f"to a multiple of {product}"
            )

    @property
    def expert_tp(self) -> int:
        """Tensor parallelism of experts."""
        return self.etp or self.tp

    @property
    def dp(self) -> int:
        """Data parallel size of dense parameters, without context parallelism."""
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def expert_dp(self) -> int:
        """Data parallel size of experts."""
        return self.world // (self.expert_tp * self.ep * self.pp)

    def _grid(self, expert: bool) -> list[tuple[str, int]]:
        """(axis, size), fastest first."""
        dense = {"tp": self.tp, "cp": self.cp, "ep": 1, "dp": self.dp, "pp": self.pp}
        experts = {"tp": self.expert_tp, "cp": 1, "ep": self.ep, "dp": self.expert_dp, "pp": self.pp}
        sizes = experts if expert else dense
        return [(axis, sizes[axis]) for axis in (ORDER_PP_FIRST if self.pp_before_dp else ORDER)]

    def place(self, rank: int, *, expert: bool = False) -> dict[str, int]:
        """Coordinates of a rank."""
        found = {}
        for axis, size in self._grid(expert):
            rank, found[axis] = divmod(rank, size)
        return found

    def along(self, rank: int, axes: frozenset[str], *, expert: bool = False) -> tuple[int, ...]:
        """Ranks that differ from `rank` in these coordinates only, in Megatron's order within such a group (the same as by number)."""
        ranks, stride = [0], 1
        place = self.place(rank, expert=expert)
        for axis, size in self._grid(expert):
            steps = range(size) if axis in axes else (place[axis],)
            ranks = [known + step * stride for step in steps for known in ranks]
            stride *= size
        return tuple(ranks)

    def stage(self, rank: int) -> int:
        """Pipeline stage of a rank."""
        return self.place(rank)["pp"]

    def holders(self, rank: int, *, expert: bool = False, tp_replicated: bool = False, sharded: bool = False) -> tuple[int, ...]:
        """Ranks that hold the same bytes as `rank`, in order, itself among them.

        Args:
            expert: of an expert's parameter.
            tp_replicated: tensor parallelism leaves the parameter whole.
            sharded: state of the distributed optimizer, instead of the parameter itself.
        """
        return _holders(self, rank, expert, tp_replicated, sharded)

    def replicas(self, rank: int, *, sharded: bool) -> tuple[int, ...]:
        """Ranks that hold all that `rank` holds, itself among them: parameters, and optimizer state that is `sharded` or not."""
        kinds = [self.holders(rank, sharded=sharded)]
        if self.ep > 1 or self.expert_tp != self.tp:
            kinds.append(self.holders(rank, expert=True, sharded=sharded))
        return tuple(sorted(set.intersection(*map(set, kinds))))


@functools.lru_cache(maxsize=1024)
def _holders(parallel: Parallel, rank: int, expert: bool, tp_replicated: bool, sharded: bool) -> tuple[int, ...]:
    axes = frozenset({"dp"} if expert else {"dp", "cp"})
    across = parallel.along(rank, frozenset({"tp"}), expert=expert) if tp_replicated else (rank,)
    found: list[int] = []
    for twin in across:
        group = parallel.along(twin, axes, expert=expert)
        size = len(group) // parallel.instances
        found.extend(group[group.index(twin) % size :: size] if sharded else group)
    return tuple(sorted(found))
