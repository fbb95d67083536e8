"""The model that a judge asks within the run: the policy, the reference, or another one in the same layout."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from megapref.batch import LocalModel, ModelSpec, TokenPair
from megapref.config import Config
from megapref.convert.families import read_spec
from megapref.convert.hf import find_model, load_hf
from megapref.data.chat import load_tokenizer
from megapref.data.packing import pack, pair_tokens
from megapref.mcore import overlap, reference, setup
from megapref.mcore.model import build_model
from megapref.mcore.reference import Reference
from megapref.mcore.step import score_packs


def local_model(
    cfg: Config, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, policy: list[torch.nn.Module], ref: Reference | None, name: str
) -> LocalModel:
    """The model `name`: policy (as it is at the time), reference, or a Hugging Face folder or hub name, which is loaded; a collective of all ranks.

    `spec` and `tokenizer` are the policy's. ValueError where there is no such model.
    """
    if name == "reference" and ref is None:
        raise ValueError(f'judge.params.model="reference", but reference.mode="{cfg.reference.mode}" holds none; use reference.mode=resident')
    if name == "policy":
        in_place = partial(nullcontext, policy)
    elif name == "reference":
        in_place = ref.in_place
    else:
        folder, spec, tokenizer = setup.on_every_rank(_read)(name)
        chunks = build_model(spec, cfg.parallel, cfg.precision, cfg.kernels)
        load_hf(chunks, spec, folder)
        in_place = reference.resident(chunks).in_place
    return LocalModel(tokenizer, spec.max_positions, partial(_logps, cfg, in_place))


def _read(name: str):
    folder = find_model(name, "judge.params.model")
    return folder, read_spec(folder), load_tokenizer(str(folder))


def _logps(cfg: Config, in_place, pairs: list[TokenPair]) -> list[tuple[float, float]]:
    """The log-probability of each pair's two sides after its prompt, the same on every rank of the model's group; a collective of all ranks."""
    numbered = [replace(pair, extras={"number": float(i)}) for i, pair in enumerate(pairs)]  # the packs say which pairs are in them by this
    longest = max(map(pair_tokens, pairs), default=0) + cfg.pad_multiple - 1
    multiples = {"pad_multiple": cfg.pad_multiple, "pack_multiple": cfg.parallel.pack_multiple}
    packs = pack(numbered, max_tokens=max(cfg.pack.max_tokens, longest), **multiples)[0]
    if cfg.parallel.expert > 1:  # the shares of the pairs compute together: all need as many packs, whatever questions they have
        nothing, missing = pack([], max_tokens=cfg.pack.max_tokens, **multiples)[0], setup.largest(len(packs)) - len(packs)
        packs += nothing * (missing // len(nothing))
    with in_place() as chunks, overlap.paused(chunks):
        scored = score_packs(chunks, packs)
    found: dict[int, tuple[float, float]] = {}
    for one, logps_K in zip(packs, scored, strict=True):
        if logps_K is not None and one.num_rows:
            sums_P2 = torch.zeros(2 * one.num_rows).index_add(0, one.cell_K, logps_K.cpu()).view(-1, 2)
            found |= zip(map(int, one.extras["number"].tolist()), map(tuple, sums_P2.tolist()), strict=True)
    found = setup.from_last_stage(found)
    return [found[i] for i in range(len(pairs))]
