"""The types that everything agrees on. `TokenPair` is the waist: above it pairs are made without a GPU, below it they are trained on without text.

Legend of the suffixes, which name logical dimensions whatever the shard:
T tokens in a pack, K trained completion tokens in a pack, P pairs, 2 = (first, second), C single completions,
S attention segments, V vocabulary, H hidden, N heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One prompt: its tokens, its text, the row it came from (judges and rewards see the row's columns), its number in the data set."""

    ids: list[int]
    text: str
    row: dict[str, Any]
    index: int


@dataclass(frozen=True)
class Completion:
    """One sampled completion. `ids` ends with the stop token when `finished`; nothing follows it."""

    ids: list[int]
    text: str
    finished: bool


@dataclass(frozen=True)
class Judgement:
    """What a judge that has more to say than preferences gives: its raw answer on each pair, and (sum, count) of what is worth logging."""

    preferences: list[float | None]
    texts: list[str | None]
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenPair:
    """A prompt with two completions. `preference` is P(first is better); an empty `second_ids` trains on the first alone.

    A mask says of each token of its completion whether it is trained; None: all are. `ref_logps`, where the reference's log-probabilities are
    known already, are of the trained tokens, the first side's before the second's.
    """

    prompt_ids: Sequence[int]
    first_ids: Sequence[int]
    second_ids: Sequence[int] = ()
    preference: float = 1.0
    extras: dict[str, float] = field(default_factory=dict)
    first_mask: Sequence[bool] | None = None
    second_mask: Sequence[bool] | None = None
    ref_logps: Sequence[float] | None = None


@dataclass(frozen=True)
class LocalModel:
    """A language model of the run that a judge asks. `logps(pairs)` has the log-probabilities of each pair's two sides after its prompt."""

    tokenizer: Any
    max_positions: int
    logps: Callable[[list[TokenPair]], list[tuple[float, float]]]


@dataclass(frozen=True)
class TokenCompletion:
    """A prompt with one completion that is desirable or not: the sibling of `TokenPair` for methods that need no pairs."""

    prompt_ids: Sequence[int]
    ids: Sequence[int]
    desirable: bool
    mask: Sequence[bool] | None = None
    ref_logps: Sequence[float] | None = None  # of the trained tokens


@dataclass(frozen=True)
class Comparison:
    """Two of a prompt's candidates, by their numbers, and P(the first is better); None: no verdict."""

    first: int
    second: int
    preference: float | None
    text: str | None  # the judge's raw answer
    trained: bool


@dataclass(frozen=True)
class Contest:
    """What became of a prompt of an online method: its candidates, the model that sampled each, their scores, the comparisons made of them."""

    prompt: Prompt
    candidates: list[Completion]
    models: tuple[str, ...]  # of each candidate: policy, reference
    scores: list[float | None]  # of each candidate; None: nothing scored it
    comparisons: list[Comparison]


@dataclass(frozen=True)
class PairBatch:
    """What a pair source yields for one optimizer step: this data-parallel rank's share of the pairs and what is worth logging of their making.

    `sums` maps a metric name to (sum, count); `samples` are rows for the table of completions. Methods without pairs have `TokenCompletion`s.
    `contests` are where an online method's pairs come from: their trained comparisons, in order, are the pairs.
    """

    step: int
    pairs: list[TokenPair] | list[TokenCompletion]
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    contests: list[Contest] = field(default_factory=list)

    @property
    def pairs_by_prompt(self) -> list[list[TokenPair] | list[TokenCompletion]]:
        """The pairs of each contest, some of which have none; each pair of a file by itself."""
        pairs = iter(self.pairs)
        if not self.contests:
            return [[pair] for pair in pairs]
        return [[next(pairs) for each in contest.comparisons if each.trained] for contest in self.contests]


