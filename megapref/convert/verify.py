"""A checkpoint's logits against those of transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megapref.batch import ModelSpec
from megapref.config import Parallel
from megapref.convert.families import SCORES, read_spec
from megapref.convert.hf import load_hf, tensor_files
from megapref.mcore import checkpoint, setup
from megapref.mcore.model import build_model
from megapref.mcore.segments import segment_params
from megapref.mcore.stored import Stored


@dataclass(frozen=True)
class Comparison:
    """Logits of random tokens: how many there are, the largest of transformers, the largest difference, the share of rows with the same largest."""

    num_logits: int
    largest: float
    difference: float
    agreement: float


def compare(source: Path, model: Path, num_tokens: int, seed: int = 0) -> Comparison:
    """The model of `source`, a checkpoint or a Hugging Face folder, beside transformers on the Hugging Face folder `model`, both in float32.

    Two rows of `num_tokens` random tokens, fewer where the model has fewer positions; of a classifier the scores of the last one. Starts and
    stops process groups of this process.
    """
    spec = read_spec(model, classifier=True)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, spec.vocab_size, (2, min(num_tokens, spec.max_positions)), generator=generator)
    setup.start(Parallel(), seed)
    try:
        with torch.no_grad():
            ours = _ours(source, model, spec, ids)
    finally:
        setup.stop()
    with torch.no_grad():
        theirs = _theirs(model, spec, ids)
    same = ours.argmax(-1) == theirs.argmax(-1)
    return Comparison(theirs.numel(), theirs.abs().max().item(), (ours - theirs).abs().max().item(), same.float().mean().item())


def _ours(source: Path, model: Path, spec: ModelSpec, ids: Tensor) -> Tensor:
    if SCORES not in spec.weights:
        (chunk,) = build_model(spec, Parallel())
        _load(chunk, spec, source)
        return chunk.eval()(ids, torch.arange(ids.shape[1]).expand(ids.shape), None)[..., : spec.vocab_size]
    (chunk,) = build_model(replace(spec, tied=True), Parallel())  # without an output layer
    _load(chunk, spec, source)
    scores = _scores(source, spec)
    positions = torch.arange(ids.shape[1])[None]
    params = segment_params(torch.tensor([[0, ids.shape[1], 0, 0]]), ids.shape[1], ids.device, None, _window(chunk), varlen=chunk.config.te_attention)
    last = torch.stack([chunk.eval()(row[None], positions, None, packed_seq_params=params)[-1, 0] for row in ids])
    return last @ scores.float().t()


def _window(chunk: torch.nn.Module) -> int | None:
    return chunk.config.window_size and chunk.config.window_size[0] + 1


def _load(chunk: torch.nn.Module, spec: ModelSpec, source: Path) -> None:
    if checkpoint.is_checkpoint(source):
        checkpoint.load_weights([chunk], source)
    else:
        load_hf([chunk], spec, source)


def _scores(source: Path, spec: ModelSpec) -> Tensor:
    if checkpoint.is_checkpoint(source):
        return Stored(source).read(SCORES)
    with safe_open(tensor_files(source, spec)["score.weight"], "pt") as file:
        return file.get_tensor("score.weight")


def _theirs(model: Path, spec: ModelSpec, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    # Written out, attention is what the configuration says, soft caps included.
    kind = AutoModelForSequenceClassification if SCORES in spec.weights else AutoModelForCausalLM
    theirs = kind.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    theirs.config.pad_token_id = None  # the last token is the one that is scored, whatever it is
    return torch.cat([theirs.eval()(row[None]).logits for row in ids])
