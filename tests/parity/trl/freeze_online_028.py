"""Runs TRL 0.28's XPO and Nash-MD trainers on given completions and log-probabilities and freezes losses, gradients and metrics as JSON.

In the environment of freeze_losses_028.py:

    trl_028_env/bin/python tests/parity/trl/freeze_online_028.py > tests/parity/trl/online_028.json

`training_step` runs as it is, on a trainer that only skipped its construction. Given are the completions, the scores or the judge's verdicts, and the
log-probabilities. The trainer's own: cutting after EOS, the penalty where it is missing, masks, preferences, loss, metrics.
"""

import json
from collections import defaultdict
from importlib.metadata import version
from types import SimpleNamespace

import torch

PAD, EOS, VOCABULARY, WIDTH = 0, 2, 10, 6
PROMPTS = [[3, 4], [5, 6, 7], [8], [9, 3], [4], [6, 5, 3]]  # without EOS, for which TRL looks in them too
FIRST = [[3, 4, 5, EOS], [6, EOS], [EOS], [7, 7, 8, 3, 4, 5], [9, 8, 7, 6, 5, 4], [3, 5, 3, 5, 3, EOS]]  # completions without EOS have the full width
SECOND = [[4, 4, EOS], [5, 6, 7, 8, EOS], [9, 9, 9, 3, 3, 3], [4, EOS], [3, 4, 5, 6, 7, 8], [8, 7, 6, EOS]]
SCORES = [[1.0, -0.5], [0.3, 0.9], [0.2, 0.4], [1.5, 1.0], [-1.0, -1.0], [2.0, -3.0]]
JUDGED = [0.9, 0.5, 0.1, 0.7, 0.3, 1.0]  # P(first is better)
LISTS = {"beta": [0.3, 0.6], "alpha": [0.2, 0.01]}
XPO_CASES = [{}, {"loss_type": "ipo"}, {"beta": 0.7, "alpha": 0.05}, {"missing_eos_penalty": 1.0}, {"judged": True}]
XPO_CASES += [LISTS | {"epoch": 0}, LISTS | {"epoch": 1}, {"alpha": [0.2, 0.01], "epoch": 2}]
NASH_CASES = [{}, {"beta": 0.7}, {"missing_eos_penalty": 1.0}, {"judged": True}, {"beta": [0.3, 0.6], "epoch": 0}, {"beta": [0.3, 0.6], "epoch": 2}]


class InTurn(torch.nn.Module):
    """A model that gives the tokens it is shown the prescribed log-probabilities [B, width]: those of the first completions, then of the second."""

    def __init__(self, *logps):
        super().__init__()
        self.logps = iter(logps)

    def forward(self, input_ids, **_):
        following = input_ids[:, 1:]
        logps = torch.nn.functional.pad(next(self.logps), (following.shape[1] - WIDTH, 0), value=-1.0)[..., None]
        others = (following[..., None] + 1) % VOCABULARY
        logits = torch.full((*following.shape, VOCABULARY), -1e9).scatter(-1, following[..., None], logps)
        logits = logits.scatter(-1, others, torch.log(-torch.expm1(logps)))
        return SimpleNamespace(logits=torch.nn.functional.pad(logits, (0, 0, 0, 1)))


class Scores(torch.nn.Module):
    """A reward model that gives the first completions their scores, then the second theirs."""

    base_model_prefix = "backbone"

    def __init__(self):
        super().__init__()
        self.sides = iter(torch.tensor(SCORES).unbind(1))

    def backbone(self, input_ids, **_):
        return SimpleNamespace(hidden_states=[next(self.sides)[:, None, None].expand(*input_ids.shape, 1).clone()])

    def score(self, hidden):
        return hidden


class Tokenizer:
    """Prompts are lists of token ids already."""

    pad_token_id, eos_token_id, bos_token_id = PAD, EOS, None

    def __call__(self, ids, **_):
        return {"input_ids": json.loads(ids), "attention_mask": [1] * len(json.loads(ids))}

    def batch_decode(self, ids, **_):
        return [str(row) for row in ids.tolist()]


