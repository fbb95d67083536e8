"""The model of `evaluation.against`: a checkpoint of a run with the same model, or a Hugging Face model with the same tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from megapref.batch import ModelSpec
from megapref.config import Config
from megapref.convert.families import read_spec
from megapref.convert.hf import find_model, load_hf
from megapref.data.chat import load_tokenizer
from megapref.mcore import checkpoint, reference, setup
from megapref.mcore.model import build_model


def load_opponent(cfg: Config, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[torch.nn.Module], ModelSpec]:
    """Its chunks, frozen, on this process, and what model it is; a collective of all ranks. `spec` and `tokenizer` are the policy's.

    ValueError where it is neither, or cannot read `max_length` tokens.
    """
    path = Path(cfg.evaluation.against)
    if checkpoint.is_checkpoint(path):
        chunks = build_model(spec, cfg.parallel, cfg.precision, cfg.kernels)
        checkpoint.load_weights(chunks, path)
    else:
        folder, spec = setup.on_every_rank(_read)(path, tokenizer, max_length)
        chunks = build_model(spec, cfg.parallel, cfg.precision, cfg.kernels)
        load_hf(chunks, spec, folder)
    return reference.resident(chunks).chunks, spec


def _read(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Path, ModelSpec]:
    key = f"evaluation.against={path}"
    folder = find_model(str(path), "evaluation.against")
    spec = read_spec(folder)
    if load_tokenizer(str(folder)).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{key} has another vocabulary than the policy's tokenizer, so it would read other prompts; choose a model that shares it")
    if spec.max_positions < max_length:
        raise ValueError(f"{key} has {spec.max_positions} positions, but a prompt with its completion takes up to {max_length}; use another model")
    return folder, spec
