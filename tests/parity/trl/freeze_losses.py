"""Runs TRL's own loss code on synthetic log-probabilities and freezes losses and gradients as JSON.

TRL lives in an environment of its own, never in the product's:

    uv venv trl_env --python 3.12 && uv pip install --python trl_env/bin/python "trl==1.16.*"
    trl_env/bin/python tests/parity/trl/freeze_losses.py > tests/parity/trl/losses.json

`DPOTrainer._compute_loss` and `KTOTrainer._compute_loss` run as they are, on a stand-in for the trainer and on models that answer with the
given per-token log-probabilities; `CPOTrainer.cpo_loss` and `ORPOTrainer.odds_ratio_loss` are fed the per-sequence values that they take.
Each case: the trainer, the options it ran with, the loss (TRL's mean over the batch) and its gradient per completion token.
"""

import json
from collections import defaultdict
from contextlib import nullcontext
from importlib.metadata import version
from types import SimpleNamespace

import torch

PROMPT = 2
LENGTHS = [(4, 3), (2, 5), (1, 1), (6, 2), (3, 3), (2, 4)]  # completion tokens of (chosen, rejected)
DESIRABLE = [True, False, True, True, False, False]
DIVERGENCES = [("forward_kl", 0.5), ("js_divergence", 0.5), ("alpha_divergence", 0.5), ("alpha_divergence", 1.0), ("alpha_divergence", 1.7)]
DPO_CASES = [
    *[{"loss_type": [name]} for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired")],
    *[{"loss_type": [name]} for name in ("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")],
    *[{"loss_type": ["exo_pair"], "label_smoothing": eps} for eps in (1e-3, 0.2)],
    *[{"loss_type": ["robust"], "label_smoothing": eps} for eps in (0.0, 0.3)],
    *[{"loss_type": [name], "label_smoothing": 0.2} for name in ("aot", "aot_unpaired")],
    {"loss_type": ["discopop"], "discopop_tau": 0.5},
    *[
        {"loss_type": [name], "label_smoothing": 0.1, "f_divergence_type": divergence, "f_alpha_divergence_coef": alpha}
        for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
        for divergence, alpha in DIVERGENCES
    ],
    *[{"loss_type": [name], "ld_alpha": ld_alpha} for name in ("sigmoid", "ipo", "aot") for ld_alpha in (0.0, 0.5)],
    *[{"loss_type": [name], "use_weighting": True} for name in ("sigmoid", "ipo", "apo_zero")],
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
]
CPO_CASES = [
    *[{"loss_type": name} for name in ("sigmoid", "hinge", "ipo")],
    {"loss_type": "sigmoid", "label_smoothing": 0.2},
    {"loss_type": "simpo", "simpo_gamma": 0.5},
]


def synthetic():
    """Per-token values of the 2B sequences [chosen, rejected], zero outside completions: policy, reference, log sum of squared probabilities."""
    lengths = [chosen for chosen, _ in LENGTHS] + [rejected for _, rejected in LENGTHS]
    width = PROMPT + max(lengths)
    mask = torch.tensor([[PROMPT <= t < PROMPT + n for t in range(width)] for n in lengths])
    generator = torch.Generator().manual_seed(0)
    values = [-scale * torch.rand(mask[:, 1:].shape, generator=generator) for scale in (2.5, 2.5, 1.0)]
    return mask, *(value * mask[:, 1:] for value in values)


class Answers(torch.nn.Module):
    """A model that answers with prescribed per-token values: the first input id is the number of the row to answer with."""

    is_gradient_checkpointing = False

    def __init__(self, logps, log_sum_sq):
        super().__init__()
        self.logps, self.log_sum_sq = logps, log_sum_sq

    def forward(self, input_ids, **_):
        rows = input_ids[:, 0]
        zeros = torch.zeros_like(self.logps[rows])
        return SimpleNamespace(
            log_probs=self.logps[rows], log_sum_sq_probs=self.log_sum_sq[rows], entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )


def trainer_of(model, ref_model, **options):
    def same(tensor):
        return tensor

    args = SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=options.get("discopop_tau", 0.05))
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same, unwrap_model=same, autocast=nullcontext)
    fixed = {"aux_loss_enabled": False, "precompute_ref_logps": False, "_total_train_tokens": 0, "_tp_size": 1, "use_weighting": False}
    metrics = {"train": defaultdict(list)}
    return SimpleNamespace(**fixed | options, args=args, accelerator=accelerator, model=model, ref_model=ref_model, _metrics=metrics)


