"""Bytes on one GPU: what stays for the whole run, and what a training step or generation adds at its peak.

Activations follow Korthikanti et al., arXiv:2205.05198, table 2, for grouped queries, gated MLPs, packs of T tokens and no dropout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megapref.batch import ModelSpec
from megapref.plan.shapes import Layout, Sizes, buffer_size, matrix_parameters, num_parameters, shard_sizes, stage_layers
from megapref.plan.workload import Job, PackSizes

# `torch`: the separate operations that run without Transformer Engine, measured on CPU. `fused`: flash-attention over segments, one-kernel norms and
# activations, as Transformer Engine has them; not measured.
Kernels = Literal["torch", "fused"]
HEAD_CHUNK = 256  # rows of logits that exist at once: forward.HEAD_CHUNK of mcore/
KEPT_LOGITS_BYTES = 64 * 2**20  # logits of a pack up to this size are kept for backward: forward.KEPT_LOGITS_BYTES
BYTES_PER_TRAINED = 40  # log-probabilities, indices and the loss's own tensors, of each trained token


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank of one pipeline stage. The first six stay; then a step's peak, training or generation, whichever is more."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    reference: int
    tables: int  # rotary angles
    activations: int
    logits: int  # the chunk of the head, and the gradients of the head and of the largest weight
    kv_cache: int

    @property
    def fixed(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.reference + self.tables

    @property
    def total(self) -> int:
        return self.fixed + max(self.activations + self.logits, self.kv_cache)


def memory(spec: ModelSpec, job: Job, layout: Layout, packs: list[PackSizes], kernels: Kernels) -> Memory:
    """Of the pipeline stage that needs most; `packs` are those of the heaviest data-parallel rank.

    The first two stages and the last are looked at: those between hold as much as the second and fewer packs.
    """
    stages = sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1})
    return max((stage_memory(spec, job, layout, packs, kernels, stage) for stage in stages), key=lambda m: m.total)


def stage_memory(spec: ModelSpec, job: Job, layout: Layout, packs: list[PackSizes], kernels: Kernels, stage: int) -> Memory:
    """Of one pipeline stage."""
    parameters, buffer = num_parameters(spec, layout, stage), buffer_size(spec, layout, stage)
    largest_pack = max(packs, key=lambda p: p.tokens)
    is_resident = job.reference == "resident"
    matrices = matrix_parameters(spec, layout, stage) if job.fp8 else 0
    return Memory(
        stage=stage,
        # Products in FP8 take a weight and its transpose in FP8; made of bf16 weights both are kept through a step.
        weights=job.bytes * buffer + (0 if job.fp8_weights else 2 * matrices),
        gradients=job.gradient_bytes * buffer,
        optimizer=round((1 - job.offload) * job.optimizer_bytes * buffer / (layout.data * layout.context)),
        # Without a backward pass there is no transpose.
        reference=job.bytes * parameters + (1 - job.bytes if job.fp8_reference else 1) * matrices if is_resident else 0,
        tables=(1 + is_resident) * 4 * spec.max_positions * 2 * len(spec.rotary_frequencies + spec.local_rotary_frequencies),
        activations=round(stage_activations(Sizes.of(spec), job, layout, largest_pack, len(packs), kernels, stage)),
        logits=_logits(spec, job, layout, largest_pack, stage),
        kv_cache=round(cache_bytes(spec, job, layout)) if job.online else 0,
    )


def cache_bytes(spec: ModelSpec, job: Job, layout: Layout) -> float:
    """Of keys and values on a rank: as the job says, or what all requests need that are decoded together."""
    if job.kv_cache is not None:
        return job.kv_cache
    longest = max(pair.prompt for pair in job.pairs) + job.new_tokens
    return job.max_requests * longest * cache_per_token(spec, job, layout)


def cache_per_token(spec: ModelSpec, job: Job, layout: Layout) -> float:
    """Bytes of keys and values of one token on a rank."""
    m = Sizes.of(spec)
    return 2 * job.bytes * m.groups * m.width / layout.tensor * max(stage_layers(m.layers, layout.pipeline))


def packs_in_flight(layout: Layout, num_packs: int, stage: int) -> float:
    """Packs whose activations a stage holds at once, in Core's one-forward-one-backward schedule; interleaved, (1 + (p - 1) / (p v)) p."""
    p, v = layout.pipeline, layout.virtual_pipeline
    held = p - stage if v == 1 else p + (p - 1) / v - stage
    return min(held, num_packs)


def stage_activations(m: Sizes, job: Job, layout: Layout, pack: PackSizes, num_packs: int, kernels: Kernels, stage: int) -> float:
    """Bytes saved for backward by the packs in flight on a stage, each as large as `pack`."""
    pack = _context_share(pack, layout.context)
    layers, last = stage_layers(m.layers, layout.pipeline)[stage], stage == layout.pipeline - 1
    each = layer_activations(m, job, layout, pack, kernels)
    held = packs_in_flight(layout, num_packs, stage) * layers * each
    if layout.recompute == "full":  # one layer at a time is made anew
        held += layer_activations(m, job, Layout(layout.tensor, sequence=layout.sequence), pack, kernels)
    if last:
        held += last_layer_saving(m, job, layout, pack, kernels) + final_activations(m, job, layout, pack, kernels)
    return held + (8 * pack.tokens if stage == 0 else 0)


