"""Trains a reward model on preference rows and writes it as a Hugging Face sequence classifier, for `reward=reward_model`; small ones on CPU.

    python tools/make_reward_model.py assets/demo/model assets/demo/preference_train.jsonl --out models/reward

The model is a language model with a fresh head of one label; the loss is -log sigmoid(r(chosen) - r(rejected)), Bradley and Terry's. Texts are
made as `online.reward_models:sequence_classifier` makes them.
"""

from __future__ import annotations

import argparse
import sys
from itertools import chain
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from megapref.batch import Completion, Prompt
from megapref.data.formats import preferences_of
from megapref.data.rows import read_rows
from megapref.online.reward_models import tokenize

Pair = tuple[list[int], list[int]]  # tokens of prompt and chosen, of prompt and rejected


def token_pairs(path: str, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """The pairs of preference rows in any format; ValueError for a row that is none."""
    pairs = [pair for row, location in read_rows(path) for pair in preferences_of(row, location)]
    alone = next((pair for pair in pairs if pair.rejected is None), None)
    if alone:
        raise ValueError(f"{alone.location}: expected a chosen and a rejected completion, got a demonstration; give preference rows")
    return [tuple(_tokens(tokenizer, pair.prompt, side, pair.location.row) for side in (pair.chosen, pair.rejected)) for pair in pairs]


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: str | list, completion: str | list, number: int) -> list[int]:
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return tokenize(tokenizer, Prompt([], "", {"prompt": prompt}, number), Completion([], text, True), None)


def scores(model: PreTrainedModel, sequences: list[list[int]]) -> torch.Tensor:
    """[sequences]: the head's value at each one's last token."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    token_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    mask = torch.arange(token_ids.shape[1]) < lengths[:, None]
    hidden = model.base_model(input_ids=token_ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    return model.score(hidden[torch.arange(len(lengths)), lengths - 1])[:, 0]


def margins(model: PreTrainedModel, pairs: list[Pair]) -> torch.Tensor:
    """[pairs]: r(chosen) - r(rejected)."""
    chosen, rejected = scores(model, list(chain(*zip(*pairs, strict=True)))).chunk(2)
    return chosen - rejected


def train(model: PreTrainedModel, pairs: list[Pair], *, epochs: int, batch: int, lr: float, seed: int) -> None:
    """AdamW over the pairs in a new order every epoch, the rate falling to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    batches = [rows for _ in range(epochs) for rows in torch.randperm(len(pairs), generator=generator).split(batch)]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    for rows in batches:
        loss = -logsigmoid(margins(model, [pairs[row] for row in rows])).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: PreTrainedModel, pairs: list[Pair], batch: int) -> float:
    """The share of pairs whose chosen side scores higher."""
    return sum(int((margins(model, pairs[i : i + batch]) > 0).sum()) for i in range(0, len(pairs), batch)) / len(pairs)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder or hub name of a language model, with its tokenizer")
    parser.add_argument("rows", help="preference rows in any format, file or hub name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--test", metavar="ROWS", help="rows to measure the accuracy on")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        pairs, test = (token_pairs(path, tokenizer) if path else [] for path in (options.rows, options.test))
        model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, dtype=torch.float32)
    except (OSError, ValueError) as error:
        print(f"make_reward_model: {error}", file=sys.stderr)
        return 2
    train(model, pairs, **{name: getattr(options, name) for name in ("epochs", "batch", "lr", "seed")})
    model.eval().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    measured = [(accuracy(model, own, options.batch), len(own), name) for own, name in ((pairs, "trained on"), (test, "held out")) if own]
    print(f"{options.out}: prefers the chosen side in " + ", ".join(f"{share:.1%} of {number} pairs {name}" for share, number, name in measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
