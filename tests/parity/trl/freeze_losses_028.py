"""Runs TRL 0.28's loss code on the same synthetic log-probabilities as freeze_losses.py and freezes losses and gradients as JSON.

TRL lives in an environment of its own, never in the product's:

    uv venv trl_028_env --python 3.12 && uv pip install --python trl_028_env/bin/python "trl==0.28.*" "transformers==4.57.*" "datasets<5"
    trl_028_env/bin/python tests/parity/trl/freeze_losses_028.py > tests/parity/trl/losses_028.json

`DPOTrainer.get_batch_loss_metrics` runs as it is, with its `concatenated_forward` and `dpo_loss`, on a stand-in for the trainer and on models
whose logits give the log-probabilities; `kto_loss`, `bco_loss`, `cpo_loss` and `odds_ratio_loss` are fed the per-sequence values that they take.
"""

from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import torch
from freeze_losses import DESIRABLE, LENGTHS, PROMPT, sequence_cases, synthetic, write

DIVERGENCES = [("js_divergence", None), ("alpha_divergence", 0.5), ("alpha_divergence", 1.0), ("alpha_divergence", -0.7)]
DPO_CASES = [
    *[{"loss_type": [name]} for name in ("sigmoid", "hinge", "ipo", "robust", "bco_pair", "sppo_hard", "nca_pair", "aot", "aot_unpaired")],
    *[{"loss_type": [name]} for name in ("exo_pair", "apo_zero", "apo_down", "discopop", "sft")],
    *[{"loss_type": [name], "label_smoothing": 0.2} for name in ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired")],
    {"loss_type": ["discopop"], "discopop_tau": 0.5},
    *[
        {"loss_type": [name], "label_smoothing": 0.1, "f_divergence_type": divergence, "f_alpha_divergence_coef": coefficient}
        for name in ("sigmoid", "hinge", "exo_pair", "robust")
        for divergence, coefficient in DIVERGENCES
    ],
    *[{"loss_type": [name], "reference_free": True} for name in ("sigmoid", "hinge")],
    {"loss_type": ["sigmoid"], "rpo_alpha": 0.5},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
]
UNPAIRED_CASES = [
    *[{"loss_type": name} for name in ("kto", "apo_zero_unpaired", "bco")],
    {"loss_type": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.7},
    {"loss_type": "kto", "kl_shift": 3.0},
]
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda tensor: tensor, use_distributed=False)


class Logits(torch.nn.Module):
    """A model of three words that gives word 1 the prescribed log-probabilities of all rows and word 2 the rest."""

    def __init__(self, logps):
        super().__init__()
        self.logps = logps

    def forward(self, *_, **__):
        logps = torch.nn.functional.pad(self.logps.clamp(max=-1e-6), (0, 1), value=-1.0)
        return SimpleNamespace(logits=torch.stack([torch.full_like(logps, -1e9), logps, torch.log(-torch.expm1(logps))], dim=-1))


def trainer_of(ref_model, **options):
    """A stand-in with the methods of TRL's trainer that its loss calls, and with a running mean of its own."""
    from trl import DPOTrainer
    from trl.trainer.dpo_config import FDivergenceType
    from trl.trainer.utils import RunningMoments

    off = ("is_encoder_decoder", "aux_loss_enabled", "padding_free", "use_logits_to_keep", "use_weighting", "reference_free")
    fixed = dict.fromkeys(off, False) | {"_peft_has_been_casted_to_bf16": False, "pad_token_id": 0, "max_length": None}
    of_loss = {"beta": 0.3, "label_smoothing": 0.0, "loss_weights": None, "f_divergence_type": "reverse_kl"} | options
    of_loss["f_divergence_type"] = FDivergenceType(of_loss["f_divergence_type"])
    of_loss["f_divergence_params"] = {"alpha_divergence_coef": options.get("f_alpha_divergence_coef")}
    args = {"use_liger_kernel": False, "rpo_alpha": None, "ld_alpha": None, "discopop_tau": 0.05}
    trainer = SimpleNamespace(**fixed | of_loss, accelerator=ACCELERATOR, running=RunningMoments(ACCELERATOR), ref_model=ref_model)
    trainer.args = SimpleNamespace(**{name: options.get(name, value) for name, value in args.items()})
    trainer.concatenated_inputs = DPOTrainer.concatenated_inputs
    for name in ("concatenated_forward", "compute_ref_log_probs", "dpo_loss"):
        setattr(trainer, name, partial(getattr(DPOTrainer, name), trainer))
    return trainer


def dpo_cases(mask, policy, ref):
    from trl import DPOTrainer

    num = len(LENGTHS)
    answers = {"chosen": mask[:num, PROMPT:].long(), "rejected": mask[num:, PROMPT:].long()}
    batch = {f"{name}_{kind}": ids for name, ids in answers.items() for kind in ("input_ids", "attention_mask")}
    batch |= {name: torch.ones(num, PROMPT, dtype=torch.long) for name in ("prompt_input_ids", "prompt_attention_mask")}
    for case in DPO_CASES:
        leaf = policy.clone().requires_grad_()
        trainer = trainer_of(Logits(ref), **case)
        loss, _ = DPOTrainer.get_batch_loss_metrics(trainer, Logits(leaf), batch)
        loss.backward()
        given = {"running_mean": float(trainer.running.mean)} if "bco_pair" in case["loss_type"] else {}
        yield {"trainer": "DPOTrainer", "options": case | given, "loss": loss.item(), "grad": leaf.grad[mask[:, 1:]].tolist()}


def unpaired_cases(mask, policy, ref):
    """The chosen half are the completions, the rejected half the mismatched ones of the KL estimate."""
    from trl.experimental.bco import BCOTrainer
    from trl.trainer.kto_trainer import KTOTrainer

    num, desirable = len(LENGTHS), torch.tensor(DESIRABLE)
    for case in UNPAIRED_CASES:
        name = case["loss_type"]
        leaf = policy.clone().requires_grad_()
        (policy_C, policy_kl), (ref_C, ref_kl) = leaf.sum(1).split(num), ref.sum(1).split(num)
        sides = [values[chosen] for values in (policy_C, ref_C) for chosen in (desirable, ~desirable)]
        fixed = {"desirable_weight": 1.0, "undesirable_weight": 1.0, "calculate_KL": name == "kto", "match_underlying_distribution": False}
        trainer = trainer_of(None, **fixed | case)
        if name == "bco":
            losses, *_ = BCOTrainer.bco_loss(trainer, *sides, None, None)
        else:
            losses, *_ = KTOTrainer.kto_loss(trainer, *sides[:2], policy_kl + case.get("kl_shift", 0.0), *sides[2:], ref_kl)
        losses.mean().backward()
        given = {"running_mean": float(trainer.running.mean)} if name == "bco" else {}
        trained_by = "BCOTrainer" if name == "bco" else "KTOTrainer"
        yield {"trainer": trained_by, "options": case | given, "loss": losses.mean().item(), "grad": leaf.grad[mask[:, 1:]].tolist()}


if __name__ == "__main__":
    mask, policy, ref, _ = synthetic()
    cases = [*dpo_cases(mask, policy, ref), *unpaired_cases(mask, policy, ref), *sequence_cases(mask, policy)]
    write(version("trl"), mask, {"policy": policy, "ref": ref}, cases)