def dpo_cases(mask, policy, ref, log_sum_sq):
    from trl import DPOTrainer

    ids = torch.arange(len(mask))[:, None].expand(mask.shape)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask.long()}
    for case in DPO_CASES:
        options = {"beta": 0.3, "label_smoothing": 0.0, "ld_alpha": None, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
        options |= case
        options["loss_types"] = options["loss_type"]
        options.setdefault("loss_weights", [1.0] * len(options["loss_types"]))
        leaf = policy.clone().requires_grad_()
        model = Answers(leaf, log_sum_sq)
        loss = DPOTrainer._compute_loss(trainer_of(model, Answers(ref, log_sum_sq), **options), model, inputs, False)
        loss.backward()
        yield {"trainer": "DPOTrainer", "options": case, "loss": loss.item(), "grad": leaf.grad[mask[:, 1:]].tolist()}


def kto_cases(mask, policy, ref, log_sum_sq):
    """The chosen half are the completions, the rejected half the mismatched ones of the KL estimate."""
    from trl import KTOTrainer

    num = len(LENGTHS)
    ids = torch.arange(len(mask))[:, None].expand(mask.shape)
    names = ("input_ids", "attention_mask", "completion_mask")
    halves = zip(names, (ids, torch.ones_like(ids), mask.long()), strict=True)
    inputs = {prefix + name: value[half] for name, value in halves for prefix, half in (("", slice(num)), ("KL_", slice(num, None)))}
    inputs["label"] = torch.tensor(DESIRABLE)
    for case in (
        {"loss_type": "kto"},
        {"loss_type": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.7},
        {"loss_type": "kto", "kl_shift": 3.0},
        {"loss_type": "apo_zero_unpaired"},
    ):
        shift = torch.cat([torch.zeros(num, 1), torch.full((num, 1), case.get("kl_shift", 0.0))]) * mask[:, 1:] / mask.sum(1, keepdim=True)
        leaf = policy.clone().requires_grad_()
        model, ref_model = Answers(leaf + shift, log_sum_sq), Answers(ref, log_sum_sq)
        options = {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.0, "calculate_KL": case["loss_type"] == "kto"} | case
        trainer = trainer_of(model, ref_model, **options)
        trainer._compute_kl_logps = lambda m, batch, t=trainer: KTOTrainer._compute_kl_logps(t, m, batch)
        loss = KTOTrainer._compute_loss(trainer, model, inputs, False)
        loss.backward()
        yield {"trainer": "KTOTrainer", "options": case, "loss": loss.item(), "grad": leaf.grad[mask[:, 1:]].tolist()}


def sequence_cases(mask, policy):
    """CPO and ORPO without their likelihood terms, which run over other tokens (a batch's mean; ORPO's over the prompt too)."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    accelerator = SimpleNamespace(device=torch.device("cpu"))
    for trainer, case in [(CPOTrainer, case) for case in CPO_CASES] + [(ORPOTrainer, {})]:
        options = SimpleNamespace(**{"beta": 0.3, "alpha": 0.0, "label_smoothing": 0.0, "accelerator": accelerator} | case)
        leaf = policy.clone().requires_grad_()
        averaged = trainer is ORPOTrainer or case["loss_type"] in ("simpo", "ipo")
        chosen, rejected = (leaf.sum(1) / (mask.sum(1) if averaged else 1)).chunk(2)
        if trainer is ORPOTrainer:
            loss = -trainer.odds_ratio_loss(options, chosen, rejected)[0].mean()
        else:
            loss = trainer.cpo_loss(options, chosen, rejected)[0].mean()
        loss.backward()
        yield {"trainer": trainer.__name__, "options": case, "loss": loss.item(), "grad": leaf.grad[mask[:, 1:]].tolist()}


def write(trl_version, mask, per_token, cases):
    """Prints what was frozen, a line a case; eight digits of a gradient are what float32 has."""
    tokens = {name: values[mask[:, 1:]].tolist() for name, values in per_token.items()}
    frozen = {"trl": trl_version, "beta": 0.3, "lengths": LENGTHS, "desirable": DESIRABLE, "tokens": tokens}
    lines = ",\n".join(json.dumps({**case, "grad": [float(f"{value:.8g}") for value in case["grad"]]}) for case in cases)
    print(json.dumps(frozen)[:-1] + f', "cases": [\n{lines}\n]}}')


if __name__ == "__main__":
    mask, policy, ref, log_sum_sq = synthetic()
    cases = [*dpo_cases(mask, policy, ref, log_sum_sq), *kto_cases(mask, policy, ref, log_sum_sq), *sequence_cases(mask, policy)]
    write(version("trl"), mask, {"policy": policy, "ref": ref, "log_sum_sq": log_sum_sq}, cases)
