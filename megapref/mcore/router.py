"""The router of a mixture's layers: Core's, with counts of the experts' load and a load-balancing loss that packing and layout do not change.

Core's own losses are of the tokens of one pack on one rank (Switch Transformer, arXiv 2101.03961), so they depend on what is packed together. Here
each row of the step (a pair, or a single completion) has its own, as DeepSeek-V3's sequences have (arXiv 2412.19437), and the step's loss is their
mean, as it is of the preference losses. Of the n tokens of a row that predict a trained token, layer l gives the probability p_te to expert e:

    f_le = 1/n * (how many of them go to e)    P_le = 1/n * sum_t p_te    loss of the row = 1/L * sum_l E * sum_e f_le * P_le

What counts is what the preference loss sees, so prompts and padding do not, whether the prompt is stored once or twice; the last layer of a pack
computes nothing else anyway. k experts per token in perfect balance give k. For each layer alone it is transformers' `load_balancing_loss_func`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import MoEAuxLossAutoScaler, TopKRouter
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn import Module

from megapref.batch import PackedBatch
from megapref.mcore import device


@dataclass(frozen=True)
class TrainedTokens:
    """How many trained tokens each of a rank's tokens of a pack predicts (2 at the end of a shared prompt), for which row of the step, and how many
    the whole row has. A token predicts those of one row. `num_predicted` is the sum of the weights, before the tokens are parted."""

    weight_T: Tensor
    row_T: Tensor
    length_R: Tensor
    num_predicted: int

    @classmethod
    def of(cls, pack: PackedBatch, num_tokens: int, query_index_K: Tensor, which_K: Tensor | None) -> TrainedTokens:
        """Of a context-parallel rank with so many tokens, which predicts the tokens `which_K` of the pack (None: all) at `query_index_K`."""
        row_K = pack.cell_K if pack.preference_P is None else pack.cell_K // 2
        mine_K = row_K if which_K is None else row_K[which_K]
        weight_T = torch.zeros(num_tokens, device=row_K.device).index_add(0, query_index_K, torch.ones(len(mine_K), device=row_K.device))
        row_T = row_K.new_zeros(num_tokens).index_copy(0, query_index_K, mine_K)
        return cls(weight_T, row_T, torch.bincount(row_K, minlength=pack.num_rows).clamp(min=1), len(mine_K))

    def part(self, number: int, size: int) -> TrainedTokens:
        """One of `size` equal parts of the tokens: a sequence-parallel rank's."""
        return replace(self, weight_T=self.weight_T.chunk(size)[number], row_T=self.row_T.chunk(size)[number])

    def at(self, output_rows: Tensor) -> TrainedTokens:
        """The tokens that predict, one by one; behind them there may be padding."""
        is_predicted = torch.arange(len(output_rows), device=output_rows.device) < self.num_predicted
        return replace(self, weight_T=is_predicted.float(), row_T=self.row_T[output_rows])


class Router(TopKRouter):
    """Core's router. While it is trained it counts, until `take_balance`, the choices and sums up the load-balancing loss of the `trained` tokens."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.trained: TrainedTokens | None = None
        self.aux_loss_coef = 0.0
        self.choices_E, self.aux_sum = (torch.zeros(shape, dtype=torch.float64, device=device.current()) for shape in (self.num_experts, ()))

    def gating(self, hidden: Tensor) -> Tensor:
        """Core's logits; of a pack without pairs, which has no tokens in the last layer and which Core (0.19) cannot shape, torch's."""
        return super().gating(hidden) if hidden.numel() else torch.nn.functional.linear(hidden, self.weight)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Core's probabilities and choices [T, E]; the gradient of the load-balancing loss is added in the backward pass of the former."""
        probs, choices_TE = super().routing(logits, padding_mask)
        if self.trained is None or not torch.is_grad_enabled():
            return probs, choices_TE
        weighted_TE = choices_TE * self.trained.weight_T[:, None]
        self.choices_E += weighted_TE.sum(0)
        if self.aux_loss_coef:
            aux = self._aux_loss(logits.view(-1, self.num_experts).float().softmax(-1), weighted_TE)
            self.aux_sum += aux.detach()
            probs = MoEAuxLossAutoScaler.apply(probs, self.aux_loss_coef / self.config.num_layers * aux)
        return probs, choices_TE

    def _aux_loss(self, probs_TE: Tensor, weighted_TE: Tensor) -> Tensor:
        """What this rank's tokens add to the sum over rows of E * sum_e f_e * P_e. f counts the tokens of all ranks that share the pack."""
        row_T, length_R = self.trained.row_T, self.trained.length_R
        choices_RE = weighted_TE.new_zeros(len(length_R), self.num_experts).index_add(0, row_T, weighted_TE)
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(choices_RE, group=self.tp_cp_group)
        share_RE = choices_RE / length_R[:, None].square()
        return self.num_experts * (share_RE[row_T] * self.trained.weight_T[:, None] * probs_TE).sum()


def routers(chunks: list[Module]) -> Iterator[Router]:
    """Those of this process's layers; none where the model is no mixture."""
    return (module for chunk in unwrap_model(chunks) for module in chunk.modules() if isinstance(module, Router))


def prepare_routers(chunks: list[Module], aux_loss_coef: float, freeze: bool) -> None:
    """Sets how the routers of a model are trained: by a load-balancing loss, too, or not at all. Before the model is wrapped for training."""
    for router in routers(chunks):
        router.aux_loss_coef = aux_loss_coef
        router.weight.requires_grad_(not freeze)


def take_balance(chunks: list[Module], num_rows: float) -> dict[str, float]:
    """Metrics of the step's routers, which start anew; the same on every rank, a collective of all. Nothing where the model is no mixture.

    `moe/load_max`, of the worst layer, and of each: choices of the busiest expert over those of all in the mean. `moe/aux_loss` if it is trained on.
    """
    config = unwrap_model(chunks)[0].config
    if config.num_moe_experts is None:
        return {}
    table_LX = torch.zeros(config.num_layers, config.num_moe_experts + 1, dtype=torch.float64, device=device.current())
    coef = 0.0
    for router in routers(chunks):
        table_LX[router.layer_number - 1] = torch.cat([router.choices_E, router.aux_sum[None]])
        router.choices_E.zero_(), router.aux_sum.zero_()
        coef = router.aux_loss_coef
    dist.all_reduce(table_LX)
    choices_LE = table_LX[:, :-1]
    load_L = (choices_LE.amax(1) / choices_LE.mean(1).clamp(min=1 / config.num_moe_experts)).tolist()
    metrics = {"moe/load_max": max(load_L), **{f"moe/load_max/layer_{layer}": load for layer, load in enumerate(load_L)}}
    return metrics | ({"moe/aux_loss": float(table_LX[:, -1].mean()) / max(num_rows, 1)} if coef else {})
