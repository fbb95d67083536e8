"""Preference losses: pure functions `(PairLogps, *, params) -> LossOutput` of completion-token log-probabilities.

They see no parallelism: every sum is over the pairs of one pack, and the step divides by the global number of pairs.
Notation: w chosen, l rejected; lp and lr the summed log-probabilities of policy and reference, n the number of tokens of a completion;
r = lp - lr, z = r or its f-divergence transform (`terms.scores`), d = z_w - z_l; b is beta, eps label_smoothing, s the logistic sigmoid,
LS log-sigmoid. Everything is computed in float32.
A preference p = P(first is better) weighs both readings of a pair: p loss(first, second) + (1 - p) loss(second, first).
Metrics, and losses of one side alone, call the side with p >= 0.5 chosen. A pair's extra `weight` multiplies its loss.

What a loss needs besides its pack is marked on its function: `terms.reference_free`, `terms.batch_wide`; `combined` tells it of any loss.
"""

from megapref.losses.batch_wide import aot, aot_unpaired
from megapref.losses.combined import combine
from megapref.losses.online import nash_md, xpo
from megapref.losses.pairs import (
    apo_down,
    apo_zero,
    bco_pair,
    cpo,
    discopop,
    dpo,
    dpop,
    exo_pair,
    hinge,
    ipo,
    nca_pair,
    orpo,
    robust,
    rpo_bwd_kl,
    rpo_fwd_kl,
    rpo_sq,
    sft,
    sigmoid_norm,
    simpo,
    sppo_hard,
)
from megapref.losses.unpaired import apo_zero_unpaired, bco, kto

aot_pair = aot_unpaired

__all__ = [
    "aot",
    "aot_pair",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "bco",
    "bco_pair",
    "combine",
    "cpo",
    "discopop",
    "dpo",
    "dpop",
    "exo_pair",
    "hinge",
    "ipo",
    "kto",
    "nash_md",
    "nca_pair",
    "orpo",
    "robust",
    "rpo_bwd_kl",
    "rpo_fwd_kl",
    "rpo_sq",
    "sft",
    "sigmoid_norm",
    "simpo",
    "sppo_hard",
    "xpo",
]
