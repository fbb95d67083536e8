"""One run: build what the config asks for, loop over the pair source, train, log, save."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

import torch

from megapref import runlog, signals
from megapref.batch import PairBatch, means, summed
from megapref.build import Run, build, kernels_of
from megapref.config import Config, to_yaml
from megapref.data import ledger
from megapref.data.prompts import round_start
from megapref.losses.combined import combine
from megapref.losses.pairs import sft
from megapref.mcore import capabilities, checkpoint, memory, profiling, setup
from megapref.mcore.kernels import check_machine, machine
from megapref.mcore.optimizer import learning_rate
from megapref.mcore.step import TrainState, train_step
from megapref.phases import phase
from megapref.progress import audit_warnings, best_steps, evaluated, observed
from megapref.saves import Saves


def main(cfg: Config) -> bool:
    """Runs what `cfg` describes on this process's share of the world; returns whether it stopped before its end, as it was asked to.

    ValueError, on every rank alike, for what the user can mend.
    """
    check_machine(cfg, machine())
    profiling.check(cfg.profile)
    torch.manual_seed(cfg.run.seed)
    setup.start(cfg.parallel, cfg.run.seed, signals.seconds(cfg.run.stuck_after or ""), cfg.run.stuck_after or "")
    try:
        return _main(cfg)
    except Exception as error:  # whatever it is: the other ranks must not wait, and the first error is the one to be told
        if other := setup.failed(error):
            raise SystemExit(other) from None
        raise
    finally:
        setup.stop()


def _main(cfg: Config) -> bool:
    with phase("loading", 0):
        resume_from = _checkpoint_to_resume(cfg)
        setup.on_first_rank(_make_run_dir)(cfg, resume_from)
        run = build(cfg, resume_from)
        log = setup.on_first_rank(_open_log)(cfg, run, resume_from) or runlog.RunLog(None, total_steps=run.total_steps)
    try:
        with memory.measured() as by_phase:
            if not by_phase:
                log.message(f"{memory.SO_FAR} is the peak since the start: this system does not let a process measure that of a phase")
            return (train if cfg.run.action == "train" else evaluate)(cfg, run, log)
    finally:
        log.close()


def train(cfg: Config, run: Run, log: runlog.RunLog) -> bool:
    """The loop: pairs, packs, reference, step; evaluation, samples and checkpoints when they are due. True where it was asked to stop."""
    state, progress, run_dir = run.state, run.progress, Path(cfg.run.dir)
    record = partial(_record, cfg, log)
    deadline = setup.on_first_rank(signals.deadline)(cfg.save.before_deadline)
    saves = Saves(cfg.save, run_dir / "checkpoints", log.message)
    is_untrained, saved = state.step == 0, {}
    if is_untrained:
        evaluation, rows = _evaluate(run)
        evaluated(progress, cfg, 0, evaluation)
        record(0, evaluation, rows, [])
    while state.step < run.total_steps and not progress.stopped:
        with profiling.traced(cfg.profile, state.step + 1, run_dir / "profile"):
            with phase("pairs", state.step + 1):
                batch = _of_all_ranks(next(run.source))
                if run.write_ledger:
                    setup.on_first_rank(log.os_errors_told()(run.write_ledger))(batch)
            metrics, rows = step(cfg, run, batch) | saved, []
            warnings = observed(progress, cfg, metrics, run.has_reference) + audit_warnings(cfg, metrics)
            last = state.step == run.total_steps or bool(progress.stopped)
            if _due(state.step, cfg.evaluation.every, last):
                evaluation, rows = _evaluate(run)
                evaluated(progress, cfg, state.step, evaluation)
                metrics |= evaluation
            record(state.step, metrics, rows, batch.samples)
            if metrics["skipped"]:
                _stop_after_bad_steps(cfg, state, metrics)
            elif is_untrained:
                is_untrained = False
                if run.has_reference and (text := _check_first_update(cfg, metrics)):
                    log.message(text)
            for warning in warnings:
                log.message(f"step {state.step}: {warning}")
            run.sync_reference()
            best = best_steps(progress, cfg)
            last = last or bool(progress.stopped)
            saves.look(best)
            stop = setup.largest(signals.asked_to_stop(deadline)) if not last and _between_rounds(cfg, state.step) else 0
            is_end = last or stop > 0
            saved = _save(run, saves, best, is_end, stop > 0) if _due(state.step, cfg.save.every, is_end) or state.step in best else {}
            if stop:
                setup.on_first_rank(log.stopped)(state.step, signals.reason(stop))
                return True
    if progress.stopped:
        log.message(f"stopped after step {state.step}: {progress.stopped}")
    if cfg.save.export:
        with phase("export"):
            run.export(_best_checkpoint(cfg, run, log), run_dir / "hf")
    setup.on_first_rank(log.summary)(saved | memory.take())
    return False


def _best_checkpoint(cfg: Config, run: Run, log: runlog.RunLog) -> Path | None:
    """What to export; None for the weights as they are, which are the best, or those of the best have not been written."""
    best = [checkpoint.path_of(Path(cfg.run.dir) / "checkpoints", step) for step in best_steps(run.progress, cfg)[:1] if step != run.state.step]
    written = setup.gather_over_world(setup.on_first_rank(lambda: [path for path in best if checkpoint.is_checkpoint(path)])())[0]
    for path in best if not written else []:
        log.message(f"the best checkpoint, {path}, could not be written; exported are the last step's weights")
    return written[0] if written else None


def evaluate(cfg: Config, run: Run, log: runlog.RunLog) -> bool:
    """One evaluation of the weights as they are, under the number of the steps they have seen; False, as nothing asks it to stop."""
    metrics, rows = _evaluate(run)
    _record(cfg, log, run.state.step, metrics, rows, [])
    setup.on_first_rank(log.summary)()
    return False


def _of_all_ranks(batch: PairBatch) -> PairBatch:
    """The step's batch of all data-parallel ranks; its pairs and contests are in the order of the rows, whatever the number of ranks.

    The table of samples is this rank's.
    """
    gathered = setup.gather_over_data_parallel((batch.pairs_by_prompt, batch.contests, batch.sums))
    groups, contests, parts = zip(*gathered, strict=True)
    return PairBatch(batch.step, list(chain.from_iterable(_in_turns(groups))), summed(parts), batch.samples, _in_turns(contests))


def _in_turns(shares: Sequence[list]) -> list:
    """What ranks hold that have every n-th of a list, as that list."""
    return [one for turn in zip_longest(*shares) for one in turn if one is not None]


def step(cfg: Config, run: Run, batch: PairBatch) -> dict[str, float]:
    """One optimizer step on the batch of all ranks; its metrics, of the global batch. Without any pair it is skipped."""
    pairs = batch.pairs
    metrics = means(batch.sums)
    if not pairs:
        run.state.step += 1
        return {"loss": math.nan, "grad_norm": math.nan, "num_pairs": 0.0, "skipped": 1.0} | metrics
    started = time.perf_counter()
    loss = epoch_loss = run.loss_of_step(run.state.step)
    if run.progress.sft_weight:
        loss = partial(combine, losses=[(epoch_loss, 1.0), (sft, run.progress.sft_weight)])
    with phase("reference"):
        packs, packing = run.prepare(pairs, loss)
    scored = time.perf_counter()
    if cfg.precision.audit.every and (run.state.step + 1) % cfg.precision.audit.every == 0:
        with phase("audit"):
            metrics |= run.audit(pairs[: cfg.precision.audit.pairs])
        metrics["time/audit"] = time.perf_counter() - scored
    audited = time.perf_counter()
    with phase("training"):
        metrics = train_step(run.state, packs, loss, learning_rate(run.state.step + 1, run.total_steps, cfg.optimizer)) | metrics
    trained = time.perf_counter()
    if "objective/scores" in metrics and "objective/non_score_reward" in metrics:
        metrics["objective/rlhf_reward"] = metrics["objective/scores"] + metrics["objective/non_score_reward"]
    metrics |= {name: value for name, value in getattr(epoch_loss, "keywords", {}).items() if name in ("beta", "alpha")}
    seconds = trained - started - metrics.get("time/audit", 0.0) + metrics.get("time/generate", 0.0) + metrics.get("time/judge", 0.0)
    metrics |= {"time/score_reference": scored - started, "time/train": trained - audited}
    return metrics | packing | {"perf/tokens_per_s": packing["pack/tokens"] / seconds, "perf/pairs_per_s": len(pairs) / seconds}


def _evaluate(run: Run) -> tuple[dict[str, float], list[dict]]:
    started = time.perf_counter()
    with phase("evaluation"):
        metrics, rows = run.evaluate()
    return metrics | ({"time/evaluate": time.perf_counter() - started} if metrics else {}), rows


def _save(run: Run, saves: Saves, best: list[int], is_end: bool, must: bool) -> dict[str, float]:
    """Saves, and returns how long training waited for it, which the next step's metrics tell."""
    started = time.perf_counter()
    saves.save(run.state, {"made_with": run.identity, "progress": asdict(run.progress)}, best, is_end=is_end, must=must)
    return {"time/save": time.perf_counter() - started}


