"""Hugging Face sequence classifiers, a reward model being one with one label: token ids in, scores out, on this process's device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from megapref.mcore import device


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode with its own tokenizer; it can read `max_positions` tokens, if it says how many."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_positions: int | None


@cache
def load_classifier(path: str, dtype: str, on: str) -> Classifier:
    """The classifier of a Hugging Face folder or hub name, loaded once in the life of a process. `on`: cpu, or auto for the GPU if there is one.

    ValueError where it cannot be had, or has no trained head.
    """
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(path, dtype=getattr(torch, dtype), output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"path={path}: no sequence classifier with its tokenizer can be loaded from there ({reason})") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise ValueError(f"path={path}: the checkpoint lacks {missing}, which would be random; give one that was trained as a sequence classifier")
    model.to(torch.device("cpu") if on == "cpu" else device.current()).eval()
    return Classifier(model, tokenizer, getattr(model.config.get_text_config(), "max_position_embeddings", None))


@torch.no_grad()
def classify(classifier: Classifier, sequences: Sequence[Sequence[int]], max_tokens: int) -> Tensor:
    """[sequences, labels] float32 on the CPU. Sequences of similar length share a forward pass of at most `max_tokens` tokens, padding included.

    The head is read at the last token that is no padding, by position and not by looking for the padding token, which may be in the text.
    """
    model = classifier.model
    scores = torch.empty(len(sequences), model.config.num_labels)
    for rows in batches([len(ids) for ids in sequences], max_tokens):
        lengths = torch.tensor([len(sequences[row]) for row in rows])
        token_ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for i, row in enumerate(rows):
            token_ids[i, : lengths[i]] = torch.as_tensor(sequences[row])
        mask = torch.arange(token_ids.shape[1]) < lengths[:, None]
        inputs = {"input_ids": token_ids.to(model.device), "attention_mask": mask.to(model.device, torch.long)}
        if hasattr(model, "score"):  # a decoder's head, a linear layer that is applied to one position
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
            logits = model.score(hidden[torch.arange(len(rows)), lengths - 1])
        else:  # an encoder's, which has its own way with the mask
            logits = model(**inputs).logits
        scores[rows] = logits.float().cpu()
    return scores


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """The rows of each batch, long ones first; a row of more than `max_tokens` is one of its own."""
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if rows and (len(rows) + 1) * lengths[rows[0]] > max_tokens:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows
