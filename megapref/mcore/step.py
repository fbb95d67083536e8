"""One optimizer step, with all parallelism in it, and forward passes over packs without one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megapref import phases
from megapref.batch import Logps, Loss, PackedBatch, PairLogps, UnpairedLogps, needs
from megapref.mcore import cpu, device, setup
from megapref.mcore.forward import completion_logps, forward_pack, to_device
from megapref.mcore.optimizer import apply_gradients
from megapref.mcore.router import take_balance

if TYPE_CHECKING:
    from megapref.mcore.reference import Reference


@dataclass
class TrainState:
    """What an optimizer step changes, and nothing else: this process's model chunks, its share of the optimizer, the steps done."""

    chunks: list[torch.nn.Module]
    optimizer: object
    step: int = 0
    bad_steps: int = 0  # skipped in a row
    moving_reference: Reference | None = None  # one that is synchronised now and then
    log_ratios: tuple[float, float] = (0.0, 0.0)  # of the completions of all steps: sum of lp - lr, and how many


def train_step(state: TrainState, packs: list[PackedBatch], loss: Loss, lr: float) -> dict[str, float]:
    """Trains one step on this rank's packs and returns metrics of the global batch, the same on every rank.

    The loss is the sum over all pairs of all ranks divided by their number, whatever the packing and the layout. A step with a non-finite loss
    or gradient norm changes nothing and is counted in `state.bad_steps` (metric `skipped`).
    """
    with cpu.core_calls():
        for chunk in state.chunks:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
    sums = run_packs(state.chunks, packs, partial(_loss_of_pack, loss), backward=True, wanted=needs(loss))
    count, metrics = _means(reduce_sums(sums))
    metrics |= take_balance(state.chunks, count)
    with cpu.core_calls():
        state.optimizer.prepare_grads()
        grad_norm = float(state.optimizer.get_grad_norm())
        good = math.isfinite(grad_norm) and math.isfinite(metrics["loss"])
        if good and count > 0:
            apply_gradients(state.optimizer, grad_norm, lr)
            if "objective/kl" in metrics:  # a mean over completions
                state.log_ratios = state.log_ratios[0] + count * metrics["objective/kl"], state.log_ratios[1] + count
    state.step += 1
    state.bad_steps = 0 if good else state.bad_steps + 1
    return {**metrics, "grad_norm": grad_norm, "lr": lr, "num_pairs": count, "skipped": float(not good)}


def evaluate_packs(chunks: list[torch.nn.Module], packs: list[PackedBatch], loss: Loss) -> dict[str, float]:
    """The loss and metrics of `train_step`, without training."""
    with torch.no_grad():
        count, metrics = _means(reduce_sums(run_packs(chunks, packs, partial(_loss_of_pack, loss), backward=False, wanted=needs(loss))))
    return metrics | {"num_pairs": count}


def score_packs(chunks: list[torch.nn.Module], packs: list[PackedBatch]) -> list[Tensor | None]:
    """Log-probabilities [K] of each pack's completion tokens, without gradients; None on pipeline stages before the last."""

    def keep(logps: Logps):
        return logps.policy_K.sum(), 0, {"logps": logps.policy_K}

    with torch.no_grad():
        results = run_packs(chunks, packs, keep, backward=False)
    return [result["logps"] for result in results] if results else [None] * len(packs)


def run_packs(
    chunks: list[torch.nn.Module],
    packs: list[PackedBatch],
    consume: Callable[[Logps], tuple[Tensor, int, dict]],
    backward: bool,
    wanted: frozenset[str] = frozenset(),
) -> list[dict]:
    """Runs every pack through the pipeline in Core's schedule; `consume(logps)` gives (loss sum, count, result) on the last stage.

    `wanted` as in `forward.completion_logps`. Returns the results in pack order on the last stage, an empty list before it.
    """
    iterators = [iter(packs) for _ in chunks]
    # Core's bookkeeping makes small tensors on "the GPU"; the model's own work is done inside `plain_torch()`.
    with cpu.core_calls():
        return get_forward_backward_func()(
            forward_step_func=partial(_forward_step, consume, wanted),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=len(packs),
            seq_length=max(len(pack.token_ids_T) for pack in packs),
            micro_batch_size=1,
            forward_only=not backward,
        )


def _forward_step(consume, wanted: frozenset[str], iterator: Iterator[PackedBatch], chunk: torch.nn.Module):
    phases.moved()
    pack = to_device(next(iterator))
    with cpu.plain_torch(), phases.pack("forward"):
        output = forward_pack(chunk, pack)

    def finish(hidden: Tensor):
        with phases.pack("head and loss"):
            loss_sum, count, result = consume(_logps(pack, *completion_logps(chunk, hidden, pack, wanted)))
        # Core sums counts over context-parallel ranks too, which all have the whole loss.
        counted = count if parallel_state.get_context_parallel_rank() == 0 else 0
        return loss_sum, torch.tensor(counted, dtype=torch.int, device=device.current()), result

    return output, finish


def _logps(pack: PackedBatch, policy_K: Tensor, extras_K: dict[str, Tensor]) -> Logps:
    """What a loss sees of a pack; without a reference its log-probabilities are 0."""
    ref_K = torch.zeros_like(policy_K) if pack.ref_logps_K is None else pack.ref_logps_K
    if pack.preference_P is None:
        return UnpairedLogps(policy_K, ref_K, pack.cell_K, pack.desirable_C, pack.extras)
    return PairLogps(policy_K, ref_K, pack.cell_K, pack.preference_P, pack.extras, extras_K)


def _loss_of_pack(loss: Loss, logps: Logps) -> tuple[Tensor, int, dict]:
    output = loss(logps)
    sums = {"loss": output.loss_sum.detach(), **output.metric_sums}
    return output.loss_sum, output.count, {**sums, "count": torch.tensor(float(output.count))}


def _means(sums: dict[str, float]) -> tuple[float, dict[str, float]]:
    """The number of pairs, and what sums over them are per pair, or per what they count themselves."""
    own = {name.removeprefix("count "): value for name, value in sums.items() if name.startswith("count ")}
    metrics = {name: value for name, value in sums.items() if name != "count" and not name.startswith("count ")}
    return sums["count"], {name: value / max(own.get(name, sums["count"]), 1) for name, value in metrics.items()}


def reduce_sums(results: list[dict[str, Tensor]]) -> dict[str, float]:
    """Sums the packs' sums over packs and data-parallel ranks; the same numbers on every rank of every pipeline stage."""
    sums = None
    if results:
        names = list(results[0])
        totals = torch.stack([torch.stack([result[name].detach().double().cpu() for result in results]).sum() for name in names])
        totals = totals.to(device.current())
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        sums = dict(zip(names, totals.tolist(), strict=True))
    return setup.from_last_stage(sums)