@phase("writing")
def _record(cfg: Config, log: runlog.RunLog, step: int, metrics: dict[str, float], evaluation_rows: list[dict], samples: list[dict]) -> None:
    """Writes what every rank knows of a step, and the memory of all of them; a full disk ends every rank."""
    measured = metrics and metrics | memory.take()

    def write() -> None:
        if measured:
            log.write(step, measured)
        log.samples(step, evaluation_rows)
        if cfg.log.samples_every and (step == 1 or step % cfg.log.samples_every == 0):
            log.samples(step, samples[: cfg.log.samples])

    setup.on_first_rank(write)()


def _stop_after_bad_steps(cfg: Config, state: TrainState, metrics: dict[str, float]) -> None:
    if state.bad_steps >= cfg.train.max_bad_steps:
        raise ValueError(
            f"{state.bad_steps} steps in a row had a non-finite loss or gradient norm (step {state.step}: loss {metrics['loss']}, "
            f"grad_norm {metrics['grad_norm']}) and were skipped; train.max_bad_steps={cfg.train.max_bad_steps} stops the run: "
            "lower optimizer.lr, or look at the rows and rewards of these steps"
        )


def _check_first_update(cfg: Config, metrics: dict[str, float]) -> str | None:
    """Policy and reference are the same model before the first update: every log-ratio is 0, and DPO's loss is ln 2.

    Returns words on the difference where precision lets the two differ.
    """
    measured = {name: metrics[name] for name in ("rewards/chosen", "rewards/rejected", "objective/kl") if name in metrics}
    wrong = {name: value for name, value in measured.items() if not abs(value) < 1e-3}
    if wrong and (not cfg.precision.same_rounding or cfg.reference.fp8_weights):
        return f"before the first update policy and reference differ by {wrong}: their FP8 scales differ (precision={cfg.precision.name})"
    if wrong:
        raise ValueError(
            f"before the first update policy and reference must agree (DPO: loss ln 2 = {math.log(2):.6f}), but {wrong} with loss "
            f"{metrics['loss']:.6f}; the two were not loaded from the same weights, or a layer is not deterministic"
        )
    return None


