"""What losses need to know of the whole global batch, or of the run so far, before any pack of the step is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from megatron.core import parallel_state
from torch import Tensor

from megapref.batch import Logps, PackedBatch
from megapref.mcore import setup
from megapref.mcore.step import reduce_sums, run_packs


def fill_batch_wide(chunks: list[torch.nn.Module], packs: list[PackedBatch], parts: Iterable[Callable]) -> list[PackedBatch]:
    """The packs with the extras that each part of the loss matches over the pairs of all packs and data-parallel ranks (losses.terms.batch_wide).

    A part without `statistics` needs none. One more forward pass for each other; on pipeline stages before the last the packs stay as they are.
    """
    for part in parts:
        if hasattr(part, "statistics"):
            packs = _fill(chunks, packs, part)
    return packs


def with_extra(packs: list[PackedBatch], name: str, value: float) -> list[PackedBatch]:
    """The packs with the same extra number for all rows."""
    return [replace(pack, extras=pack.extras | {name: torch.full((pack.num_rows,), value)}) for pack in packs]


def mean_log_ratio(chunks: list[torch.nn.Module], packs: list[PackedBatch]) -> float:
    """The mean over the single completions of all packs and data-parallel ranks of lp - lr; the packs have their reference's log-probabilities."""

    def consume(logps: Logps) -> tuple[Tensor, int, dict]:
        return logps.policy_K.sum(), 0, {"sum": logps.log_ratio_C.sum(), "count": torch.tensor(float(len(logps.desirable_C)))}

    with torch.no_grad():
        sums = reduce_sums(run_packs(chunks, packs, consume, backward=False))
    return sums["sum"] / max(sums["count"], 1)


def _fill(chunks: list[torch.nn.Module], packs: list[PackedBatch], part: Callable) -> list[PackedBatch]:
    def consume(logps: Logps) -> tuple[Tensor, int, dict]:
        return logps.policy_K.sum(), 0, {"statistics": part.statistics(logps)}

    with torch.no_grad():
        results = run_packs(chunks, packs, consume, backward=False)
    mine = torch.cat([result["statistics"] for result in results]) if results else None
    gathered = setup.gather_over_data_parallel(None if mine is None else mine.cpu())
    if mine is None:
        return packs
    rank = parallel_state.get_data_parallel_rank()
    start = sum(len(values) for values in gathered[:rank])
    matched = part.match(torch.cat(gathered))
    ends = torch.tensor([pack.num_rows for pack in packs]).cumsum(0).tolist()
    return [
        replace(pack, extras=pack.extras | {name: values[start + end - pack.num_rows : start + end] for name, values in matched.items()})
        for pack, end in zip(packs, ends, strict=True)
    ]
