"""Where a run's pairs come from, files or judged samples of the policy, and how its progress is evaluated: one function of each for each kind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from megapref import verdicts
from megapref.batch import Completion, LocalModel, Loss, PackedBatch, PairBatch, Prompt, TokenCompletion, TokenPair
from megapref.config import Config, Source
from megapref.data.mixture import Rows
from megapref.data.offline import load_pairs, mismatched, offline_pairs, pair_options
from megapref.data.packing import pack, packing_stats
from megapref.data.prompts import load_prompts, prompt_batches, prompt_options
from megapref.data.stream import Stream, digest_of, stream_pairs
from megapref.inference.engine import make_generate
from megapref.mcore import setup
from megapref.mcore.reference import Reference, fill_reference
from megapref.mcore.step import TrainState, evaluate_packs
from megapref.online.evaluation import evaluation, kl_to_reference, own_answers
from megapref.online.judges import Decide
from megapref.online.pairs import models_of, online_pairs

# Validation prompts are sampled with the noise of this "step", the same at every evaluation and never that of a training step.
_EVALUATION_STEP = 2**40

Value = TypeVar("Value")
Prepare = Callable[[list, Loss], tuple[list[PackedBatch], dict[str, float]]]  # a step's rows -> this rank's packs, with all that the loss needs
Evaluate = Callable[[], tuple[dict[str, float], list[dict]]]  # metrics of all ranks, rows for the table of samples


@dataclass(frozen=True)
class Data:
    """The tokenised rows of a run: prompts of an online method, else pairs; `counts` of what was changed while they were read.

    Training rows that are read while training are a `Stream`. A prompt with a completion has at most `max_length` tokens.
    """

    train: Rows | Stream
    validation: dict[str, list]
    counts: dict[str, int]
    max_length: int


def load_data(cfg: Config, tokenizer: PreTrainedTokenizerBase, max_positions: int, unpaired: bool = False) -> Data:
    """All rows that the config names, single completions where they are to be `unpaired`.

    ValueError for a row that cannot be used, in a pack or in a model of `max_positions`.
    """
    is_online, max_length = cfg.method.pairs == "online", min(cfg.data.max_length or max_positions, max_positions)

    def check(rows: Iterable, least: int = 0) -> None:
        longest = max(longest_sequence(cfg, rows, max_length), least)
        if longest > max_positions:
            raise ValueError(
                f"model.path={cfg.model.path} has {max_positions} positions (max_position_embeddings), but the longest prompt with its completion "
                f"takes {longest} tokens; lower data.max_length, data.max_prompt_length or generation.max_new_tokens, or use another model"
            )

    if is_online:  # a long prompt's completions get what it leaves; that even a short one's could not be whole is a mistake
        check((), (cfg.data.max_prompt_length or 1) + cfg.generation.max_new_tokens)
    load = partial(_load_prompts, cfg, tokenizer, max_length) if is_online else partial(_load_pairs, cfg, tokenizer, unpaired)
    read = {name: load([source]) for name, source in cfg.data.validation.items()}
    validation = {name: rows[: cfg.evaluation.max_prompts] for name, (rows, _) in read.items()}
    check(chain(*validation.values()))
    if cfg.data.streaming:
        options = pair_options(cfg, cfg.pack_tokens) | {"unpaired": unpaired}
        return Data(Stream(cfg.data.train, tokenizer, options, cfg.data.shuffle_buffer, check), validation, {}, max_length)
    train, counts = load(cfg.data.train)
    check(train)
    counts |= {key.replace("data/", f"data/validation-{name}_"): n for name, (_, own) in read.items() for key, n in own.items() if n}
    return Data(train, validation, counts, max_length)


def longest_sequence(cfg: Config, rows: Iterable, max_length: int) -> int:
    """The most tokens of a prompt and one completion among prompts or pairs; one that is to be sampled ends at `max_length`."""

    def length(row: Prompt | TokenPair | TokenCompletion) -> int:
        if isinstance(row, Prompt):
            return min(len(row.ids) + cfg.generation.max_new_tokens, max_length)
        if isinstance(row, TokenCompletion):
            return len(row.prompt_ids) + len(row.ids)
        return len(row.prompt_ids) + max(len(row.first_ids), len(row.second_ids))

    return max(map(length, rows), default=0)


def fingerprint(rows: Rows | Stream) -> str:
    """A digest of the rows' tokens, in their order; of a stream `digest_of`."""
    if isinstance(rows, Stream):
        return digest_of(rows)
    digest = hashlib.sha256()
    for row in rows:
        for ids in _token_lists(row):
            digest.update(np.array([len(ids), *ids], dtype=np.int32).tobytes())
    return digest.hexdigest()[:16]


