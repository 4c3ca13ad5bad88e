"""The values of `self.log` as plain rows: Lightning keeps each in a torchmetrics module of its own, with functions in it.

Seam: `pack` takes a loop's results apart into containers, tensors and metrics of the model; `unpack` makes them anew, with this process's
strategy. Both are pure. A function that Lightning does not put there itself (a reduction across ranks of the user's own) stays in the row
as it is, and so does a process group. Failure: rows that `pack` has not made -> `KeyError`, `TypeError` or `ValueError`.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync

_STATE = ("value", "cumulated_batch_size", "has_reset", "_forward_cache", "_computed", "_update_count")
_BY_STRATEGY, _NONE = "strategy", "none"


def pack(results: dict[str, _ResultMetric], strategy: Strategy) -> dict[str, Any]:
    """Rows by key."""
    return {key: _row(metric, strategy) for key, metric in results.items()}


def unpack(rows: dict[str, Any], strategy: Strategy) -> dict[str, _ResultMetric]:
    """Inverse of `pack`."""
    return {key: _metric(row, strategy) for key, row in rows.items()}


def _row(metric: _ResultMetric, strategy: Strategy) -> tuple[Any, ...]:
    meta, own = vars(metric.meta), vars(metric)
    sync = metric.meta.sync
    fn = _BY_STRATEGY if sync.fn == strategy.reduce else _NONE if sync.fn is _Sync.no_op else sync.fn
    fields = {name: value for name, value in meta.items() if name != "_sync"}
    how = {"fn": fn, "_should": sync.should, "rank_zero_only": sync.rank_zero_only, "_op": sync.op, "_group": sync.group}
    return fields, how, metric.is_tensor, {name: own[name] for name in _STATE if name in own}


def _metric(row: tuple[Any, ...], strategy: Strategy) -> _ResultMetric:
    fields, how, is_tensor, state = row
    fn = {_BY_STRATEGY: strategy.reduce, _NONE: _Sync.no_op}.get(how["fn"], how["fn"])
    metric = _ResultMetric(_Metadata(**fields, _sync=_Sync(**{**how, "fn": fn})), is_tensor)
    vars(metric).update({name: state[name] for name in _STATE if name in state})
    return metric
