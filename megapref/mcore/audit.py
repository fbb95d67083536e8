"""What a run's precision does to its pairs: some are scored once more, one precision higher, and compared.

FP8 is compared with bf16, by leaving FP8 out of the matrix products; bf16 with fp32, on the same weights in fp32, which are there for the moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn import Parameter

from megapref.batch import PackedBatch
from megapref.mcore import device, overlap
from megapref.mcore.reference import Reference, fill_reference
from megapref.mcore.step import reduce_sums, score_packs


def audit(chunks: list[torch.nn.Module], packs: list[PackedBatch], reference: Reference | None = None) -> dict[str, float]:
    """Metrics of the packs' log-probabilities less those one precision higher, the same on every rank; a collective of all ranks.

    The `reference` that the packs were scored with is scored again too; what came from elsewhere (a cache) stays as it is.

    `audit/kl`: mean over completion tokens of exp(d) - 1 - d with d the higher less the run's own, an estimate of their KL in nats that is never
    negative (k3 of Schulman, "Approximating KL divergence", 2020). `audit/largest_difference`: of a token's log-probability. Of pairs also
    `audit/margin_difference`, the mean of the absolute difference of (first less second, less the reference's), and `audit/sign_flips`, the share
    whose margin has another sign.
    """
    own = score_packs(chunks, packs)
    with one_precision_higher([*chunks, *(reference.chunks if reference and reference.swapped is None else ())]):
        higher = score_packs(chunks, packs)
        higher_packs = fill_reference(reference, packs) if reference else packs
    scored = [one for one in zip(packs, own, higher_packs, higher, strict=True) if one[1] is not None]
    sums = reduce_sums([_compared(*one) for one in scored])
    largest = torch.tensor(max([float((a - b).abs().max()) for _, a, _, b in scored if len(a)], default=0.0), device=device.current())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    metrics = {"audit/kl": sums["kl"] / max(sums["tokens"], 1), "audit/largest_difference": float(largest)}
    if sums["pairs"]:
        metrics |= {f"audit/{name}": sums[name] / sums["pairs"] for name in ("margin_difference", "sign_flips")}
    return metrics


def _compared(pack: PackedBatch, own_K: Tensor, higher_pack: PackedBatch, higher_K: Tensor) -> dict[str, Tensor]:
    """Sums over a pack; a pair counts where both of its sides have tokens."""
    difference_K = higher_K - own_K
    sums = {"kl": (difference_K.expm1() - difference_K).sum(), "tokens": own_K.new_tensor(float(len(own_K)))}
    margins, is_pair = [], torch.zeros(0, dtype=torch.bool)
    if pack.preference_P is not None:
        cell_K = pack.cell_K.to(own_K.device)
        by_side = lambda values_K: own_K.new_zeros(2 * pack.num_rows).index_add(0, cell_K, values_K).view(-1, 2)  # noqa: E731
        is_pair = (by_side(torch.ones_like(own_K)) > 0).all(1)
        for values_K, ref_K in ((own_K, pack.ref_logps_K), (higher_K, higher_pack.ref_logps_K)):
            ratios_K = values_K if ref_K is None else values_K - ref_K.to(own_K.device)
            margins.append(-by_side(ratios_K).diff(dim=1)[:, 0][is_pair])
    own_P, higher_P = margins or [own_K.new_zeros(0)] * 2
    sums["pairs"] = own_K.new_tensor(float(is_pair.sum()))
    sums["margin_difference"] = (own_P - higher_P).abs().sum()
    sums["sign_flips"] = (own_P.sign() != higher_P.sign()).sum()
    return sums


@contextmanager
def one_precision_higher(chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Inside, the chunks compute in bf16 instead of FP8, or in fp32 instead of bf16. Nothing may be trained meanwhile."""
    models = unwrap_model(chunks)
    configs = list({id(model.config): model.config for model in models}.values())
    before = [(config, config.fp8, config.pipeline_dtype) for config in configs]
    # Other parameters for the moment: one whose data changed its type would lose the hook that adds up its gradient.
    places = [] if configs[0].fp8 else [place for model in models for module in model.modules() for place in _places(module)]
    exact = {parameter: Parameter(parameter.detach().float(), requires_grad=False) for _, _, parameter in places}
    for config in configs:
        config.pipeline_dtype = config.pipeline_dtype if config.fp8 else torch.float32
        config.fp8 = None
    try:
        for parameters, name, parameter in places:
            parameters[name] = exact[parameter]
        with overlap.paused(models):
            yield
    finally:
        for config, fp8, pipeline_dtype in before:
            config.fp8, config.pipeline_dtype = fp8, pipeline_dtype
        for parameters, name, parameter in places:
            parameters[name] = parameter


def _places(module: torch.nn.Module) -> list[tuple[dict[str, Parameter | None], str, Parameter]]:
    return [(module._parameters, name, parameter) for name, parameter in module._parameters.items() if parameter is not None]