@dataclass(frozen=True)
class PackedBatch:
    """Pairs, or single completions, laid out in one sequence of T tokens.

    A segment (query start, query length, prefix start, prefix length) is a run of tokens that attends to its prefix wholly and to itself causally.
    Completion token k is predicted by hidden state `query_index_K[k]`; `cell_K` says whose token it is: 2 * pair + side, or the number of the
    completion. `preference_P` is there for pairs, `desirable_C` for single completions.
    """

    token_ids_T: Tensor
    position_ids_T: Tensor
    segments_S: Tensor  # [S, 4] int64
    query_index_K: Tensor
    target_ids_K: Tensor
    cell_K: Tensor
    preference_P: Tensor | None = None  # float32
    desirable_C: Tensor | None = None  # bool
    num_padding: int = 0
    ref_logps_K: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)  # of every pair [P], or completion [C]

    @property
    def num_rows(self) -> int:
        """P, or C."""
        return len(self.desirable_C if self.preference_P is None else self.preference_P)


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of completion tokens, float32, whole whatever the layout. What a loss sees.

    `extras_K` has what a loss asked for of each token's distribution: `entropy`, and `log_sum_sq`, the log of the sum of squared probabilities.
    """

    policy_K: Tensor
    ref_K: Tensor
    cell_K: Tensor
    preference_P: Tensor
    extras_P: dict[str, Tensor] = field(default_factory=dict)
    extras_K: dict[str, Tensor] = field(default_factory=dict)

    def sum_by_completion(self, values_K: Tensor) -> Tensor:
        """[P, 2]: values summed over the tokens of each completion."""
        num_cells = 2 * len(self.preference_P)
        return values_K.new_zeros(num_cells).index_add(0, self.cell_K, values_K).view(-1, 2)

    @cached_property
    def policy_P2(self) -> Tensor:
        return self.sum_by_completion(self.policy_K)

    @cached_property
    def ref_P2(self) -> Tensor:
        return self.sum_by_completion(self.ref_K)

    @cached_property
    def length_P2(self) -> Tensor:
        return self.sum_by_completion(torch.ones_like(self.ref_K))


@dataclass(frozen=True)
class UnpairedLogps:
    """`PairLogps` of C single completions, each desirable or not: `cell_K` is the number of the completion."""

    policy_K: Tensor
    ref_K: Tensor
    cell_K: Tensor
    desirable_C: Tensor  # bool
    extras_C: dict[str, Tensor] = field(default_factory=dict)

    def sum_by_completion(self, values_K: Tensor) -> Tensor:
        """[C]: values summed over the tokens of each completion."""
        return values_K.new_zeros(len(self.desirable_C)).index_add(0, self.cell_K, values_K)

    @cached_property
    def policy_C(self) -> Tensor:
        return self.sum_by_completion(self.policy_K)

    @cached_property
    def log_ratio_C(self) -> Tensor:
        return self.policy_C - self.sum_by_completion(self.ref_K)


@dataclass(frozen=True)
class LossOutput:
    """Sums over the pairs of one pack; the step divides them by the global sum of `count`, once.

    A metric that is a mean over fewer has their number as "count <name>" beside it.
    """

    loss_sum: Tensor
    count: int
    metric_sums: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSpec:
    """A model in Core's terms, whatever the layout and the precision, and where its weights are in a Hugging Face checkpoint.

    `weights` maps each Core parameter, "{layer}" and "{expert}" standing for their numbers, to its kind (see convert/mapping.py) and Hugging Face
    tensors.
    """

    family: str  # config.json's model_type
    transformer: dict[str, Any]  # keyword arguments of mcore.layers.DecoderConfig
    vocab_size: int
    max_positions: int
    rotary_frequencies: tuple[float, ...]  # radians per position, one per pair of rotated dimensions
    tied: bool  # the output layer is the embedding
    dtype: str  # of the checkpoint: float32, bfloat16 or float16
    weights: dict[str, tuple[str, tuple[str, ...]]]
    local_rotary_frequencies: tuple[float, ...] = ()  # of layers with a sliding window, where they differ

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """The vocabulary with rows added that are no words, so that tensor-parallel ranks hold equal shares."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel


def summed(parts: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """The (sum, count) of every metric over the parts that several ranks have."""
    sums: dict[str, tuple[float, float]] = {}
    for name, (total, count) in chain.from_iterable(part.items() for part in parts):
        before = sums.get(name, (0.0, 0.0))
        sums[name] = before[0] + total, before[1] + count
    return sums


def means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """What is logged of each (sum, count): the mean, of a count of 0 the sum."""
    return {name: total / count if count else total for name, (total, count) in sums.items()}


Logps = PairLogps | UnpairedLogps
Loss = Callable[..., LossOutput]  # (PairLogps or UnpairedLogps, *, params) -> LossOutput
# Rewards and judges may be coroutine functions (async def).
Reward = Callable[..., list[float | None]]  # (list[Prompt], list[Completion], *, params); None abstains
Judge = Callable[..., list[float | None] | Judgement]  # (list[Prompt], first, second, *, params) -> P(first is better); None abstains
Generate = Callable[..., list[Completion]]  # (list[Prompt], model: "policy" | "reference", *, step, side)
PairSource = Iterator[PairBatch]


def is_per_node(function: Callable[..., Any]) -> bool:
    """Whether a reward is marked `per_node`: it loads a model, so one process of each node runs it for all of them."""
    return getattr(getattr(function, "func", function), "per_node", False)


def asks(function: Callable[..., Any]) -> str | None:
    """The parameter by which a judge names the model of the run that it asks, by its mark `asks`; it is called with that `LocalModel` in front."""
    return getattr(getattr(function, "func", function), "asks", None)


def needs(loss: Loss) -> frozenset[str]:
    """What a loss with its parameters bound has to be given besides log-probabilities, by its function's mark `needs(params)`.

    Of each token's distribution: `entropy`, `log_sum_sq`. Of each row: `mean_log_ratio`, the mean of lp - lr in the run so far; `kl`, KTO's baseline.
    """
    of_params = getattr(getattr(loss, "func", loss), "needs", None)
    return frozenset(of_params(getattr(loss, "keywords", {}))) if of_params else frozenset()
