"""What the busiest listener of a large job does, by simulation of the product's own schedule."""

from __future__ import annotations

import math

import pytest

from benchmarks.rendezvous import simulate


@pytest.mark.parametrize("size", [2, 3, 64, 100, 2304, 16_384])
def test_work_grows_as_the_logarithm(size: int) -> None:
    _, rounds, busiest, in_all, readers, hops, _ = (int(cell.replace(",", "")) for cell in simulate(size))
    log = math.ceil(math.log2(size))
    assert (rounds, busiest) == (log, log) and in_all == size * log
    assert readers <= log and hops <= log
