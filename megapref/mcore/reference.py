"""Reference log-probabilities of packs: the frozen second copy of the policy."""

from __future__ import annotations

from dataclasses import replace

import torch

from megapref.batch import PackedBatch
from megapref.mcore.step import score_packs


def freeze(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """The chunks as a reference: no gradients, evaluation mode."""
    for chunk in chunks:
        chunk.requires_grad_(False).eval()
    return chunks


def fill_reference(chunks: list[torch.nn.Module], packs: list[PackedBatch]) -> list[PackedBatch]:
    """The packs with `ref_logps_K` under the frozen chunks; unchanged on pipeline stages before the last, which have no log-probabilities."""
    logps = score_packs(chunks, packs)
    return [pack if ref_K is None else replace(pack, ref_logps_K=ref_K) for pack, ref_K in zip(packs, logps, strict=True)]
