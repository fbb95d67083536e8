"""The normalisation of every layer: Core's torch norm refuses sequence parallelism and zero-centred weights."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup


class _Stored(torch.nn.Module):
    """A module whose weights Core's distributed checkpoints have; those in `split_axes` (axis by name) in tensor-parallel parts."""

    split_axes: ClassVar[dict[str, int]] = {}

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Core's description of the weights. Its default would not know that tensor-parallel ranks have copies."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.split_axes,
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )


class Norm(_Stored):
    """RMS norm (arXiv:1910.07467) or layer norm (arXiv:1607.06450) over the last dimension, as Core's TransformerConfig says.

    Under sequence parallelism a rank sees some of the rows: the parameters carry `sequence_parallel`, so that Core sums their gradients.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs):
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        make = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(make(hidden_size, dtype=config.params_dtype, device=device))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=device))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as `x` [..., hidden_size]."""
        if self.zero_centered:  # 1 + weight has more digits than weight
            bias = None if self.bias is None else self.bias.float()
            return self._norm(x.float(), 1 + self.weight.float(), bias).type_as(x)
        return self._norm(x, self.weight, self.bias)

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


class ProjectionNorm(_Stored):
    """RMS norm over all heads of a token's queries, or keys, together. Tensor-parallel ranks have the weights of their heads."""

    split_axes: ClassVar[dict[str, int]] = {"weight": 0}

    def __init__(self, config, hidden_size: int, eps: float, num_heads: int, group: ProcessGroup):
        super().__init__()
        self.eps, self.num_elements, self.group = eps, num_heads * hidden_size, group
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        share = self.num_elements // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.ones(share, dtype=config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as `x` [..., this rank's heads, head width]."""
        values = x.flatten(-2).float()
        square = values.square().sum(-1, keepdim=True)
        # The sum over ranks goes to all of them, and all of them have a gradient for it.
        square = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(square, self.group), self.group)
        return (values * (square / self.num_elements + self.eps).rsqrt() * self.weight).type_as(x).view_as(x)
