"""The plan of a config's run, or of a model's config.json: reads lengths of rows and a model's numbers, no weights, and starts no process."""

from __future__ import annotations

import dataclasses
import json
from itertools import combinations
from pathlib import Path

from megapref.batch import ModelSpec, Prompt, TokenCompletion, TokenPair
from megapref.config import Config, Parallel
from megapref.convert.families import read_spec, to_spec
from megapref.data.chat import load_tokenizer
from megapref.losses.combined import is_of_completions
from megapref.mcore.model import check_layout
from megapref.methods import compares_with_reference, load_losses
from megapref.online.pairs import models_of
from megapref.plan.hardware import Gpu
from megapref.plan.layouts import Plan, Runnable, make_plan
from megapref.plan.memory import Kernels
from megapref.plan.shapes import Layout, stage_layers
from megapref.plan.workload import Job, PairLengths, spread
from megapref.sources import load_data

ROWS_READ = 2000  # of each source, to learn how long rows are


def plan_config(cfg: Config, num_gpus: int, gpu: Gpu) -> Plan:
    """The plan of the config's run, on GPUs with Transformer Engine. Errors: ValueError for rows, a layout or a type that cannot be used."""
    spec = read_model(cfg.model.path)
    data = num_gpus // (cfg.parallel.tensor * cfg.parallel.pipeline * cfg.parallel.context)
    shared = {name: getattr(cfg.parallel, name) for name in ("tensor", "pipeline", "virtual_pipeline", "context", "sequence", "recompute")}
    check_layout(spec, cfg.parallel)
    return make_plan(spec, job_of(cfg, spec), gpu, num_gpus, _kernels(cfg), obstacles(spec), asked=Layout(**shared, data=data))


def _kernels(cfg: Config) -> Kernels:
    return "torch" if cfg.precision.dtype == "fp32" or "torch" in (cfg.kernels.layers, cfg.kernels.attention) else "fused"


def read_model(path: str) -> ModelSpec:
    """The model of a folder, of a config.json, or of a hub name, of which the config.json is downloaded."""
    if Path(path).is_dir():
        return read_spec(path)
    if Path(path).is_file():
        try:
            return to_spec(json.loads(Path(path).read_text()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    from huggingface_hub import hf_hub_download

    try:
        return read_spec(Path(hf_hub_download(path, "config.json")).parent)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is neither a folder nor a config.json, nor a model on the Hugging Face hub: {reason}") from error


def obstacles(spec: ModelSpec) -> Runnable:
    """Says of a layout why the product cannot run it today, None where it can."""

    def why(layout: Layout) -> str | None:
        names = [f.name for f in dataclasses.fields(Parallel) if hasattr(layout, f.name)]
        layers = stage_layers(spec.transformer["num_layers"], layout.pipeline)
        ends = {"first_stage_layers": layers[0], "last_stage_layers": layers[-1]} if layers and len(set(layers)) > 1 else {}
        try:
            check_layout(spec, Parallel(**{name: getattr(layout, name) for name in names}, **ends))
        except ValueError as error:
            return str(error).partition(";")[0]
        return None

    return why


def job_of(cfg: Config, spec: ModelSpec) -> Job:
    """What a step of the config's run computes, with the lengths that the first rows of each source have."""
    is_online = cfg.method.pairs == "online"
    has_reference = is_online or compares_with_reference(cfg)
    k = cfg.method.num_candidates
    prompts = cfg.train.global_batch_size if is_online else 0
    num_pairs = cfg.train.global_batch_size * (_pairs_per_prompt(cfg) if is_online else 1)
    return Job(
        pairs=spread(_histogram(cfg, spec), num_pairs),
        max_tokens=cfg.pack.max_tokens,
        share_prompt=cfg.pack.share_prompt,
        dtype=cfg.precision.dtype,
        fp8=cfg.precision.fp8 is not None,
        fp8_weights=cfg.precision.fp8_weights,
        fp8_reference=cfg.reference.fp8_weights,
        gradients=cfg.precision.gradients,
        moments=cfg.precision.moments,
        offload=cfg.optimizer.offload,
        reference=cfg.reference.mode if has_reference else "none",
        prompts=prompts,
        candidates=k if is_online else 0,
        new_tokens=cfg.generation.max_new_tokens if is_online else 0,
        samples_reference=is_online and cfg.method.candidates == "policy_reference",
        max_requests=cfg.generation.max_requests,
        kv_cache=cfg.generation.kv_cache_gb and cfg.generation.kv_cache_gb * 2**30,
    )


def histogram_of(rows: list[tuple[PairLengths, float]]) -> list[tuple[PairLengths, float]]:
    """The lengths in order of their sum, so that `spread` takes some of every size."""
    return sorted(rows, key=lambda row: row[0].prompt + row[0].first + row[0].second)


def lengths_of(row: Prompt | TokenPair | TokenCompletion, new_tokens: int, max_length: int) -> PairLengths:
    """A row's tokens; a prompt's completions are taken to be as long as they may be: `new_tokens`, or less where `max_length` ends them."""
    match row:
        case Prompt():
            new = min(new_tokens, max_length - len(row.ids))
            return PairLengths(len(row.ids), new, new)
        case TokenCompletion():
            return PairLengths(len(row.prompt_ids), len(row.ids), 0)
    return PairLengths(len(row.prompt_ids), len(row.first_ids), len(row.second_ids))


def _histogram(cfg: Config, spec: ModelSpec) -> list[tuple[PairLengths, float]]:
    """The lengths of the first rows of every source, weighted as the sources are."""
    first = [dataclasses.replace(source, take=min(source.take or ROWS_READ, ROWS_READ)) for source in cfg.data.train]
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, train=first, validation={}, streaming=False))
    tokenizer = load_tokenizer(cfg.model.tokenizer or cfg.model.path, cfg.model.chat_template)
    data = load_data(cfg, tokenizer, spec.max_positions, is_of_completions(load_losses(cfg.loss)[0]))
    rows, new = data.train, cfg.generation.max_new_tokens
    shares = [weight / size for weight, size in zip(rows.weights or rows.sizes, rows.sizes, strict=True)]
    weights = [share for share, size in zip(shares, rows.sizes, strict=True) for _ in range(size)]
    return histogram_of([(lengths_of(row, new, data.max_length), weight) for row, weight in zip(rows, weights, strict=True)])


def _pairs_per_prompt(cfg: Config) -> int:
    """One, or all of a prompt's candidates two by two, of two models one of each."""
    if cfg.method.pairing == "best_worst":
        return 1
    models = models_of(cfg.method.candidates, cfg.method.num_candidates)
    return sum(len(set(models)) == 1 or a != b for a, b in combinations(models, 2))
