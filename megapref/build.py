"""Builds what a run is made of, at the step of a checkpoint if there is one: models, optimizer, data, loss, reference."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megapref import sources
from megapref.batch import Loss, ModelSpec, PackedBatch, PairBatch, needs
from megapref.caching import with_reference
from megapref.config import Config
from megapref.convert.families import read_spec
from megapref.convert.hf import export_hf, find_model, fingerprint, load_hf
from megapref.data import ledger
from megapref.data.chat import load_tokenizer
from megapref.data.prompts import round_start
from megapref.engines import make_engines
from megapref.judge_model import local_model
from megapref.losses.combined import is_first_only, is_of_completions, parts
from megapref.mcore import batch_wide, checkpoint, overlap, reference, setup
from megapref.mcore.audit import audit
from megapref.mcore.kernels import Choice, choose, machine
from megapref.mcore.model import build_model
from megapref.mcore.optimizer import build_optimizer, wrap_for_training
from megapref.mcore.router import prepare_routers
from megapref.mcore.step import TrainState
from megapref.methods import compares_with_reference, load_losses
from megapref.opponent import load_opponent
from megapref.progress import Progress


@dataclass
class Run:
    """What a run is made of: the state that training changes, the frozen reference, where pairs come from, how they are judged."""

    state: TrainState
    progress: Progress
    total_steps: int
    has_reference: bool  # that the loss compares with
    loss_of_step: Callable[[int], Loss]
    prepare: sources.Prepare
    audit: Callable[[list], dict[str, float]]  # what precision does to pairs
    sync_reference: Callable[[], None]
    source: Iterator[PairBatch]
    evaluate: sources.Evaluate
    write_ledger: Callable[[PairBatch], None] | None  # of an online run: what became of a step's prompts, of all ranks
    export: Callable[[Path | None, Path], None]  # of the checkpoint's weights, or the policy's as they are, to the folder
    identity: dict[str, Any]  # what a resumed run must have in common with the one that wrote its checkpoint


def build(cfg: Config, resume_from: Path | None) -> Run:
    """Models, optimizer, tokenizer, rewards and the pair source, at the step of the checkpoint `resume_from` if there is one."""
    inputs = setup.on_every_rank(_read_inputs)(cfg)
    identity = _identity(cfg, inputs)
    policy = _load_model(cfg, inputs)
    has_reference = compares_with_reference(cfg)
    if has_reference and cfg.reference.mode == "cached":
        inputs = replace(inputs, data=with_reference(cfg, inputs.folder, policy, inputs.data))
    is_online = cfg.method.pairs == "online"  # its evaluation, and maybe an opponent, samples from the reference
    ref = None
    if cfg.reference.mode in ("resident", "swapped") and (has_reference or is_online):
        ref = _resident_reference(cfg, inputs) if cfg.reference.mode == "resident" else reference.swapped(policy)
    prepare_routers(policy, cfg.model.moe.router_aux_loss_coef, cfg.model.moe.freeze_router)
    chunks = wrap_for_training(policy, cfg.precision)
    moving = ref if cfg.reference.sync_steps else None
    state = TrainState(chunks, build_optimizer(chunks, cfg.optimizer, cfg.precision), moving_reference=moving)
    total_steps, progress = _total_steps(cfg, inputs.data), Progress()
    if resume_from:
        saved = checkpoint.load_checkpoint(state, resume_from)
        _check_goes_on(saved, identity, resume_from, total_steps)
        progress = Progress(**saved["progress"])
        if cfg.run.action == "train" and state.step < total_steps and not progress.stopped:
            _check_round(cfg, state.step, resume_from)

    def with_reference_logps(packs: list[PackedBatch]) -> list[PackedBatch]:
        return reference.fill_reference(ref, packs) if ref and has_reference else packs

    def prepare(rows: list, loss: Loss) -> tuple[list[PackedBatch], dict[str, float]]:
        packs, packing = sources.packs_of(cfg, rows)
        packs = batch_wide.fill_batch_wide(chunks, with_reference_logps(packs), parts(loss))
        if "mean_log_ratio" in needs(loss):
            total, count = state.log_ratios
            packs = batch_wide.with_extra(packs, "mean_log_ratio", total / max(count, 1))
        if "kl" in needs(loss):
            others = with_reference_logps(sources.mismatched_packs(cfg, rows, inputs.spec.max_positions))
            packs = batch_wide.with_extra(packs, "kl", max(0.0, batch_wide.mean_log_ratio(chunks, others)))
        return packs, packing

    def audit_pairs(rows: list) -> dict[str, float]:
        return audit(chunks, with_reference_logps(sources.packs_of(cfg, rows)[0]), ref if has_reference else None)

    def sync_reference() -> None:
        if moving and state.step % cfg.reference.sync_steps == 0:
            reference.synchronise(ref, policy, cfg.reference.mixup_alpha)

    def export(best: Path | None, folder: Path) -> None:
        if best:
            checkpoint.load_weights(policy, best)
        export_hf(policy, inputs.spec, inputs.folder, folder, replace=resume_from is not None)

    def write_ledger(batch: PairBatch) -> None:
        made_with = {"seed": cfg.run.seed, "tokenizer": ledger.vocabulary_digest(inputs.tokenizer)}
        versions = {"step": batch.step + 1, "weight_version": round_start(batch.step, cfg.generation.sync_every)}
        ledger.write_step(Path(cfg.run.dir) / "ledger", batch.contests, batch.pairs, **versions, **made_with)

    if is_online:
        opponent = partial(load_opponent, cfg, inputs.spec, inputs.tokenizer)
        max_length = sources.longest_sequence(cfg, chain(inputs.data.train, *inputs.data.validation.values()), inputs.data.max_length)
        coefficient = lambda: sources.mixture_coef(cfg, inputs.data, state.step)  # noqa: E731
        engines = make_engines(cfg, inputs.spec, max_length, state.chunks, ref, opponent, coefficient)
        judge = partial(local_model, cfg, inputs.spec, inputs.tokenizer, state.chunks, ref)
        first_only = is_first_only(inputs.losses[0])
        source, evaluate = sources.online_source(cfg, inputs.data, state, ref, inputs.tokenizer, engines, judge, first_only, total_steps)
    else:
        source, evaluate = sources.offline_source(cfg, inputs.data, state, inputs.losses, prepare)
    loss_of_step = partial(sources.of_epoch, cfg, inputs.data, inputs.losses)
    write = write_ledger if is_online and cfg.log.ledger else None
    functions = (loss_of_step, prepare, audit_pairs, sync_reference)
    return Run(state, progress, total_steps, has_reference, *functions, source, evaluate, write, export, identity)


def fill_cache(cfg: Config) -> None:
    """Scores the rows of the config that its reference cache lacks, and nothing else: what `build` does with reference.mode=cached."""
    inputs = setup.on_every_rank(_read_inputs)(cfg)
    with_reference(cfg, inputs.folder, _load_model(cfg, inputs), inputs.data)


def kernels_of(cfg: Config) -> Choice:
    """What computes the config's model on this machine."""
    return choose(read_spec(find_model(cfg.model.path)).transformer, cfg.parallel.tensor, cfg.precision, cfg.kernels, machine())


