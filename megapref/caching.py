"""`reference.mode=cached`: the reference's log-probabilities come from disk; what is missing there is scored once, before training.

Before any training the policy is the reference, so it does the scoring and no second model is made. Every process has all rows and reads the
same shards, so all agree on what is missing; each data-parallel rank scores its packs and writes a shard of its own.
"""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import batched, chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megapref.batch import TokenCompletion, TokenPair
from megapref.config import Config
from megapref.data.reference_cache import check_shards, key_of, model_folder, read_shards, write_meta, write_shard
from megapref.mcore import gather, setup
from megapref.mcore.step import score_packs
from megapref.sources import Data, packs_of

ROWS_PER_SHARD = 512
SAMPLE = 8  # rows that are scored again
# How far the log-probability of a token may be from the cached one, in nats: rounding differs between layouts, packings and machines.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.25}

Row = TokenPair | TokenCompletion
Logps = dict[bytes, array]


def with_reference(cfg: Config, model: Path, policy: list[torch.nn.Module], data: Data) -> Data:
    """The data with `ref_logps` in every row: read from the cache, or scored with the `policy`, which is still as in the folder `model`.

    A collective of all ranks. ValueError where rows scored again differ from the cache, or it cannot be read or written.
    """
    rows = list(chain(data.train, *data.validation.values()))
    keys = [key_of(row) for row in rows]
    folder = setup.gather_over_world(setup.on_first_rank(_open)(cfg, model))[0]
    for chunk in policy:
        chunk.eval()
    found = _read(folder, set(keys))
    _check_sample(cfg, policy, folder, found, dict(zip(keys, enumerate(rows), strict=True)))
    missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in found}
    _say(f"reference cache {folder}: has {len(found):,} of {len(set(keys)):,} rows")
    _fill(cfg, policy, folder, missing)
    found |= _read(folder, missing.keys()) if missing else {}
    for chunk in policy:
        chunk.train()
    ready = iter([replace(row, ref_logps=found[key]) for key, row in zip(keys, rows, strict=True)])
    train = replace(data.train, items=list(islice(ready, len(data.train))))
    return replace(data, train=train, validation={name: list(islice(ready, len(rows))) for name, rows in data.validation.items()})


def _open(cfg: Config, model: Path) -> Path:
    """The model's folder in the cache, with a word for people on what it is for."""
    cache = Path(cfg.reference.cache or Path(cfg.run.dir) / "reference_cache")
    folder = model_folder(cache, model, cfg.precision.dtype)
    data: dict[str, Any] = {key: getattr(cfg.data, key) for key in ("max_length", "max_prompt_length", "max_completion_length", "truncation")}
    tokenizer = {"tokenizer": cfg.model.tokenizer or cfg.model.path, "chat_template": cfg.model.chat_template}
    sources = [source.path for source in (*cfg.data.train, *cfg.data.validation.values())]
    try:
        write_meta(folder, {"model": cfg.model.path, "dtype": cfg.precision.dtype, **tokenizer, **data, "sources": sources})
    except OSError as error:
        raise _not_written(folder, error) from error
    return folder


def _read(folder: Path, wanted: Iterable[bytes]) -> Logps:
    """What the cache has of the wanted keys, the same on every rank. Shards that are spoilt are removed, so that their rows are scored again."""

    def shards() -> list[Path]:
        good, spoilt = check_shards(folder)
        for path in spoilt:
            _say(f"reference cache {path}: is damaged; it is removed, and its rows are scored again")
            path.unlink()
        return good

    files = setup.gather_over_world(setup.on_first_rank(shards)())[0]
    return setup.on_every_rank(read_shards)(files, wanted)


def _check_sample(cfg: Config, policy: list[torch.nn.Module], folder: Path, found: Logps, rows: dict[bytes, tuple[int, Row]]) -> None:
    """ValueError where a few rows, other ones with another run.seed, have other log-probabilities now than in the cache."""
    sample = random.Random(cfg.run.seed).sample(sorted(found), min(SAMPLE, len(found)))
    if not sample:
        return
    scored = _score(cfg, policy, [rows[key][1] for key in sample])
    for number, now in chain.from_iterable(part.items() for part in setup.gather_over_world(scored)):
        then, place = np.asarray(found[sample[number]]), rows[sample[number]][0]
        assert len(then) == len(now), f"{folder}: {len(then)} log-probabilities under the key of {len(now)} tokens"
        worst = int(np.argmax(np.abs(now - then)))
        if not abs(now[worst] - then[worst]) <= TOLERANCE[cfg.precision.dtype]:
            raise ValueError(
                f"reference.cache: {folder} has the log-probability {then[worst]:.6f} for trained token {worst} of pair {place} (of the usable ones "
                f"of data.train, then data.validation), which is now scored {now[worst]:.6f}; reference.mode=cached allows a difference of "
                f"{TOLERANCE[cfg.precision.dtype]:g} with precision.dtype={cfg.precision.dtype}. Remove the folder, and it is filled again"
            )


def _fill(cfg: Config, policy: list[torch.nn.Module], folder: Path, missing: dict[bytes, Row]) -> None:
    """Scores the missing rows and writes them, shard by shard: one that is killed keeps what it has written."""
    started, done = time.perf_counter(), 0
    for part in batched(missing, ROWS_PER_SHARD * setup.data_parallel_size()):
        scored = _score(cfg, policy, [missing[key] for key in part])
        setup.on_every_rank(_write)(folder, {part[number]: logps for number, logps in scored.items()})
        done += len(part)
        rate = done / (time.perf_counter() - started)
        _say(f"reference cache {folder}: scored {done:,} of {len(missing):,} missing rows, {rate:.3g} rows/s")


def _write(folder: Path, logps: dict[bytes, np.ndarray]) -> None:
    try:
        if logps:
            write_shard(folder, logps)
    except OSError as error:
        raise _not_written(folder, error) from error


def _not_written(folder: Path, error: OSError) -> ValueError:
    return ValueError(f"reference.cache: {folder} cannot be written ({error.strerror}); make room there, or choose another folder")


def _score(cfg: Config, policy: list[torch.nn.Module], rows: Sequence[Row]) -> dict[int, np.ndarray]:
    """Log-probabilities by number of the rows that fell to this data-parallel rank; only one process of each model has them, the others none."""
    # The packs say which pairs are in them by this extra.
    packs, _ = packs_of(cfg, [replace(_as_pair(row), ref_logps=None, extras={"number": float(i)}) for i, row in enumerate(rows)])
    scored: dict[int, np.ndarray] = {}
    for pack, logps_K in zip(packs, score_packs(policy, packs), strict=True):
        if logps_K is not None and gather.tensor_parallel_rank() == 0:
            ends = torch.bincount(pack.cell_K // 2, minlength=pack.num_rows).cumsum(0)
            parts = np.split(logps_K.float().cpu().numpy(), ends[:-1].numpy()) if pack.num_rows else []
            scored |= zip(map(int, pack.extras["number"].tolist()), parts, strict=True)
    return scored


def _as_pair(row: Row) -> TokenPair:
    return row if isinstance(row, TokenPair) else TokenPair(row.prompt_ids, row.ids, first_mask=row.mask)


def _say(text: str) -> None:
    if setup.is_first_rank():
        print(text, flush=True)
