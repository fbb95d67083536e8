"""The normalisation of every layer: Core's torch norm refuses sequence parallelism and zero-centred weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Norm(torch.nn.Module):
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
        weight = 1 + self.weight if self.zero_centered else self.weight
        if self.bias is None:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, self.bias, self.eps)
