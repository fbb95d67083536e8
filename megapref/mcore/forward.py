"""One forward pass over a pack: token ids in, log-probabilities of the completion tokens out.

Under pipeline parallelism every stage is given the pack (positions and segments are needed everywhere); only the last one gets log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.utils import unwrap_model
from torch import Tensor

from megapref.batch import PackedBatch
from megapref.mcore import device as devices
from megapref.mcore.attention import softcapped
from megapref.mcore.router import TrainedTokens
from megapref.mcore.segments import context_rows, segment_params

# Rows of the LM head computed at once: [chunk, V] is the largest tensor the head makes.
HEAD_CHUNK = 256
# Logits [K, V] of a pack up to this size are kept for backward; larger ones are computed again.
KEPT_LOGITS_BYTES = 64 * 2**20


def to_device(pack: PackedBatch) -> PackedBatch:
    """The pack with its tensors on this process's device; segments stay on the CPU, where attention is planned."""
    device = devices.current()
    move = lambda tensor: None if tensor is None else tensor.to(device, non_blocking=True)  # noqa: E731
    return replace(
        pack,
        token_ids_T=move(pack.token_ids_T),
        position_ids_T=move(pack.position_ids_T),
        query_index_K=move(pack.query_index_K),
        target_ids_K=move(pack.target_ids_K),
        cell_K=move(pack.cell_K),
        preference_P=move(pack.preference_P),
        desirable_C=move(pack.desirable_C),
        ref_logps_K=move(pack.ref_logps_K),
        extras={name: move(value) for name, value in pack.extras.items()},
    )


@dataclass(frozen=True)
class _Share:
    """What a context-parallel rank has of a pack: rows (None: all), which of the K tokens they predict, and which of its rows do."""

    rows: Tensor | None
    which_K: Tensor | None
    query_index_K: Tensor

    @classmethod
    def of(cls, pack: PackedBatch) -> _Share:
        size = parallel_state.get_context_parallel_world_size()
        if size == 1:
            return cls(None, None, pack.query_index_K)
        rows = torch.from_numpy(context_rows(len(pack.token_ids_T), size)[parallel_state.get_context_parallel_rank()]).to(pack.token_ids_T.device)
        places = torch.full_like(pack.token_ids_T, -1)
        places[rows] = torch.arange(len(rows), device=rows.device)
        place_K = places[pack.query_index_K]
        which_K = (place_K >= 0).nonzero()[:, 0]
        return cls(rows, which_K, place_K[which_K])

    def whole(self, values: Tensor, length: int) -> Tensor:
        """[length] the values of all context-parallel ranks' tokens, from those of this rank's."""
        return values if self.which_K is None else _JoinContext.apply(values, self.which_K, length)


class _JoinContext(torch.autograd.Function):
    """Every rank gets all values, and computes the same with them: a rank's gradient is that of its own values."""

    @staticmethod
    def forward(ctx, values: Tensor, which_K: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(which_K)
        whole_K = values.new_zeros(length).index_copy(0, which_K, values)
        dist.all_reduce(whole_K, group=parallel_state.get_context_parallel_group())
        return whole_K

    @staticmethod
    def backward(ctx, gradient_K: Tensor):
        return gradient_K[ctx.saved_tensors[0]], None, None


def forward_pack(chunk: torch.nn.Module, pack: PackedBatch) -> Tensor:
    """This stage's output for a pack: the next stage's input [T, 1, H], or on the last stage the final hidden states [K, 1, H] that predict.

    T and K are a context-parallel rank's own. Under sequence parallelism, where a rank has some of the rows, the last stage too gives them all.
    """
    config, share = unwrap_model(chunk).config, _Share.of(pack)
    output_rows = None if config.sequence_parallel else _padded(share.query_index_K, config.pad_multiple)
    window = config.window_size and config.window_size[0] + 1
    context = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    params = segment_params(pack.segments_S, len(pack.token_ids_T), pack.token_ids_T.device, output_rows, window, context, config.te_attention)
    tokens, positions = (ids if share.rows is None else ids[share.rows] for ids in (pack.token_ids_T, pack.position_ids_T))
    if config.num_moe_experts is not None and torch.is_grad_enabled():
        trained = TrainedTokens.of(pack, len(tokens), share.query_index_K, share.which_K)
        if config.sequence_parallel:
            trained = trained.part(parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size())
        params = replace(params, trained=trained)
    return chunk(tokens[None], positions[None], None, packed_seq_params=params)


def _padded(index_K: Tensor, multiple: int) -> Tensor:
    """The index with 0s at its end, of a length that matrix products take; what they make there is dropped."""
    return torch.nn.functional.pad(index_K, (0, -len(index_K) % multiple))


def completion_logps(
    chunk: torch.nn.Module, hidden: Tensor, pack: PackedBatch, wanted: frozenset[str] = frozenset()
) -> tuple[Tensor, dict[str, Tensor]]:
    """[K] float32: log-probabilities (temperature 1) of the pack's completion tokens, from the last stage's `forward_pack`.

    `wanted` may add of each distribution p: `entropy`, -sum p log p, with its gradient, and `log_sum_sq`, log sum p^2, without.
    The vocabulary may be split over tensor-parallel ranks and the rows over them (sequence parallel) and over context-parallel ranks; the result
    is whole on each.
    """
    model, share = unwrap_model(chunk), _Share.of(pack)
    if model.config.sequence_parallel:
        rows_KH = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)[:, 0].index_select(0, share.query_index_K)
    else:
        rows_KH = copy_to_tensor_model_parallel_region(hidden)[: len(share.query_index_K), 0]
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else model.output_layer.weight
    vocab_start = parallel_state.get_tensor_model_parallel_rank() * weight.shape[0]
    # Rows added so that the vocabulary divides by the tensor-parallel size are not words: they must not be in the softmax.
    num_words = min(max(model.true_vocab_size - vocab_start, 0), weight.shape[0])
    target_K = (pack.target_ids_K if share.which_K is None else pack.target_ids_K[share.which_K]) - vocab_start
    keep = torch.is_grad_enabled() and 4 * len(target_K) * num_words <= KEPT_LOGITS_BYTES
    cap = model.config.logit_softcap
    logps_K, entropy_K, log_sum_sq_K = _VocabParallelLogps.apply(rows_KH, weight, target_K, num_words, wanted, keep, cap)
    extras_K = {"entropy": entropy_K, "log_sum_sq": log_sum_sq_K}
    num_tokens = len(pack.target_ids_K)
    # In one order on every rank, which a set has not: each is a collective under context parallelism.
    return share.whole(logps_K, num_tokens), {name: share.whole(value, num_tokens) for name, value in extras_K.items() if name in wanted}


