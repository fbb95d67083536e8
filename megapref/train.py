"""One run: build what the config asks for, loop over the pair source, train, log, save. The only wiring there is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

import torch

from megapref import runlog
from megapref.batch import Completion, Generate, Loss, PackedBatch, PairBatch, Prompt, TokenPair
from megapref.config import Config, to_yaml
from megapref.convert.families import read_spec
from megapref.convert.hf import export_hf, find_model, load_hf
from megapref.data.chat import load_tokenizer
from megapref.data.offline import load_pairs, offline_pairs
from megapref.data.packing import pack, packing_stats
from megapref.data.prompts import load_prompts, prompt_batches
from megapref.inference.engine import make_generate
from megapref.mcore import checkpoint, reference, setup
from megapref.mcore.generation import Engine
from megapref.mcore.model import build_model
from megapref.mcore.optimizer import build_optimizer, learning_rate, wrap_for_training
from megapref.mcore.step import TrainState, evaluate_packs, train_step
from megapref.online import judges
from megapref.online.pairs import evaluate, online_pairs, summarise
from megapref.plugins import load_plugin

# Validation prompts are sampled with the noise of this "step", the same at every evaluation and never that of a training step.
_EVALUATION_STEP = 2**40
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Evaluate = Callable[[], tuple[dict[str, float], list[dict]]]


def main(cfg: Config) -> None:
    """Runs what `cfg` describes on this process's share of the world. ValueError, on every rank alike, for what the user can mend."""
    torch.manual_seed(cfg.run.seed)
    setup.start(cfg.parallel, cfg.run.seed)
    run_dir = Path(cfg.run.dir)
    try:
        resume_from = _checkpoint_to_resume(cfg)
        setup.on_first_rank(runlog.create_run_dir)(run_dir, to_yaml(cfg), resume=cfg.run.resume is not None)
        run = build(cfg, resume_from)
        open_log = partial(runlog.RunLog, total_steps=cfg.train.steps, tensorboard=cfg.log.tensorboard, wandb=cfg.log.wandb)
        log = setup.on_first_rank(open_log)(run_dir, resumed_at=run.state.step if resume_from else None) or open_log(None)
        try:
            train(cfg, run, log)
        finally:
            log.close()
    finally:
        setup.stop()


@dataclass
class Run:
    """What a run is made of: the state that training changes, the frozen reference, where pairs come from, how they are judged."""

    state: TrainState
    reference_chunks: list[torch.nn.Module] | None
    loss: Loss
    source: Iterator[PairBatch]
    evaluate: Evaluate
    export: Callable[[Path], None]


def build(cfg: Config, resume_from: Path | None) -> Run:
    """Models, optimizer, tokenizer, rewards and the pair source, at the step of the checkpoint `resume_from` if there is one."""
    loss = load_plugin(cfg.loss.function, cfg.loss.params, "loss")
    folder = find_model(cfg.model.path)
    spec = read_spec(folder)
    tokenizer = load_tokenizer(cfg.model.tokenizer or str(folder))

    def load() -> list[torch.nn.Module]:
        chunks = build_model(spec, cfg.parallel, _DTYPES[cfg.precision.dtype])
        load_hf(chunks, spec, folder)
        return chunks

    policy = load()
    ref = reference.freeze(load()) if cfg.reference.mode == "resident" else None
    chunks = wrap_for_training(policy)
    state = TrainState(chunks, build_optimizer(chunks, cfg.optimizer, cfg.precision))
    if resume_from:
        checkpoint.load_checkpoint(state, resume_from)
    make_source = _online if cfg.method.pairs == "online" else _offline
    source, evaluate_now = make_source(cfg, state, ref, loss, tokenizer)
    return Run(state, ref, loss, source, evaluate_now, partial(export_hf, policy, spec, folder))


def _checkpoint_to_resume(cfg: Config) -> Path | None:
    if cfg.run.resume == "auto":
        return checkpoint.latest_checkpoint(Path(cfg.run.dir) / "checkpoints")
    return Path(cfg.run.resume) if cfg.run.resume else None


