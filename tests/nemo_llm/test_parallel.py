"""The pure account of Megatron's ranks, against Megatron's own generator of groups."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gemini.nemo.parallel import Parallel

SIZES = st.sampled_from([1, 2, 3, 4])


@st.composite
def parallels(draw: st.DrawFn) -> Parallel:
    """Sizes that fit: the world is a multiple of what both grids need, of the dense data parallel size and of the instances."""
    tp, pp, cp, ep, etp, instances = (draw(SIZES) for _ in range(6))
    pp_before_dp = draw(st.booleans())
    dense, experts = tp * pp * cp, etp * ep * pp
    if pp_before_dp and pp > 1:  # Megatron asks for the same data parallel size of both grids
        cp, ep, etp, dense, experts = 1, 1, tp, tp * pp, tp * pp
    world = math.lcm(dense, experts) * instances * draw(st.sampled_from([1, 2]))
    return Parallel(world=world, tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, instances=instances, pp_before_dp=pp_before_dp)


def partition(parallel: Parallel, **kind: bool) -> set[tuple[int, ...]]:
    """The sets of holders of all ranks."""
    return {parallel.holders(rank, **kind) for rank in range(parallel.world)}


@settings(max_examples=150, deadline=None)
@given(parallels())
def test_as_megatron(parallel: Parallel) -> None:
    """Groups of parameters, and of the distributed optimizer's instances as `initialize_model_parallel` cuts them."""
    reason = "megatron.core is not installed: pip install 'lightning_gemini[nemo-llm]' (make test-nemo-llm)"
    RankGenerator = pytest.importorskip("megatron.core.parallel_state", reason=reason).RankGenerator
    order = "tp-cp-ep-pp-dp" if parallel.pp_before_dp else "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=parallel.tp, ep=1, dp=parallel.dp, pp=parallel.pp, cp=parallel.cp, order=order)
    expert = RankGenerator(tp=parallel.expert_tp, ep=parallel.ep, dp=parallel.expert_dp, pp=parallel.pp, cp=1, order=order)

    def groups(generator: object, token: str) -> set[tuple[int, ...]]:
        return {tuple(sorted(ranks)) for ranks in generator.get_ranks(token)}  # type: ignore[attr-defined]

    assert partition(parallel) == groups(dense, "dp-cp")
    assert partition(parallel, tp_replicated=True) == groups(dense, "tp-dp-cp")
    assert partition(parallel, expert=True) == groups(expert, "dp")
    assert partition(parallel, expert=True, tp_replicated=True) == groups(expert, "tp-dp")
    for kind, ranks in ((False, dense.get_ranks("dp-cp")), (True, expert.get_ranks("dp"))):
        size = len(ranks[0]) // parallel.instances
        inter = {tuple(sorted(group[place::size])) for group in ranks for place in range(size)}
        assert partition(parallel, expert=kind, sharded=True) == inter
    assert {parallel.stage(rank) for rank in range(parallel.world)} == set(range(parallel.pp))
    for group in dense.get_ranks("tp-dp-cp"):
        assert len({parallel.stage(rank) for rank in group}) == 1


@settings(max_examples=100, deadline=None)
@given(parallels())
def test_holders_agree_with_each_other(parallel: Parallel) -> None:
    """Each set of holders is the same for all its members, so that a label made of the first one names it."""
    for expert, tp_replicated, sharded in itertools.product((False, True), repeat=3):
        kind = {"expert": expert, "tp_replicated": tp_replicated, "sharded": sharded}
        sets = partition(parallel, **kind)
        assert sorted(itertools.chain(*sets)) == list(range(parallel.world))


def test_one_optimizer_instance_has_no_twin() -> None:
    parallel = Parallel(world=8, tp=2)
    assert parallel.holders(5) == (1, 3, 5, 7)
    assert parallel.holders(5, sharded=True) == (5,)
    assert parallel.holders(5, sharded=True, tp_replicated=True) == (4, 5)
    assert Parallel(world=8, tp=2, instances=2).holders(5, sharded=True) == (1, 5)


def test_who_has_everything_that_a_rank_has() -> None:
    assert Parallel(world=8, tp=2).replicas(5, sharded=False) == (1, 3, 5, 7)
    assert Parallel(world=8, tp=2).replicas(5, sharded=True) == (5,)
    assert Parallel(world=8, tp=2, instances=2).replicas(5, sharded=True) == (1, 5)
    assert Parallel(world=8, ep=4).replicas(5, sharded=False) == (1, 5)
    assert Parallel(world=8, ep=8).replicas(5, sharded=False) == (5,)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"world": 6, "tp": 4}, "tensor_model_parallel_size=4 .* = 4 does not divide the world of 6 ranks"),
        ({"world": 8, "tp": 2, "pp": 3}, "pipeline_model_parallel_size=3 .*multiple of 6"),
        ({"world": 8, "tp": 2, "ep": 8}, "expert_model_parallel_size=8"),
        ({"world": 8, "tp": 2, "instances": 3}, "num_distributed_optimizer_instances=3 does not divide"),
        ({"world": 8, "tp": 0}, "tensor_model_parallel_size=0 is not valid"),
        ({"world": 8, "pp": 2, "ep": 2, "pp_before_dp": True}, "use_tp_pp_dp_mapping"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Parallel(**sizes)  # type: ignore[arg-type]