class _VocabParallelLogps(torch.autograd.Function):
    """Of each row's softmax(hidden W^T), the logits soft-capped where `cap` is given: log-probability of the target, entropy, log of the sum of
    squares (the latter two None where not wanted).

    In chunks of rows; logits are kept for backward if `keep`, otherwise computed again. `target_K` counts from this rank's first word; targets of
    other ranks fall outside [0, num_words).
    """

    @staticmethod
    def forward(ctx, hidden_KH: Tensor, weight_VH: Tensor, target_K: Tensor, num_words: int, wanted: frozenset[str], keep: bool, cap: float | None):
        mine_K = (target_K >= 0) & (target_K < num_words)
        local_K = target_K.where(mine_K, 0)
        words_VH = weight_VH[:num_words]
        with_entropy, with_squares = "entropy" in wanted, "log_sum_sq" in wanted
        lse_K, lse_squares_K = hidden_KH.new_full((2, len(target_K)), float("-inf"), dtype=torch.float32)
        logit_K, mean_logit_K = hidden_KH.new_zeros((2, len(target_K)), dtype=torch.float32)
        kept = []
        for rows in _chunks(len(target_K)) if num_words else ():
            logits = softcapped((hidden_KH[rows] @ words_VH.t()).float(), cap)
            lse_K[rows] = logits.logsumexp(1)
            logit_K[rows] = logits.gather(1, local_K[rows, None])[:, 0]
            if with_squares:
                lse_squares_K[rows] = (2 * logits).logsumexp(1)
            if with_entropy:
                mean_logit_K[rows] = torch.linalg.vecdot((logits - lse_K[rows, None]).exp(), logits)
            if keep:
                kept.append(logits)
        logit_K.masked_fill_(~mine_K, 0)
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() > 1:
            top_K = lse_K.clone()
            dist.all_reduce(top_K, dist.ReduceOp.MAX, group=group)
            mass_K = (lse_K - top_K).exp()
            sums = torch.stack([mass_K, logit_K, mass_K * mean_logit_K, (lse_squares_K - 2 * top_K).exp()])
            dist.all_reduce(sums, group=group)
            lse_K, logit_K, mean_logit_K, lse_squares_K = top_K + sums[0].log(), sums[1], sums[2] / sums[0], 2 * top_K + sums[3].log()
        entropy_K = lse_K - mean_logit_K if with_entropy else None
        ctx.save_for_backward(hidden_KH, weight_VH, local_K, mine_K, lse_K, entropy_K, *kept)
        ctx.num_words, ctx.cap = num_words, cap
        ctx.set_materialize_grads(False)
        log_sum_sq_K = lse_squares_K - 2 * lse_K if with_squares else None
        if with_squares:
            ctx.mark_non_differentiable(log_sum_sq_K)
        return logit_K - lse_K, entropy_K, log_sum_sq_K

    @staticmethod
    def backward(ctx, grad_K: Tensor | None, entropy_grad_K: Tensor | None, _):
        hidden_KH, weight_VH, local_K, mine_K, lse_K, entropy_K, *kept = ctx.saved_tensors
        words_VH = weight_VH[: ctx.num_words]
        grad_hidden, grad_weight = torch.zeros_like(hidden_KH), torch.zeros_like(weight_VH)
        grad_K = torch.zeros_like(lse_K) if grad_K is None else grad_K
        for number, rows in enumerate(_chunks(len(grad_K)) if ctx.num_words else ()):
            hidden = hidden_KH[rows]
            logits = kept[number] if kept else softcapped((hidden @ words_VH.t()).float(), ctx.cap)
            logp = logits - lse_K[rows, None]
            if entropy_grad_K is None:
                slope = logp.exp_().mul_(-grad_K[rows, None])
            else:  # dH / dz_v = -p_v (log p_v + H)
                slope = (entropy_grad_K[rows, None] * (logp + entropy_K[rows, None]) + grad_K[rows, None]).mul_(-logp.exp())
            slope[torch.arange(len(hidden), device=hidden.device), local_K[rows]] += mine_K[rows] * grad_K[rows]
            if ctx.cap is not None:  # d (c tanh(z / c)) / dz = 1 - tanh^2
                slope.mul_(1 - (logits / ctx.cap).square())
            slope = slope.to(hidden.dtype)
            torch.mm(slope, words_VH, out=grad_hidden[rows])
            grad_weight[: ctx.num_words].addmm_(slope.t(), hidden)
        return grad_hidden, grad_weight, None, None, None, None, None


def _chunks(length: int) -> list[slice]:
    return [slice(start, start + HEAD_CHUNK) for start in range(0, length, HEAD_CHUNK)]
