"""Every way to lay a job out over N GPUs, predicted and ranked, and why the best is the best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from megapref.batch import ModelSpec
from megapref.plan.hardware import USABLE_MEMORY, Gpu
from megapref.plan.memory import Kernels, Memory, memory
from megapref.plan.shapes import Layout, Sizes, stage_layers
from megapref.plan.timing import StepTime, model_flops, step_time
from megapref.plan.workload import Job, PackSizes, rank_packs, total

# Context parallelism is for packs this long; the formulas do not know how small products become slow when a short one is split.
LONG_PACK = 16384

Runnable = Callable[[Layout], str | None]  # why the product cannot run a layout today, as `option=value ...`; None where it can


@dataclass(frozen=True)
class Prediction:
    """What one layout is predicted to need. `packs` are the heaviest rank's; `obstacle` is why the product cannot run it today."""

    layout: Layout
    memory: Memory
    time: StepTime
    num_packs: int
    mfu: float  # model FLOPs of policy training per second and GPU, per peak; recomputation and the reference do not count
    fits: bool
    obstacle: str | None


@dataclass(frozen=True)
class Plan:
    """All layouts of a job on `num_gpus` GPUs, the fastest first among those that fit; those that do not after them, the nearest to fitting first."""

    spec: ModelSpec
    job: Job
    gpu: Gpu
    num_gpus: int
    kernels: Kernels
    ranked: list[Prediction]
    asked: Layout | None = None  # the layout that somebody has in mind

    @property
    def usable(self) -> float:
        """Bytes of a GPU that may be planned for."""
        return self.gpu.memory * USABLE_MEMORY

    @property
    def fitting(self) -> list[Prediction]:
        return [p for p in self.ranked if p.fits]

    @property
    def of_asked(self) -> Prediction | None:
        return next((p for p in self.ranked if p.layout == self.asked), None)

    @property
    def chosen(self) -> Prediction | None:
        """The fastest that fits and that the product can run today, None where there is none."""
        return next((p for p in self.fitting if p.obstacle is None), None)

    @property
    def fastest(self) -> Prediction | None:
        """The fastest that fits, whether the product can run it or not."""
        return next(iter(self.fitting), None)


def make_plan(
    spec: ModelSpec, job: Job, gpu: Gpu, num_gpus: int, kernels: Kernels, runnable: Runnable, asked: Layout | None = None
) -> Plan:
    """All layouts of the job on so many GPUs, predicted and ranked; `asked` is one of them, or another.

    Errors: ValueError for a pair that fits in no pack, or a GPU without the job's type.
    """
    if job.products not in gpu.flops:
        raise ValueError(f"{gpu.name} has no {job.products} matrix products; plan for bf16 (precision=bf16, --dtype bf16) or for another GPU")
    layouts = dict.fromkeys([*all_layouts(spec, job, num_gpus, gpu.per_node, kernels), *([asked] if asked else [])])
    packs_of = cache(lambda data, multiple: rank_packs(job, data, multiple))
    predictions = [_predict(spec, job, gpu, kernels, runnable, layout, packs_of) for layout in layouts]
    ranked = sorted(predictions, key=lambda p: (not p.fits, p.time.total if p.fits else p.memory.total, _effort(p.layout)))
    return Plan(spec, job, gpu, num_gpus, kernels, ranked, asked)


