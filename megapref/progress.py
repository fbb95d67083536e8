"""What a run has seen that decides how it goes on: its best evaluations, early stopping, the guard. Pure, and saved with every checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean

from megapref.config import Config


@dataclass
class Progress:
    """Plain values, as JSON has them."""

    best: list[list[float]] = field(default_factory=list)  # [step, value] of the best evaluations, the best first
    stale: int = 0  # evaluations since the best one
    stopped: str | None = None  # why the run ends early
    first: dict[str, list[float]] = field(default_factory=dict)  # what is watched, in the first steps
    recent: dict[str, list[float]] = field(default_factory=dict)  # and in the last ones
    told: dict[str, int] = field(default_factory=dict)  # how far each was off when it was last told
    sft_weight: float = 0.0  # that the guard has added to the loss


def evaluated(progress: Progress, cfg: Config, step: int, metrics: dict[str, float]) -> None:
    """Takes in the evaluation after `step`. ValueError where it has no `evaluation.metric`."""
    name = cfg.evaluation.metric
    if name is None:
        return
    if name not in metrics:
        raise ValueError(f'evaluation.metric="{name}" is not among the metrics of an evaluation: {", ".join(sorted(metrics)) or "none"}')
    if step == 0 or not math.isfinite(metrics[name]):
        return
    sign = 1 if cfg.evaluation.goal == "min" else -1
    ranked = sorted([*progress.best, [step, metrics[name]]], key=lambda entry: (sign * entry[1], entry[0]))
    progress.stale = 0 if ranked[0][0] == step else progress.stale + 1
    progress.best = ranked[: max(cfg.save.keep_best, 1)]
    if cfg.evaluation.patience and progress.stale >= cfg.evaluation.patience:
        best_step, best = progress.best[0]
        progress.stopped = f"{name} has not been better than {best:.6g}, at step {best_step:g}, in {progress.stale} evaluations"


def best_steps(progress: Progress, cfg: Config) -> list[int]:
    """The steps of the checkpoints that `save.keep_best` keeps, the best first."""
    return [int(step) for step, _ in progress.best[: cfg.save.keep_best]]


def observed(progress: Progress, cfg: Config, metrics: dict[str, float], has_reference: bool) -> list[str]:
    """Takes in the metrics of a training step; what there is to warn of, each in plain words, once and again whenever it has doubled."""
    warnings = []
    for name, value in _watched(metrics, has_reference).items():
        first, recent = progress.first.setdefault(name, []), progress.recent.setdefault(name, [])
        if not math.isfinite(value):
            continue
        if len(first) < cfg.guard.window:
            first.append(value)
        recent.append(value)
        del recent[: -cfg.guard.window]
        if len(recent) < cfg.guard.window:
            continue
        size, limit, text = _judged(name, fmean(first), fmean(recent), cfg)
        level = 0 if size <= limit else 1 + int(math.log2(size / limit))
        if level > progress.told.get(name, 0):
            warnings.append(text)
            if name != "length" and cfg.guard.action == "raise_sft_weight":
                progress.sft_weight += cfg.guard.sft_weight
                warnings[-1] += f"; the loss now has {progress.sft_weight:g} times their negative log-likelihood per token"
        progress.told[name] = max(level, progress.told.get(name, 0))
    if warnings and cfg.guard.action == "stop":
        progress.stopped = f"{'; '.join(warnings)} (guard.action=stop)"
    return warnings


def _watched(metrics: dict[str, float], has_reference: bool) -> dict[str, float]:
    values = {}
    if metrics.get("length/chosen"):
        against = metrics.get("logps/ref_chosen", 0.0) if has_reference else 0.0
        name = "below_reference" if has_reference else "below_start"
        values[name] = (against - metrics["logps/chosen"]) / metrics["length/chosen"]
    if "generation/length" in metrics:
        values["length"] = metrics["generation/length"]
    return values


def _judged(name: str, first: float, recent: float, cfg: Config) -> tuple[float, float, str]:
    """How far off it is, how far it may be, and what to say."""
    window, guard = cfg.guard.window, cfg.guard
    if name == "length":
        ratio = max(recent, 1e-9) / max(first, 1e-9)
        direction = "longer" if ratio > 1 else "shorter"
        text = (
            f"samples have become {direction}: {recent:.1f} tokens in the last {window} steps, {first:.1f} in the first ones "
            f"(guard.max_length_ratio={guard.max_length_ratio:g}); the reward may pay for length"
        )
        return max(ratio, 1 / ratio), guard.max_length_ratio, text
    drop, what = (recent, "under the reference") if name == "below_reference" else (recent - first, f"in the first {window} steps")
    text = (
        f"likelihood displacement: in the last {window} steps the chosen completions were less likely than {what}, by {drop:.3g} nats per token "
        f"(guard.max_drop={guard.max_drop:g}), so what the policy gains goes to neither side; lower optimizer.lr, raise beta or train their "
        "likelihood too (loss.params.sft_loss_weight, guard.action=raise_sft_weight)"
    )
    return drop, guard.max_drop, text


def audit_warnings(cfg: Config, metrics: dict[str, float]) -> list[str]:
    """What a step's audit found beyond the limits of `precision.audit`, in plain words."""
    limits, above = cfg.precision.audit, "bf16" if cfg.precision.fp8 else "fp32"
    remedy = "keep more layers in bf16 (precision.bf16_first_layers, bf16_last_layers, bf16_layers), or use precision=bf16"
    remedy = remedy if cfg.precision.fp8 else "use precision=fp32 to see whether it matters"
    found = []
    if (flips := metrics.get("audit/sign_flips", 0.0)) > limits.max_sign_flips:
        found.append(f"{flips:.0%} of the audited pairs have margins of another sign than in {above} (limit {limits.max_sign_flips:.0%})")
    if (kl := metrics.get("audit/kl", 0.0)) > limits.max_kl:
        found.append(f"the KL between precision={cfg.precision.name} and {above} is {kl:.4f} nats per token (limit {limits.max_kl:g})")
    return [f"precision.audit: {text}; {remedy}" for text in found]