def judge_of(name):
    first_wins = [0 if p >= 0.5 else 1 for p in JUDGED]
    return SimpleNamespace(judge=lambda *_, **__: first_wins if name == "XPOTrainer" else JUDGED)


def trainer_of(name, ref_model, options):
    from trl.experimental.nash_md import NashMDTrainer
    from trl.experimental.utils import DPODataCollatorWithPadding
    from trl.experimental.xpo import XPOTrainer

    trainer = object.__new__({"XPOTrainer": XPOTrainer, "NashMDTrainer": NashMDTrainer}[name])
    off = {"torch_empty_cache_steps": None, "optim": None, "n_gpu": 1, "gradient_accumulation_steps": 1}
    trainer.args = SimpleNamespace(loss_type=options.get("loss_type", "sigmoid"), missing_eos_penalty=options.get("missing_eos_penalty"), **off)
    trainer.model = torch.nn.Module()
    trainer.model.config = SimpleNamespace(is_encoder_decoder=False)
    trainer.state = SimpleNamespace(epoch=options.get("epoch", 0))  # TRL's own is a float, with which it cannot look into its lists
    trainer._beta, trainer._alpha, trainer._mixture_coef = options.get("beta", 0.3), options.get("alpha", 0.1), 0.5
    trainer.accelerator = SimpleNamespace(gather_for_metrics=lambda values: values, backward=lambda loss: loss.backward())
    trainer.processing_class, trainer.data_collator, trainer.ref_model = Tokenizer(), DPODataCollatorWithPadding(pad_token_id=PAD), ref_model
    trainer.reward_funcs, trainer.judge = (None, judge_of(name)) if options.get("judged") else (Scores(), None)
    trainer.stats, trainer._prepare_inputs = defaultdict(list), lambda inputs: inputs

    def generate(first, second):
        prompts = first if isinstance(first, dict) else second  # the two trainers differ in the order
        sampled = [torch.tensor([ids + [7] * (WIDTH - len(ids)) for ids in side]) for side in (FIRST, SECOND)]
        return [torch.cat([prompts["input_ids"], ids], dim=1) for ids in sampled]

    trainer._generate_completions = generate
    return trainer


def frozen_cases(mask, policy, ref):
    policy_mask = mask.view(2 * len(FIRST), WIDTH)
    for name, options in [("XPOTrainer", case) for case in XPO_CASES] + [("NashMDTrainer", case) for case in NASH_CASES]:
        leaf = policy.clone().requires_grad_()
        trainer = trainer_of(name, InTurn(*ref), options)
        loss = trainer.training_step(InTurn(*leaf), {"prompt": [json.dumps(ids) for ids in PROMPTS]})
        grad = leaf.grad.view(policy_mask.shape)[policy_mask]
        metrics = {name: values[0] for name, values in sorted(trainer.stats.items())}
        grads = [float(f"{value:.8g}") for value in grad.tolist()]
        yield {"trainer": name, "options": options, "loss": loss.item(), "metrics": metrics, "grad": grads}


if __name__ == "__main__":
    mask = torch.tensor([[[t < len(ids) for t in range(WIDTH)] for ids in side] for side in (FIRST, SECOND)])
    generator = torch.Generator().manual_seed(0)
    policy, ref = (-0.01 - 2.5 * torch.rand(mask.shape, generator=generator) for _ in range(2))
    given = {"trl": version("trl"), "eos": EOS, "prompts": PROMPTS, "first": FIRST, "second": SECOND, "scores": SCORES, "judged": JUDGED}
    given["tokens"] = {"policy": policy[mask].tolist(), "ref": ref[mask].tolist()}
    lines = ",\n".join(json.dumps(case) for case in frozen_cases(mask, policy, ref))
    print(json.dumps(given)[:-1] + f', "cases": [\n{lines}\n]}}')
