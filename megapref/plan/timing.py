"""Seconds of a step: sampling, reference, forward and backward with communication and pipeline bubbles, gradients, optimizer.

Nothing is assumed to overlap: what a cluster hides of communication behind computation makes it faster than this.
Bubbles follow Narayanan et al., arXiv:2104.04473: (p - 1) / (v m) of the time of m packs on p stages of v chunks each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megapref.batch import ModelSpec
from megapref.plan.hardware import LINK_EFFICIENCY, LINK_LATENCY, MATMUL_EFFICIENCY, MEMORY_EFFICIENCY, Gpu
from megapref.plan.memory import Kernels, cache_bytes, cache_per_token, layer_activations
from megapref.plan.shapes import Layout, Sizes, buffer_size, layer_matmul_parameters, matrix_parameters, num_parameters, stage_layers
from megapref.plan.workload import Job, PackSizes, total


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by cause; they add up."""

    generation: float
    reference: float
    compute: float  # forward, backward and recomputation of the busiest stage
    tensor: float  # collectives of tensor and sequence parallelism
    context: float
    pipeline: float  # messages between stages
    bubble: float
    data: float  # gradients reduced, weights gathered
    optimizer: float

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Pass:
    """Seconds of one sweep of a rank's packs over its stage, without bubbles."""

    compute: float
    tensor: float
    context: float
    pipeline: float

    @property
    def total(self) -> float:
        return self.compute + self.tensor + self.context + self.pipeline

    def times(self, factor: float) -> Pass:
        return Pass(*(factor * getattr(self, f.name) for f in fields(self)))


def step_time(spec: ModelSpec, job: Job, layout: Layout, packs: list[PackSizes], kernels: Kernels, gpu: Gpu) -> StepTime:
    """Of one optimizer step; `packs` are those of the heaviest data-parallel rank, all others wait for it."""
    forward = forward_pass(spec, job, layout, packs, kernels, gpu)
    backward = forward.times(2)
    again = {"none": 0.0, "selective": attention_flops(spec, layout, total(packs)) / rate(gpu, job.dtype), "full": forward.compute}[layout.recompute]
    bubble_share = (layout.pipeline - 1) / (layout.virtual_pipeline * len(packs))
    train = forward.total + backward.total + again
    tensor_again = forward.tensor if layout.recompute == "full" else 0.0
    reference = forward.total * (1 + (layout.pipeline - 1) / len(packs)) if job.scores_reference else 0.0
    return StepTime(
        generation=generation_time(spec, job, layout, gpu) if job.online else 0.0,
        reference=reference + _swap(spec, job, layout, gpu),
        compute=forward.compute + backward.compute + again,
        tensor=forward.tensor + backward.tensor + tensor_again,
        context=forward.context + backward.context,
        pipeline=forward.pipeline + backward.pipeline,
        bubble=bubble_share * (train + tensor_again),
        data=_data_parallel(spec, job, layout, gpu),
        optimizer=_optimizer(spec, job, layout, gpu),
    )


def rate(gpu: Gpu, dtype: str) -> float:
    """Operations per second that large products reach."""
    return gpu.flops[dtype] * MATMUL_EFFICIENCY


def attention_flops(spec: ModelSpec, layout: Layout, packs: PackSizes) -> float:
    """Of one forward pass on a rank of the largest stage: scores and their products with values, 4 D operations per head and score."""
    m = Sizes.of(spec)
    layers = max(stage_layers(m.layers, layout.pipeline))
    return layers * 4 * m.width * m.heads * packs.scores / layout.tensor / layout.context


def forward_flops(spec: ModelSpec, layout: Layout, packs: PackSizes) -> tuple[float, float, float]:
    """Operations of a rank's forward pass: (matrix products of the largest stage's layers, their attention, head)."""
    layers = max(stage_layers(spec.transformer["num_layers"], layout.pipeline))
    linear = 2 * layers * layer_matmul_parameters(spec, layout.tensor) * packs.tokens / layout.context
    head = 2 * spec.transformer["hidden_size"] * spec.padded_vocab_size(layout.tensor) / layout.tensor * packs.trained / layout.context
    return linear, attention_flops(spec, layout, packs), head


def model_flops(spec: ModelSpec, packs: PackSizes) -> float:
    """Operations that a step needs whatever the layout: forward once, backward twice that; no recomputation, no reference."""
    return 3 * sum(forward_flops(spec, Layout(), packs))


def forward_pass(spec: ModelSpec, job: Job, layout: Layout, packs: list[PackSizes], kernels: Kernels, gpu: Gpu) -> Pass:
    """The stage with most layers, or the last with its head, whichever takes longer."""
    m, everything = Sizes.of(spec), total(packs)
    layers = stage_layers(m.layers, layout.pipeline)
    linear, attention, head_flops = forward_flops(spec, layout, everything)
    stage = linear / rate(gpu, job.products) + attention / rate(gpu, job.dtype)
    head = head_flops * 4 / 3 / rate(gpu, job.dtype)  # the product, again in backward: four where other products are three
    seconds = max(stage, stage * layers[-1] / max(layers) + head)
    plain = Layout(layout.tensor, sequence=layout.sequence)
    # What is saved is written once and read once; other products of small operations are left out.
    moved = 2 * max(layers) * layer_activations(m, job, plain, everything, kernels) / layout.context
    rows = job.bytes * m.hidden * everything.tokens / layout.context
    per_layer = 2 * all_reduce(rows, layout.tensor, gpu, len(packs))
    keys = 2 * job.bytes * m.groups * m.width / layout.tensor * everything.tokens
    message = rows / (layout.tensor if layout.sequence else 1)
    sends = layout.virtual_pipeline if layout.pipeline > 1 else 0
    stride = layout.tensor * layout.context * layout.data
    return Pass(
        compute=seconds + moved / (gpu.bandwidth * MEMORY_EFFICIENCY),
        tensor=max(layers) * per_layer,
        context=max(layers) * gather(keys, layout.context, layout.tensor * layout.context, gpu, len(packs)),
        pipeline=sends * (message / _link(stride + 1, gpu) + len(packs) * LINK_LATENCY),
    )


