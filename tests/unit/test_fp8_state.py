"""What Transformer Engine keeps of FP8: scales of weights, of moments and in checkpoints; its classes stood in for."""

import os
from types import SimpleNamespace

import torch

from megapref.config import Optimizer, Precision
from megapref.mcore import optimizer as optimizers
from megapref.mcore.model import set_weight
from megapref.mcore.sharded_state import load_module, load_optimizer

PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


class Scaled(torch.nn.Module):
    """A layer that notes whether pickles may be read when its scales are loaded."""

    def get_extra_state(self):
        return "scales"

    def set_extra_state(self, state):
        self.allowed = os.environ.get(PICKLES)


def test_a_checkpoints_scales_are_read_and_nothing_else_is_allowed_to(monkeypatch):
    layer = Scaled()
    for before in (None, "0"):
        monkeypatch.delenv(PICKLES, raising=False)
        if before is not None:
            monkeypatch.setenv(PICKLES, before)
        load_module(layer, {"_extra_state": "scales"})
        assert layer.allowed == "1" and os.environ.get(PICKLES) == before


def test_a_weight_in_fp8_gets_the_scale_that_fits_it_and_no_trace_of_memory_that_was_not_set():
    parameter = torch.nn.Parameter(torch.empty(2, 2))
    parameter._quantizer = SimpleNamespace(amax=torch.tensor([1e38]), scale=torch.ones(()))
    set_weight(parameter, torch.tensor([[0.5, -1.75], [0.0, 1.0]]))
    assert parameter._quantizer.amax == 0 and parameter._quantizer.scale == 448 / 1.75
    set_weight(parameter, torch.zeros(2, 2))
    assert parameter._quantizer.scale.isfinite()


class Adam:
    """As Transformer Engine's: of what is put into it, it works out the scale itself."""

    def __init__(self, weights: torch.Tensor):
        self.param_groups = [{"params": [weights]}]
        self.state = {weights: {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}}
        self.scaled = {}

    def set_scaled_state(self, weights, name, values):
        self.scaled[name] = values


def test_moments_in_fp8_are_loaded_with_a_scale_that_fits_them():
    weights, model_weights = torch.zeros(2), torch.zeros(2)
    adam = Adam(weights)
    saved = {"param": torch.ones(2), "exp_avg": torch.full((2,), 2.0), "exp_avg_sq": torch.full((2,), 3.0)}
    part = SimpleNamespace(
        optimizer=adam,
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False),
        model_param_group_index_map={model_weights: (0, 0)},
    )
    part.load_parameter_state_from_fully_reshardable = lambda state: part._set_main_param_and_optimizer_states(model_weights, state)
    load_optimizer(SimpleNamespace(chained_optimizers=[part]), {"param_state": saved}, 7.0)
    assert weights.equal(torch.ones(2)) and adam.param_groups[0]["step"] == 7
    assert set(adam.scaled) == {"exp_avg", "exp_avg_sq"} and adam.scaled["exp_avg_sq"].equal(saved["exp_avg_sq"])


def test_weights_in_float32_are_kept_whole_as_core_cannot_load_their_lower_halves(monkeypatch):
    made = []
    monkeypatch.setattr(optimizers, "OptimizerConfig", lambda **options: SimpleNamespace(**options))  # Core's asks for Transformer Engine
    monkeypatch.setattr(optimizers, "get_megatron_optimizer", lambda options, chunks: made.append(options) or SimpleNamespace(chained_optimizers=[]))
    optimizers.build_optimizer([], Optimizer(lr=1e-3), Precision(dtype="bf16", moments="bf16"))
    assert made[0].use_precision_aware_optimizer and not made[0].store_param_remainders


def test_moments_that_are_all_zero_have_a_scale_in_fp8():
    def apply(name, moments, scale):  # as Transformer Engine's
        scale.copy_(moments.abs().max() / 448)
        moments.div_(scale)

    for values in ([0.0, 0.0], [0.0, -4.0], [2.0, -4.0]):
        moments, scale = torch.tensor(values), torch.ones(())
        optimizers._apply_scale(apply, "exp_avg", moments, scale)
        assert moments.isfinite().all() and torch.allclose(moments * scale, torch.tensor(values), atol=1e-29)
