"""What samples: an inference engine on the weights of each model, in the layout of training or in one of tensor parallelism alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import chain

import numpy as np
import torch

from megapref.batch import ModelSpec
from megapref.config import Config
from megapref.convert.refit import refit
from megapref.mcore import setup
from megapref.mcore.generation import Draw, Engine
from megapref.mcore.model import build_model
from megapref.mcore.reference import Reference, resident
from megapref.parallel import Parallel

Chunks = list[torch.nn.Module]
Generate = Callable[..., list[list[int]]]  # as mcore.generation.Engine.generate
Sampler = Callable[..., Generate]  # (chunks, chunks of the other model of a mixture, ModelSpec where it is not the policy's) -> Generate
Load = Callable[[int], tuple[Chunks, ModelSpec]]  # the model of evaluation.against, which is to have so many positions


def make_engines(
    cfg: Config,
    spec: ModelSpec,
    max_length: int,
    policy: Chunks,
    ref: Reference | None,
    load_opponent: Load,
    mixture_coef: Callable[[], float],
) -> dict[str, Generate]:
    """What generates for each model that samples: `policy`, `reference`, `mixture`, `opponent`; `max_length` tokens at most, prompts included."""
    tensor = cfg.parallel.sampling_tensor(cfg.generation.parallel)
    sampler = partial(_as_trained, cfg, max_length) if tensor is None else _refitted(cfg, spec, max_length, tensor)
    own = sampler(policy)
    engines = {"policy": own}
    if ref:
        engines["reference"] = ref.during(own if ref.swapped else sampler(ref.chunks))
    if cfg.method.candidates == "policy_mixture":
        mixture = sampler(policy, ref.chunks)
        engines["mixture"] = lambda *request: mixture(*request, coefficient=mixture_coef())
    if cfg.evaluation.against not in ("reference", "rows"):
        engines["opponent"] = partial(_generate_once, sampler, load_opponent, max_length)
    return engines


def _generate_once(sampler: Sampler, load: Load, max_length: int, *args) -> list[list[int]]:
    """What the engine of a model generates that is there for this call only."""
    chunks, spec = load(max_length)
    return sampler(chunks, None, spec)(*args)


def _as_trained(cfg: Config, max_length: int, chunks: Chunks, second: Chunks | None = None, spec: ModelSpec | None = None) -> Generate:
    """On the weights themselves."""
    return Engine(chunks[0], cfg.generation, max_length, second and second[0]).generate


def _refitted(cfg: Config, policy_spec: ModelSpec, max_length: int, tensor: int) -> Sampler:
    """On copies of the weights in `tensor` parts, filled anew for every call and shared by the models; each takes some of the share's prompts."""
    groups = setup.sampling_groups(tensor)

    def build(spec: ModelSpec) -> Chunks:
        return resident(build_model(spec, Parallel(tensor=tensor), cfg.precision, cfg.kernels, groups)).chunks

    @cache
    def copy(number: int) -> Chunks:
        return build(policy_spec)

    def engine(copies: list[Chunks]) -> Engine:
        return Engine(copies[0][0], cfg.generation, max_length, *[second[0] for second in copies[1:]], groups=groups)

    @cache
    def shared(count: int) -> tuple[list[Chunks], Engine]:
        copies = [copy(number) for number in range(count)]
        return copies, engine(copies)

    def sampler(chunks: Chunks, second: Chunks | None = None, spec: ModelSpec | None = None) -> Generate:
        sources = [chunks] if second is None else [chunks, second]
        if spec is None:
            copies, on = shared(len(sources))
        else:
            copies = [build(spec)]
            on = engine(copies)

        def generate(prompts: list[list[int]], draw: Draw, limits: list[int], *args, **kwargs) -> list[list[int]]:
            for source, filled in zip(sources, copies, strict=True):
                refit(source, filled, spec or policy_spec, tensor)
            num_copies = setup.share_size() // tensor
            mine = np.array_split(np.arange(len(prompts)), num_copies)[setup.rank_in_share() // tensor]

            def draw_mine(logits: torch.Tensor, requests: np.ndarray, positions: np.ndarray) -> torch.Tensor:
                return draw(logits, mine[requests], positions)

            made = on.generate([prompts[i] for i in mine], draw_mine, [limits[i] for i in mine], *args, **kwargs)
            return list(chain(*setup.gather_over_share(made)[::tensor]))

        return generate

    return sampler