def all_reduce(size: float, ranks: int, gpu: Gpu, calls: int = 1) -> float:
    """Seconds of summing `size` bytes over a ring of tensor-parallel ranks, 2 (n - 1) / n of them sent; as a reduce-scatter and an all-gather
    under sequence parallelism, which takes as long."""
    return 2 * gather(size, ranks, ranks, gpu, calls)


def gather(size: float, ranks: int, span: int, gpu: Gpu, calls: int = 1) -> float:
    """Seconds of gathering, or of reducing and scattering, `size` bytes over a ring of `ranks`, (n - 1) / n of them sent, in a group that
    reaches over `span` neighbouring GPUs."""
    if ranks == 1:
        return 0.0
    return size * (ranks - 1) / ranks / _link(span, gpu) + calls * LINK_LATENCY


def _link(span: int, gpu: Gpu) -> float:
    """Bytes per second between GPUs within `span` neighbours: NVLink inside a node, else the network."""
    return LINK_EFFICIENCY * (gpu.node if span <= gpu.per_node else gpu.network)


def _data_parallel(spec: ModelSpec, job: Job, layout: Layout, gpu: Gpu) -> float:
    """Gradients reduced and scattered, weights gathered, of the stage that holds most."""
    ranks = layout.data * layout.context
    size = max(buffer_size(spec, layout, stage) for stage in {0, layout.pipeline - 1})
    return gather((job.gradient_bytes + (1 if job.fp8_weights else job.bytes)) * size, ranks, layout.tensor * ranks, gpu, calls=2)


def _optimizer(spec: ModelSpec, job: Job, layout: Layout, gpu: Gpu) -> float:
    """The shard's state, gradients and weights read and written, the gradients once more for their norm; what is offloaded sends gradients
    down and weights up over PCIe, and its step on the CPU is left out."""
    size = max(buffer_size(spec, layout, stage) for stage in {0, layout.pipeline - 1}) / (layout.data * layout.context)
    per_element = (1 - job.offload) * (2 * job.optimizer_bytes + 2 * job.gradient_bytes + 2 * job.bytes) + job.gradient_bytes
    sent = job.offload * (job.gradient_bytes + job.bytes)
    return size * (per_element / (gpu.bandwidth * MEMORY_EFFICIENCY) + sent / (gpu.host * LINK_EFFICIENCY))


def _swap(spec: ModelSpec, job: Job, layout: Layout, gpu: Gpu) -> float:
    """A swapped reference goes in and the policy out, then back: every weight four times over PCIe."""
    if job.reference != "swapped":
        return 0.0
    parameters = max(num_parameters(spec, layout, stage) for stage in {0, layout.pipeline - 1})
    return 4 * job.bytes * parameters / (gpu.host * LINK_EFFICIENCY)


def generation_time(spec: ModelSpec, job: Job, layout: Layout, gpu: Gpu) -> float:
    """Seconds to sample all candidates of a rank's prompts to their full length.

    The floor that memory bandwidth sets: a token needs every weight of every stage, one stage after another, and the keys and values of
    what was written so far. Prompts are computed once for each candidate. Samples of the reference come after those of the policy.
    """
    m, turns = Sizes.of(spec), 2 if job.samples_reference else 1
    samples = -(-job.prompts // layout.data) * job.candidates / turns  # of one model
    prompt = sum(pair.prompt for pair in job.pairs) / len(job.pairs)
    slots = max(1, min(job.max_requests, int(cache_bytes(spec, job, layout) // (cache_per_token(spec, job, layout) * (prompt + job.new_tokens)))))
    rounds = math.ceil(samples / slots)
    at_once = samples / rounds
    # In FP8 the layers' matrices are read so.
    weights = (job.bytes * num_parameters(spec) - (matrix_parameters(spec, Layout(), 0) if job.fp8 else 0)) / layout.tensor
    keys = at_once * (prompt + job.new_tokens / 2) * cache_per_token(spec, job, layout) * layout.pipeline
    rows = job.bytes * m.hidden * at_once
    collectives = m.layers * 2 * all_reduce(rows, layout.tensor, gpu)
    messages = (layout.pipeline - 1) * (rows / _link(layout.tensor * layout.context * layout.data + 1, gpu) + LINK_LATENCY)
    token = (weights + keys) / (gpu.bandwidth * MEMORY_EFFICIENCY) + collectives + messages
    prefill = 2 * num_parameters(spec) / layout.tensor * samples * prompt / rate(gpu, job.products)
    return turns * (rounds * job.new_tokens * token + prefill)