def _token_lists(row: Prompt | TokenPair | TokenCompletion) -> tuple[Sequence[int], ...]:
    match row:
        case Prompt():
            return (row.ids,)
        case TokenCompletion():
            return row.prompt_ids, row.ids, [int(row.desirable)]
        case _:
            return row.prompt_ids, row.first_ids, row.second_ids


def of_epoch(cfg: Config, data: Data, losses: list[Loss], step: int) -> Loss:
    """The loss of the epoch that step `step` (from 0) is in; the last one stays. A stream's epochs have no known end: it has one loss."""
    if isinstance(data.train, Stream):
        return losses[0]
    return losses[min(step * cfg.train.global_batch_size // len(data.train), len(losses) - 1)]


def mismatched_packs(cfg: Config, completions: list[TokenCompletion], max_positions: int) -> list[PackedBatch]:
    """This rank's packs of the step's completions after prompts that are not theirs."""
    limit = min(cfg.data.max_length or max_positions, max_positions, cfg.pack_tokens)
    return packs_of(cfg, mismatched(completions, limit))[0]


def packs_of(cfg: Config, pairs: list[TokenPair] | list[TokenCompletion]) -> tuple[list[PackedBatch], dict[str, float]]:
    """This rank's packs of the step's pairs, and how well all ranks' packs are filled."""
    packs = pack(
        pairs,
        max_tokens=cfg.pack.max_tokens,
        num_ranks=setup.data_parallel_size(),
        share_prompt=cfg.pack.share_prompt,
        pad_multiple=cfg.pad_multiple,
        pack_multiple=cfg.parallel.pack_multiple,
        one_length=cfg.parallel.tp_comm_overlap,
    )
    return packs[setup.data_parallel_rank()], packing_stats(packs)


def online_source(
    cfg: Config,
    data: Data,
    state: TrainState,
    ref: Reference | None,
    tokenizer: PreTrainedTokenizerBase,
    engines: dict[str, Callable],
    load_judge: Callable[[str], LocalModel],
    first_only: bool,
    total_steps: int,
) -> tuple[Iterator[PairBatch], Evaluate]:
    """Pairs of judged samples from step `state.step` on to `total_steps`; `first_only`: the loss does not train on the second of a pair.

    Evaluation plays the policy against the reference, answers of the rows or another model.
    """
    generate = make_generate(engines, cfg.generation, tokenizer, cfg.run.seed, data.max_length)
    decide = partial(verdicts.decide, cfg, *verdicts.place(cfg, load_judge))
    source = online_pairs(
        prompt_batches(data.train, **_deal(cfg, state)),
        generate,
        decide(cfg.method.ties or ("skip" if cfg.judge else "first"), cfg.method.soft_preference),
        models=models_of(cfg.method.candidates, cfg.method.num_candidates),
        pairing=cfg.method.pairing,
        by_scores=cfg.judge is None,
        first_only=first_only,
        mixture_coef=partial(mixture_coef, cfg, data) if "mixture" in engines else None,
        counts=data.counts,
        sync_every=cfg.generation.sync_every,
        total_steps=total_steps,
    )
    # A tie is half a win when models are compared, whatever training does with it.
    return source, _evaluation(cfg, data, state, ref, tokenizer, engines, decide("soft"))


def mixture_coef(cfg: Config, data: Data, step: int) -> float:
    """The reference's share in the logits of a mixture that samples step `step` (from 0)."""
    given = cfg.method.mixture_coef
    return of_epoch(cfg, data, given if isinstance(given, list) else [given], step)


def _evaluation(
    cfg: Config,
    data: Data,
    state: TrainState,
    ref: Reference | None,
    tokenizer: PreTrainedTokenizerBase,
    engines: dict[str, Callable],
    decide: Decide,
) -> Evaluate:
    against, temperature = cfg.evaluation.against, cfg.evaluation.temperature
    generation = cfg.generation if temperature is None else replace(cfg.generation, temperature=temperature)
    generate = partial(make_generate(engines, generation, tokenizer, cfg.run.seed, data.max_length), step=_EVALUATION_STEP)
    if against == "rows":
        prompts = list(chain(*data.validation.values()))
        answers = dict(zip(map(id, prompts), own_answers(prompts, cfg.evaluation.answers, tokenizer), strict=True))

    def opponent(mine: list[Prompt]) -> list[Completion]:
        if against == "rows":
            return [answers[id(prompt)] for prompt in mine]
        return generate(mine, "reference" if against == "reference" else "opponent", side=1)

    def kl(pairs: list[TokenPair]) -> float:
        return evaluate_packs(state.chunks, fill_reference(ref, packs_of(cfg, pairs)[0]), kl_to_reference)["loss"]

    return evaluation(
        data.validation,
        policy=partial(generate, model="policy", side=0),
        opponent=opponent,
        decide=decide,
        kl=kl if ref else None,
        against=against,
        moves=against == "reference" and cfg.reference.sync_steps > 0,
        rank=setup.data_parallel_rank(),
        num_ranks=setup.data_parallel_size(),
        gather=setup.gather_over_data_parallel,
    )


def offline_source(cfg: Config, data: Data, state: TrainState, losses: list[Loss], prepare: Prepare) -> tuple[Iterator[PairBatch], Evaluate]:
    """Pairs from files from step `state.step` on; evaluation measures the epoch's loss on the validation pairs."""

    def evaluate_now() -> tuple[dict[str, float], list[dict]]:
        metrics = {}
        for name, rows in data.validation.items():
            loss = of_epoch(cfg, data, losses, state.step)
            measured = evaluate_packs(state.chunks, prepare(rows, loss)[0], loss)
            metrics |= {f"validation-{name}_{key}": value for key, value in measured.items()}
        return metrics, []

    if isinstance(data.train, Stream):
        read = setup.on_every_rank(partial(next, stream_pairs(data.train, **_deal(cfg, state))))
        return iter(read, None), evaluate_now
    return offline_pairs(data.train, **_deal(cfg, state), counts=data.counts), evaluate_now


def _load_prompts(cfg: Config, tokenizer: PreTrainedTokenizerBase, max_length: int, sources: list[Source]) -> tuple[Rows, dict[str, int]]:
    return load_prompts(sources, tokenizer, **prompt_options(cfg, cfg.pack_tokens, max_length))


def _load_pairs(cfg: Config, tokenizer: PreTrainedTokenizerBase, unpaired: bool, sources: list[Source]) -> tuple[Rows, dict[str, int]]:
    return load_pairs(sources, tokenizer, **pair_options(cfg, cfg.pack_tokens), unpaired=unpaired)


def _deal(cfg: Config, state: TrainState) -> dict:
    """How rows are dealt out to steps and ranks."""
    return {
        "global_batch_size": cfg.train.global_batch_size,
        "rank": setup.data_parallel_rank(),
        "num_ranks": setup.data_parallel_size(),
        "seed": cfg.run.seed,
        "start_step": state.step,
        "shuffle": cfg.data.shuffle,
    }