@dataclass(frozen=True)
class Inputs:
    """What is read before any model is made."""

    losses: list[Loss]  # of epoch 0, 1, ...
    folder: Path
    spec: ModelSpec
    tokenizer: PreTrainedTokenizerBase
    data: sources.Data


def _read_inputs(cfg: Config) -> Inputs:
    losses = load_losses(cfg.loss)
    folder = find_model(cfg.model.path)
    spec = read_spec(folder)
    tokenizer = load_tokenizer(cfg.model.tokenizer or str(folder), cfg.model.chat_template)
    return Inputs(losses, folder, spec, tokenizer, sources.load_data(cfg, tokenizer, spec.max_positions, is_of_completions(losses[0])))


@torch.no_grad()  # otherwise Transformer Engine keeps weights that are in FP8 in bf16 too, for an optimizer to start from
def _resident_reference(cfg: Config, inputs: Inputs) -> reference.Reference:
    precision = replace(cfg.precision, fp8_weights=cfg.reference.fp8_weights)
    return reference.resident(_load_model(replace(cfg, precision=precision), inputs))


def _load_model(cfg: Config, inputs: Inputs) -> list[torch.nn.Module]:
    if cfg.parallel.tp_comm_overlap:
        overlap.start(cfg.parallel, cfg.precision, cfg.pack_tokens, inputs.spec.transformer["hidden_size"])
    chunks = build_model(inputs.spec, cfg.parallel, cfg.precision, cfg.kernels)
    load_hf(chunks, inputs.spec, inputs.folder)
    return chunks


def _total_steps(cfg: Config, data: sources.Data) -> int:
    """The length of the run; a last batch that runs over the end of the last epoch counts."""
    if cfg.train.epochs is None:
        return cfg.train.steps
    steps = math.ceil(cfg.train.epochs * len(data.train) / cfg.train.global_batch_size)
    if steps <= cfg.optimizer.warmup_steps:
        raise ValueError(
            f"train.epochs={cfg.train.epochs:g} of {len(data.train)} rows is {steps} steps, but optimizer.warmup_steps={cfg.optimizer.warmup_steps}; "
            f"use at most {steps - 1}, or more epochs"
        )
    return steps


def _identity(cfg: Config, inputs: Inputs) -> dict[str, Any]:
    return {
        "run.seed": cfg.run.seed,
        "train.global_batch_size": cfg.train.global_batch_size,
        "data.shuffle": cfg.data.shuffle,
        "data.train": sources.fingerprint(inputs.data.train),
        "data.train.weight": [source.weight for source in cfg.data.train],
        "data.train_on": cfg.data.train_on,
        "model.path": fingerprint(inputs.folder),
        "model.moe.freeze_router": cfg.model.moe.freeze_router or None,  # the optimizer has no state of what is frozen; null in older checkpoints
    }


def _check_goes_on(saved: dict[str, Any], identity: dict[str, Any], path: Path, total_steps: int) -> None:
    """Another seed, data set, order of rows or starting model would be another run, and its curves not those of one."""
    names = {"data.train": "rows with the digest", "model.path": "a model with the digest"}
    wrong = [
        f"{key}: this run has {names.get(key, 'the value')} {json.dumps(value)}, the checkpoint was made with {json.dumps(before)}"
        for key, value in identity.items()
        if (before := saved["made_with"].get(key)) != value
    ]
    if saved["step"] > total_steps:
        wrong.append(f"train.steps={total_steps} is less than the {saved['step']} steps that the checkpoint has")
    if wrong:
        raise ValueError("\n".join([f"cannot resume from {path}:", *wrong, "Set it as it was, or start a new run from an exported model."]))


def _check_round(cfg: Config, step: int, path: Path) -> None:
    """Within a round of generation the weights that sampled are gone, and a run that goes on from there would not be the one that was left alone."""
    start = round_start(step, cfg.generation.sync_every)
    if cfg.method.pairs == "online" and step != start:
        raise ValueError(
            f"cannot resume from {path}: step {step} is within a round of generation.sync_every={cfg.generation.sync_every} steps, sampled "
            f"with the weights of step {start}; set generation.sync_every to a divisor of {step}, or resume from a checkpoint of a round's start"
        )
