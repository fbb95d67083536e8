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
from megapref.batch import Loss, PackedBatch, PairBatch, Prompt, TokenPair
from megapref.config import Config, to_yaml
from megapref.convert.hf import export_hf
from megapref.data.chat import load_tokenizer
from megapref.data.offline import load_pairs, pair_batches
from megapref.data.packing import pack, packing_stats
from megapref.data.prompts import load_prompts, prompt_batches
from megapref.inference.engine import make_generate
from megapref.mcore import checkpoint, reference, setup
from megapref.mcore.generation import Engine
from megapref.mcore.model import load_model
from megapref.mcore.optimizer import build_optimizer, learning_rate, wrap_for_training
from megapref.mcore.step import TrainState, evaluate_packs, train_step
from megapref.online import judges
from megapref.online.pairs import evaluate, online_pairs, sample_both, summarise
from megapref.plugins import load_plugin

# Validation prompts are sampled with the noise of this "step", the same at every evaluation and never that of a training step.
_EVALUATION_STEP = 2**40

Evaluate = Callable[[], tuple[dict[str, float], list[dict]]]


def main(cfg: Config) -> None:
    """Runs what `cfg` describes on this process's share of the world. ValueError, on every rank alike, for what the user can mend."""
    torch.manual_seed(cfg.run.seed)
    setup.start(cfg.parallel, cfg.run.seed)
    try:
        run_dir, resume_from = _prepare_run_dir(cfg)
        run = build(cfg, resume_from)
        log = runlog.RunLog(
            run_dir if setup.is_first_rank() else None,
            total_steps=cfg.train.steps,
            resumed_at=run.state.step if resume_from else None,
            tensorboard=cfg.log.tensorboard,
            wandb=cfg.log.wandb,
        )
        try:
            train(cfg, run, log, run_dir)
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
    tokenizer = load_tokenizer(cfg.model.tokenizer or cfg.model.path)
    policy, spec = load_model(cfg.model.path, cfg.parallel, cfg.precision.dtype)
    ref = reference.freeze(load_model(cfg.model.path, cfg.parallel, cfg.precision.dtype)[0]) if cfg.reference.mode == "resident" else None
    chunks = wrap_for_training(policy)
    state = TrainState(chunks, build_optimizer(chunks, cfg.optimizer, cfg.precision))
    if resume_from:
        checkpoint.load_checkpoint(state, resume_from)
    make_source = _online if cfg.method.pairs == "online" else _offline
    source, evaluate_now = make_source(cfg, state, ref, loss, tokenizer)
    return Run(state, ref, loss, source, evaluate_now, partial(export_hf, policy, spec, cfg.model.path))


def train(cfg: Config, run: Run, log: runlog.RunLog, run_dir: Path) -> None:
    """The loop: pairs, packs, reference, step; evaluation, samples and checkpoints when they are due."""
    state = run.state
    if state.step == 0:
        _evaluate_and_log(run, log, 0, {})
    for batch in run.source:
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
        if last:
            break
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
    room = cfg.pack.max_tokens - 2 * cfg.generation.max_new_tokens
    load = partial(
        load_prompts,
        tokenizer=tokenizer,
        max_prompt_length=cfg.data.max_prompt_length,
        truncation=cfg.data.truncation,
        room=room,
        on_bad_row=cfg.data.on_bad_row,
    )
    prompts, counts = load(cfg.data.train)
    longest = max(len(prompt.ids) for prompt in prompts)
    validation = list(chain.from_iterable(load([source])[0] for source in cfg.data.validation.values()))[: cfg.evaluation.max_prompts]
    max_length = max(longest, *(len(p.ids) for p in validation), 1) + cfg.generation.max_new_tokens
    engines = {"policy": Engine(state.chunks[0], cfg.generation, max_length)}
    if ref:
        engines["reference"] = Engine(ref[0], cfg.generation, max_length)
    generate = make_generate(engines, cfg.generation, tokenizer, cfg.run.seed)
    decide = setup.once_per_model(_decide(cfg))
    batches = prompt_batches(
        prompts,
        global_batch_size=cfg.train.global_batch_size,
        rank=setup.data_parallel_rank(),
        num_ranks=setup.data_parallel_size(),
        seed=cfg.run.seed,
        start_step=state.step,
        shuffle=cfg.data.shuffle,
    )
    source = online_pairs(batches, generate, decide, candidates=cfg.method.candidates)
    return source, _online_evaluation(validation, generate, decide, "reference" if ref else "policy")


def _decide(cfg: Config) -> judges.Decide:
    rewards = {
        name: (load_plugin(entry.function, entry.params, f"reward.{name}"), entry.weight) for name, entry in cfg.reward.items()
    }
    by_rewards = judges.decide_by_rewards(rewards, cfg.method.missing_eos_penalty, cfg.method.ties) if rewards else None
    if cfg.judge is None:
        return by_rewards
    return judges.decide_by_judge(load_plugin(cfg.judge.function, cfg.judge.params, "judge"), by_rewards)


def _online_evaluation(validation: list[Prompt], generate, decide: judges.Decide, opponent: str) -> Evaluate:
    """Policy against the frozen reference on the validation prompts; the reference's completions are sampled once."""
    mine = validation[setup.data_parallel_rank() :: setup.data_parallel_size()]
    baseline: list = []

    def evaluate_now() -> tuple[dict[str, float], list[dict]]:
        if not validation:
            return {}, []
        if not baseline:
            baseline.extend(generate(mine, opponent, step=_EVALUATION_STEP, side=1))
        policy = generate(mine, "policy", step=_EVALUATION_STEP, side=0)
        values, rows = evaluate(mine, policy, baseline, decide(mine, policy, baseline))
        gathered = setup.gather_over_data_parallel(values)
        return summarise({name: list(chain.from_iterable(part[name] for part in gathered)) for name in values}), rows

    return evaluate_now


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)
