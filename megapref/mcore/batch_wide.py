"""What losses over the whole global batch need to know of all its pairs before any of them is trained (see losses.terms.batch_wide)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from megatron.core import parallel_state

from megapref.batch import PackedBatch
from megapref.mcore import setup
from megapref.mcore.step import pair_logps, run_packs


def fill_batch_wide(chunks: list[torch.nn.Module], packs: list[PackedBatch], parts: Iterable[Callable]) -> list[PackedBatch]:
    """The packs with the extras that each part of the loss matches over the pairs of all packs and data-parallel ranks.

    A part without `statistics` needs none. One more forward pass for each other; on pipeline stages before the last the packs stay as they are.
    """
    for part in parts:
        if hasattr(part, "statistics"):
            packs = _fill(chunks, packs, part)
    return packs


def _fill(chunks: list[torch.nn.Module], packs: list[PackedBatch], part: Callable) -> list[PackedBatch]:
    def consume(logps_K, pack):
        return logps_K.sum(), 0, {"statistics": part.statistics(pair_logps(logps_K, pack))}

    with torch.no_grad():
        results = run_packs(chunks, packs, consume, backward=False)
    mine = torch.cat([result["statistics"] for result in results]) if results else None
    gathered = setup.gather_over_data_parallel(None if mine is None else mine.cpu())
    if mine is None:
        return packs
    rank = parallel_state.get_data_parallel_rank()
    start = sum(len(values) for values in gathered[:rank])
    matched = part.match(torch.cat(gathered))
    ends = torch.tensor([pack.num_pairs for pack in packs]).cumsum(0).tolist()
    return [
        replace(pack, extras_P=pack.extras_P | {name: values[start + end - pack.num_pairs : start + end] for name, values in matched.items()})
        for pack, end in zip(packs, ends, strict=True)
    ]