def all_layouts(spec: ModelSpec, job: Job, num_gpus: int, per_node: int, kernels: Kernels) -> Iterator[Layout]:
    """Layouts that use all the GPUs: tensor parallelism inside a node, whole key-value heads and MLP columns for each of its ranks.

    Fused attention keeps so little that it is not worth to be recomputed alone.
    """
    recomputations = ("none", "full") if kernels == "fused" else ("none", "selective", "full")
    m = Sizes.of(spec)
    for tensor in _divisors(per_node, num_gpus, m.groups, m.heads, m.ffn):
        for pipeline in range(1, min(m.layers, num_gpus // tensor) + 1):
            layers = stage_layers(m.layers, pipeline)
            if layers is None or num_gpus % (tensor * pipeline):
                continue
            for context in (1, 2, 4, 8) if job.max_tokens >= LONG_PACK else (1,):
                data, left = divmod(num_gpus, tensor * pipeline * context)
                if left or data > len(job.pairs):
                    continue
                for virtual in _virtual(pipeline, layers):
                    for sequence in (False, True) if tensor > 1 else (False,):
                        for recompute in recomputations:
                            yield Layout(tensor, pipeline, virtual, context, data, sequence, recompute)


def reasons(plan: Plan, best: Prediction) -> list[str]:
    """Sentences that say why this layout: what fills its memory and its time, and what the neighbouring choices would do."""
    m, t = best.memory, best.time
    largest = max(("weights", "gradients", "optimizer", "reference", "activations", "logits", "kv_cache"), key=lambda name: getattr(m, name))
    slowest = max((name for name in vars(t) if name != "compute"), key=lambda name: getattr(t, name))
    sentences = [
        f"{m.total / 1e9:.1f} of {plan.usable / 1e9:.1f} GB usable; most of it {largest.replace('_', ' ')} ({getattr(m, largest) / 1e9:.1f} GB)",
        f"{t.total:.3g} s a step: {t.compute / t.total:.0%} computation, then {slowest} ({getattr(t, slowest) / t.total:.0%})",
    ]
    for name, smaller in (("tensor", "less tensor parallelism"), ("pipeline", "fewer stages")):
        size = getattr(best.layout, name)
        others = [p for p in plan.ranked if getattr(p.layout, name) < size and p.obstacle is None]
        if size > 1 and others:
            sentences.append(f"{smaller}: {_compare(others, best)}")
    others = [p for p in plan.fitting if p.obstacle is None and p.layout != best.layout]
    if others:
        sentences.append(f"next best: {others[0].layout}, {others[0].time.total / best.time.total - 1:+.1%} time")
    if plan.fastest != best and plan.fastest is not None:
        f = plan.fastest
        sentences.append(f"faster, but cannot run today ({f.obstacle}): {f.layout}, {f.time.total / best.time.total - 1:+.1%} time")
    return sentences


def _compare(others: list[Prediction], best: Prediction) -> str:
    fitting = [p for p in others if p.fits]
    if fitting:
        return f"at best {fitting[0].time.total / best.time.total - 1:+.1%} time ({fitting[0].layout})"
    return f"does not fit; the smallest needs {others[0].memory.total / 1e9:.1f} GB ({others[0].layout})"


def _predict(spec, job: Job, gpu: Gpu, kernels: Kernels, runnable: Runnable, layout: Layout, packs_of: Callable) -> Prediction:
    packs: list[PackSizes] = packs_of(layout.data, layout.tensor if layout.sequence else 1)
    needs, time = memory(spec, job, layout, packs, kernels), step_time(spec, job, layout, packs, kernels, gpu)
    flops = model_flops(spec, total(packs)) * layout.data
    return Prediction(
        layout=layout,
        memory=needs,
        time=time,
        num_packs=len(packs),
        mfu=flops / time.total / layout.num_gpus / gpu.flops[job.products],
        fits=needs.total <= gpu.memory * USABLE_MEMORY,
        obstacle=runnable(layout),
    )


def _effort(layout: Layout) -> tuple[int, int, int, int, bool]:
    """Of layouts that take equally long the plainest comes first."""
    return layout.tensor, layout.pipeline, layout.context, layout.virtual_pipeline, layout.sequence


def _divisors(limit: int, *numbers: int) -> list[int]:
    return [n for n in range(1, limit + 1) if not any(number % n for number in numbers)]


def _virtual(pipeline: int, layers: list[int]) -> list[int]:
    """Chunks per stage; where the ends have a layer fewer, embedding and head count as one."""
    return [n for n in (1, 2, 4, 8) if max(layers) % n == 0] if pipeline > 1 else [1]