def _checkpoint_to_resume(cfg: Config) -> Path | None:
    if cfg.run.resume == "auto":
        return checkpoint.latest_checkpoint(Path(cfg.run.dir) / "checkpoints")
    return Path(cfg.run.resume) if cfg.run.resume else None


def _make_run_dir(cfg: Config, resume_from: Path | None) -> None:
    run_dir = Path(cfg.run.dir)
    if cfg.save.export and resume_from is None and (run_dir / "hf").exists():
        raise ValueError(
            f"run.dir={run_dir}: its hf/, where the final model goes, exists already; use run.resume=auto to go on with that run, "
            "another run.dir, or save.export=false"
        )
    # From a checkpoint of another run a new one starts, in a directory of its own.
    is_own = cfg.run.resume == "auto" or (resume_from is not None and run_dir.resolve() in resume_from.resolve().parents)
    runlog.create_run_dir(run_dir, to_yaml(cfg), resume=is_own, device=capabilities.report(kernels_of(cfg)))


def _open_log(cfg: Config, run: Run, resume_from: Path | None) -> runlog.RunLog:
    run_dir = Path(cfg.run.dir)
    resumed_at = run.state.step if resume_from and cfg.run.action == "train" else None
    unused = checkpoint.set_aside_after(run_dir / "checkpoints", run.state.step)
    unused_steps = ledger.set_aside_after(run_dir / "ledger", run.state.step)
    goes_on = cfg.save.on_error == "continue"
    log = runlog.RunLog(
        run_dir, total_steps=run.total_steps, resumed_at=resumed_at, tensorboard=cfg.log.tensorboard, wandb=cfg.log.wandb, goes_on=goes_on
    )
    log.message(f"{capabilities.summary()} (environment.json)")
    if resume_from:
        log.message(f"resumed from {resume_from}")
    for path in unused:
        log.message(f"set aside, because its step is done again: {path}")
    if unused_steps:
        log.message(f"set aside, because their steps are done again: {unused_steps} files of {run_dir / 'ledger'}")
    return log


def _between_rounds(cfg: Config, step: int) -> bool:
    """Whether the next step's samples come from the weights as they are, so that a checkpoint is all that a run needs to go on."""
    return cfg.method.pairs == "offline" or round_start(step, cfg.generation.sync_every) == step


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)