def train(cfg: Config, run: Run, log: runlog.RunLog) -> None:
    """The loop: pairs, packs, reference, step; evaluation, samples and checkpoints when they are due."""
    state, run_dir = run.state, Path(cfg.run.dir)
    if state.step == 0:
        _evaluate_and_log(run, log, 0, {})
    while state.step < cfg.train.steps:
        batch = next(run.source)
        metrics = _step(cfg, run, batch)
        if state.step == 1 and run.reference_chunks:
            _check_first_step(metrics)
        last = state.step == cfg.train.steps
        if _due(state.step, cfg.evaluation.every, last):
            _evaluate_and_log(run, log, state.step, metrics)
        else:
            log.write(state.step, metrics)
        if cfg.log.samples_every and (state.step == 1 or state.step % cfg.log.samples_every == 0):
            log.samples(state.step, batch.samples[: cfg.log.samples])
        if state.bad_steps >= cfg.train.max_bad_steps:
            raise ValueError(
                f"{state.bad_steps} steps in a row had a non-finite loss or gradient norm (step {state.step}: loss {metrics['loss']}, "
                f"grad_norm {metrics['grad_norm']}) and were skipped; train.max_bad_steps={cfg.train.max_bad_steps} stops the run: "
                "lower optimizer.lr, or look at the rows and rewards of these steps"
            )
        if _due(state.step, cfg.save.every, last):
            checkpoint.save_checkpoint(state, run_dir / "checkpoints", cfg.save.keep, {"seed": cfg.run.seed})
    if cfg.save.export:
        run.export(run_dir / "hf")
    log.summary()


def _step(cfg: Config, run: Run, batch: PairBatch) -> dict[str, float]:
    """One optimizer step on the step's pairs of all ranks; its metrics, of the global batch."""
    gathered = setup.gather_over_data_parallel((batch.pairs, batch.sums))
    # Ranks hold every n-th pair of the step: taking turns restores the order, whatever the number of ranks.
    pairs = [pair for turn in zip_longest(*(pairs for pairs, _ in gathered)) for pair in turn if pair is not None]
    sums: dict[str, list[float]] = {}
    for name, (total, count) in chain.from_iterable(rank_sums.items() for _, rank_sums in gathered):
        entry = sums.setdefault(name, [0.0, 0.0])
        entry[0], entry[1] = entry[0] + total, entry[1] + count
    packs, packing = _packs_of(cfg, pairs)
    started = time.perf_counter()
    if run.reference_chunks:
        packs = reference.fill_reference(run.reference_chunks, packs)
    scored = time.perf_counter()
    metrics = train_step(run.state, packs, run.loss, learning_rate(run.state.step + 1, cfg.train.steps, cfg.optimizer))
    trained = time.perf_counter()
    metrics |= {name: total / count if count else total for name, (total, count) in sums.items()}
    if "objective/scores" in metrics and "objective/non_score_reward" in metrics:
        metrics["objective/rlhf_reward"] = metrics["objective/scores"] + metrics["objective/non_score_reward"]
    if "beta" in cfg.loss.params:
        metrics["beta"] = cfg.loss.params["beta"]
    seconds = trained - started + metrics.get("time/generate", 0.0) + metrics.get("time/judge", 0.0)
    metrics |= {"time/score_reference": scored - started, "time/train": trained - scored}
    return metrics | packing | {"perf/tokens_per_s": packing["pack/tokens"] / seconds, "perf/pairs_per_s": len(pairs) / seconds}


def _packs_of(cfg: Config, pairs: list[TokenPair]) -> tuple[list[PackedBatch], dict[str, float]]:
    """This rank's packs of the step's pairs, and how well all ranks' packs are filled."""
    packs = pack(
        pairs,
        max_tokens=cfg.pack.max_tokens,
        num_ranks=setup.data_parallel_size(),
        share_prompt=cfg.pack.share_prompt,
        pad_multiple=cfg.parallel.tensor if cfg.parallel.sequence else 1,
    )
    return packs[setup.data_parallel_rank()], packing_stats(packs)


def _check_first_step(metrics: dict[str, float]) -> None:
    """Policy and reference are the same model before the first update: every log-ratio is 0, and DPO's loss is ln 2."""
    measured = {name: metrics[name] for name in ("rewards/chosen", "rewards/rejected", "objective/kl") if name in metrics}
    wrong = {name: value for name, value in measured.items() if not abs(value) < 1e-3}
    if wrong:
        raise ValueError(
            f"at the first step policy and reference must agree (DPO: loss ln 2 = {math.log(2):.6f}), but {wrong} with loss "
            f"{metrics['loss']:.6f}; the two were not loaded from the same weights, or a layer is not deterministic"
        )


def _evaluate_and_log(run: Run, log: runlog.RunLog, step: int, metrics: dict[str, float]) -> None:
    started = time.perf_counter()
    evaluation, rows = run.evaluate()
    if evaluation:
        metrics = metrics | evaluation | {"time/evaluate": time.perf_counter() - started}
    if metrics:
        log.write(step, metrics)
    log.samples(step, rows)


