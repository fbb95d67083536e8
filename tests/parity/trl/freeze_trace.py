"""Runs five steps of TRL's DPOTrainer on a tiny random Qwen2 and freezes what it logs, and the rows, as JSON.

TRL lives in an environment of its own, never in the product's (freeze_losses.py says how to make it):

    OMP_NUM_THREADS=1 trl_env/bin/python tests/parity/trl/freeze_trace.py > tests/parity/trl/trace.json

The trainer runs as it is, padded and in float32 on the CPU; only tokenization is left out, the rows being token ids. The weights are not
stored: both sides make them from the seed (`make_checkpoint` in tests/tiny_models.py), and the checksum tells whether they made the same.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
from tiny_models import SHAPE, make_checkpoint

MODEL, SEED, STEPS, BATCH, BETA = "qwen2", 5, 5, 4, 0.1
OPTIMIZER = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "clip_grad": 1.0, "schedule": "constant"}
LOGGED = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


def random_rows(number: int, vocab: int, seed: int) -> list[dict[str, list[int]]]:
    """Rows of token ids, with lengths as uneven as those of real data."""
    generator = torch.Generator().manual_seed(seed)
    names = {"prompt_ids": 24, "chosen_ids": 32, "rejected_ids": 32}
    length = lambda most: torch.randint(1, most, (1,), generator=generator).item()  # noqa: E731
    return [{name: torch.randint(2, vocab, (length(most),), generator=generator).tolist() for name, most in names.items()} for _ in range(number)]


def token_trainer(folder: str, rows: list[dict], output: str, **options):
    """TRL's DPOTrainer on a checkpoint and rows of token ids in their order, in float32 on the CPU, without gradient checkpointing."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    class TokenTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    fixed = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_length": None, "pad_to_multiple_of": None}
    plain = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "train_sampling_strategy": "sequential"}
    args = DPOConfig(output, **fixed, **plain, **options)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    pad_only = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pad_only, pad_token="<pad>", eos_token="<pad>")
    live = None if args.precompute_ref_log_probs else reference
    return TokenTrainer(policy, live, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def checksum(folder: str) -> float:
    """A weighted sum of squares of the checkpoint's weights, whose last digits depend on the processor."""
    from safetensors.torch import load_file

    tensors = load_file(Path(folder) / "model.safetensors")
    flat = torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])
    return (flat.square() * torch.linspace(0, 1, len(flat), dtype=torch.float64)).sum().item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = random_rows(STEPS * BATCH, SHAPE["vocab_size"], SEED)
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(make_checkpoint(Path(temporary) / "model", MODEL, seed=SEED))
        adam = {"learning_rate": OPTIMIZER["lr"], "adam_epsilon": OPTIMIZER["eps"], "weight_decay": OPTIMIZER["weight_decay"]}
        adam |= {"adam_beta1": OPTIMIZER["betas"][0], "adam_beta2": OPTIMIZER["betas"][1], "max_grad_norm": OPTIMIZER["clip_grad"]}
        run = {"per_device_train_batch_size": BATCH, "max_steps": STEPS, "lr_scheduler_type": OPTIMIZER["schedule"], "beta": BETA}
        trainer = token_trainer(folder, rows, temporary, **adam, **run)
        sys.stdout, stdout = sys.stderr, sys.stdout  # the trainer prints what it logs
        trainer.train()
        sys.stdout = stdout
        steps = [{name: logs[name] for name in LOGGED} for logs in trainer.state.log_history if "loss" in logs]
        frozen = {"trl": version("trl"), "model": MODEL, "seed": SEED, "checksum": checksum(folder), "beta": BETA, "optimizer": OPTIMIZER}
    assert len(steps) == STEPS
    lines = {name: ",\n".join(json.dumps(item) for item in items) for name, items in (("steps", steps), ("rows", rows))}
    print(json.dumps(frozen)[:-1] + "".join(f', "{name}": [\n{text}\n]' for name, text in lines.items()) + "}")