def layer_activations(m: Sizes, job: Job, layout: Layout, pack: PackSizes, kernels: Kernels) -> float:
    """Bytes that one layer saves of a pack."""
    if layout.recompute == "full":
        return job.bytes * m.hidden * pack.tokens / (layout.tensor if layout.sequence else 1)
    norms = m.norms * _norm(m, job, layout, pack.tokens, kernels)
    return norms + _attention(m, job, layout, pack, kernels) + _mlp(m, job, layout, pack.tokens, kernels)


def last_layer_saving(m: Sizes, job: Job, layout: Layout, pack: PackSizes, kernels: Kernels) -> float:
    """What the last layer saves less (a negative number): its MLP sees the rows that predict a token alone, except with sequence parallelism."""
    if layout.sequence or layout.recompute == "full":
        return 0.0
    fewer = pack.tokens - pack.trained
    return -m.norms / 2 * _norm(m, job, layout, fewer, kernels) - _mlp(m, job, layout, fewer, kernels)


def final_activations(m: Sizes, job: Job, layout: Layout, pack: PackSizes, kernels: Kernels) -> float:
    """Bytes that the last norm and the head save; small logits are kept in float32."""
    logits = 4 * pack.trained * m.vocab / layout.tensor
    rows = pack.tokens if layout.sequence else pack.trained
    gathered = job.bytes * m.hidden * pack.trained if layout.sequence else 0
    return _norm(m, replace(job, fp8=False), layout, rows, kernels) + gathered + BYTES_PER_TRAINED * pack.trained + (
        logits if logits <= KEPT_LOGITS_BYTES else 0
    )


def _norm(m: Sizes, job: Job, layout: Layout, rows: float, kernels: Kernels) -> float:
    """Input, output (the next product's input) and statistics; torch's RMS norm keeps the normalised input besides."""
    copies, statistics = (3 if m.rms and kernels == "torch" else 2), (1 if m.rms else 2)
    return (((copies - 1) * job.bytes + job.input_bytes) * m.hidden + 4 * statistics) * rows / (layout.tensor if layout.sequence else 1)


def _attention(m: Sizes, job: Job, layout: Layout, pack: PackSizes, kernels: Kernels) -> float:
    query, key = m.heads * m.width / layout.tensor, m.groups * m.width / layout.tensor
    heads, groups = m.heads / layout.tensor, m.groups / layout.tensor
    product = job.input_bytes * query * pack.tokens  # the input of the output projection
    per_token = 0.0
    if layout.recompute == "selective":
        per_token += query + 2 * key  # what attention starts from
        return product + job.bytes * per_token * pack.tokens + _qk_norm(m, job, query, key, heads, groups, kernels) * pack.tokens
    per_token += query  # queries as attention takes them
    masks = 0
    if kernels == "torch":
        per_token += query + 4 * m.width  # attention's output before it is put in order; cos and sin for queries and keys
        masks = pack.masked
    saved = job.bytes * (per_token * pack.tokens + 2 * key * pack.key_rows + masks)
    return product + saved + (4 * heads + _qk_norm(m, job, query, key, heads, groups, kernels)) * pack.tokens


def _qk_norm(m: Sizes, job: Job, query: float, key: float, heads: float, groups: float, kernels: Kernels) -> float:
    """Bytes per token of the norms of queries and keys: inputs and statistics; in torch the normalised ones, and keys as a view of all three."""
    if not m.qk_norm:
        return 0.0
    elements = query + key if kernels == "fused" else 2 * query + (query + 2 * key) + key
    return job.bytes * elements + 4 * (heads + groups)


def _mlp(m: Sizes, job: Job, layout: Layout, rows: float, kernels: Kernels) -> float:
    """Outputs of the first product and inputs of the second; separate gating keeps the activated half, and the other one as it is multiplied."""
    copies = 2 if not m.gated else 5 if kernels == "torch" else 3
    return ((copies - 1) * job.bytes + job.input_bytes) * m.ffn / layout.tensor * rows


def _context_share(pack: PackSizes, context: int) -> PackSizes:
    """A pack split over context-parallel ranks: each gathers all keys."""
    share = [value / context for value in (pack.tokens, pack.trained, pack.scores, pack.masked)]
    return PackSizes(share[0], share[1], pack.key_rows, share[2], share[3]) if context > 1 else pack


def _logits(spec: ModelSpec, job: Job, layout: Layout, pack: PackSizes, stage: int) -> int:
    """Tensors that live for a moment: a chunk of logits and of their gradients in float32, and in bfloat16 where that is the type; the head's
    and the hidden states' gradients; before the head, the gradient of the largest weight, before it is added to the buffer."""
    largest = job.bytes * max(size for _, size in shard_sizes(spec, layout, stage))
    if stage < layout.pipeline - 1:
        return largest
    words = spec.padded_vocab_size(layout.tensor) // layout.tensor
    chunk = min(HEAD_CHUNK, pack.trained) * words * (4 if job.bytes == 4 else 4 + 2 * job.bytes)
    return chunk + max(largest, job.bytes * words * spec.transformer["hidden_size"]) + job.bytes * spec.transformer["hidden_size"] * pack.trained