def _online(cfg: Config, state: TrainState, ref, loss: Loss, tokenizer) -> tuple[Iterator[PairBatch], Evaluate]:
    load = partial(
        load_prompts,
        tokenizer=tokenizer,
        max_prompt_length=cfg.data.max_prompt_length,
        truncation=cfg.data.truncation,
        room=cfg.pack.max_tokens - 2 * cfg.generation.max_new_tokens,
        on_bad_row=cfg.data.on_bad_row,
    )
    prompts, counts = load(cfg.data.train)
    validation = [prompt for source in cfg.data.validation.values() for prompt in load([source])[0]][: cfg.evaluation.max_prompts]
    max_length = max(len(prompt.ids) for prompt in prompts + validation) + cfg.generation.max_new_tokens
    engines = {"policy": Engine(state.chunks[0], cfg.generation, max_length)}
    if ref:
        engines["reference"] = Engine(ref[0], cfg.generation, max_length)
    generate = make_generate(engines, cfg.generation, tokenizer, cfg.run.seed)
    batches = prompt_batches(
        prompts,
        global_batch_size=cfg.train.global_batch_size,
        rank=setup.data_parallel_rank(),
        num_ranks=setup.data_parallel_size(),
        seed=cfg.run.seed,
        start_step=state.step,
        shuffle=cfg.data.shuffle,
    )
    decide = setup.once_per_model(_decide(cfg, cfg.method.ties))
    source = online_pairs(batches, generate, decide, candidates=cfg.method.candidates, counts=counts)
    # A tie is half a win when models are compared, whatever training does with it.
    return source, _against_reference(validation, generate, setup.once_per_model(_decide(cfg, "soft")))


def _decide(cfg: Config, ties: str) -> judges.Decide:
    rewards = {name: (load_plugin(entry.function, entry.params, f"reward.{name}"), entry.weight) for name, entry in cfg.reward.items()}
    by_rewards = judges.decide_by_rewards(rewards, cfg.method.missing_eos_penalty, ties) if rewards else None
    if cfg.judge is None:
        return by_rewards
    return judges.decide_by_judge(load_plugin(cfg.judge.function, cfg.judge.params, "judge"), by_rewards)


def _against_reference(validation: list[Prompt], generate: Generate, decide: judges.Decide) -> Evaluate:
    """Policy against the frozen reference on the validation prompts; the reference's completions are sampled once."""
    mine = validation[setup.data_parallel_rank() :: setup.data_parallel_size()]
    baseline: list[Completion] = []

    def evaluate_now() -> tuple[dict[str, float], list[dict]]:
        if not validation:
            return {}, []
        if not baseline:
            baseline.extend(generate(mine, "reference", step=_EVALUATION_STEP, side=1))
        policy = generate(mine, "policy", step=_EVALUATION_STEP, side=0)
        values, rows = evaluate(mine, policy, baseline, decide(mine, policy, baseline))
        gathered = setup.gather_over_data_parallel(values)
        return summarise({name: list(chain.from_iterable(part[name] for part in gathered)) for name in values}), rows

    return evaluate_now


def _offline(cfg: Config, state: TrainState, ref, loss: Loss, tokenizer) -> tuple[Iterator[PairBatch], Evaluate]:
    load = partial(
        load_pairs,
        tokenizer=tokenizer,
        max_length=cfg.data.max_length,
        max_prompt_length=cfg.data.max_prompt_length,
        max_completion_length=cfg.data.max_completion_length,
        truncation=cfg.data.truncation,
        pack_tokens=cfg.pack.max_tokens,
        share_prompt=cfg.pack.share_prompt,
        on_bad_row=cfg.data.on_bad_row,
    )
    pairs, counts = load(cfg.data.train)
    source = offline_pairs(
        pairs,
        global_batch_size=cfg.train.global_batch_size,
        rank=setup.data_parallel_rank(),
        num_ranks=setup.data_parallel_size(),
        seed=cfg.run.seed,
        start_step=state.step,
        shuffle=cfg.data.shuffle,
        counts=counts,
    )
    sets = {name: load([validation])[0] for name, validation in cfg.data.validation.items()}

    def evaluate_now() -> tuple[dict[str, float], list[dict]]:
        metrics = {}
        for name, rows in sets.items():
            packs, _ = _packs_of(cfg, rows[: cfg.evaluation.max_prompts])
            if ref:
                packs = reference.fill_reference(ref, packs)
            measured = evaluate_packs(state.chunks, packs, loss)
            metrics |= {f"validation-{name}_{key}": value for key, value in measured.items()}
        return metrics, []

    return source, evaluate_now


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)
