"""The reference policy: a frozen second copy on the device, or weights in CPU memory that take the policy's place while they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megapref.batch import PackedBatch
from megapref.mcore.step import score_packs


@dataclass(frozen=True)
class Reference:
    """The model chunks that compute, and, where they are the policy's, the reference's weights that are `swapped` in."""

    chunks: list[torch.nn.Module]
    swapped: list[Tensor] | None = None

    @contextmanager
    def in_place(self) -> Iterator[list[torch.nn.Module]]:
        """The chunks with the reference's weights in them. Nothing may be trained meanwhile."""
        self._exchange()
        try:
            yield self.chunks
        finally:
            self._exchange()

    def during(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, run with the reference's weights in place."""

        def run(*args, **kwargs):
            with self.in_place():
                return function(*args, **kwargs)

        return run

    @torch.no_grad()
    def _exchange(self) -> None:
        """Tensor by tensor, so that no more than one is held twice."""
        for held, weight in zip(self.swapped or (), _weights(self.chunks) if self.swapped else (), strict=True):
            policy = weight.to("cpu", copy=True)
            weight.copy_(held)
            held.copy_(policy)


def resident(chunks: list[torch.nn.Module]) -> Reference:
    """A second model, frozen."""
    for chunk in chunks:
        chunk.requires_grad_(False).eval()
    return Reference(chunks)


def swapped(policy: list[torch.nn.Module]) -> Reference:
    """The policy's weights as they are now, copied to CPU memory: no second model on the device."""
    return Reference(policy, [weight.detach().to("cpu", copy=True) for weight in _weights(policy)])


def fill_reference(reference: Reference, packs: list[PackedBatch]) -> list[PackedBatch]:
    """The packs with `ref_logps_K` under the reference; unchanged on pipeline stages before the last, which have no log-probabilities."""
    with reference.in_place() as chunks:
        logps = score_packs(chunks, packs)
    return [pack if ref_K is None else replace(pack, ref_logps_K=ref_K) for pack, ref_K in zip(packs, logps, strict=True)]


@torch.no_grad()
def synchronise(reference: Reference, policy: list[torch.nn.Module], mixup_alpha: float) -> None:
    """ref <- (1 - a) ref + a policy: TR-DPO, arXiv 2404.09656."""
    held = reference.swapped or _weights(reference.chunks)
    for old, new in zip(held, _weights(policy), strict=True):
        old.copy_(torch.lerp(old.float(), new.to(old.device).float(), mixup_alpha))


def _weights(chunks: list[torch.nn.Module]) -> list[Tensor]:
    return [weight for chunk in chunks for weight in chunk.parameters()]
