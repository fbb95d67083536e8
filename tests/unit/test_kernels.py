"""Which kernels are chosen and what is refused, on machines that are made up: a pure function of what is found."""

import pytest
import torch.nn.functional as F

from megapref.config import Config, Kernels, Optimizer, Precision, load
from megapref.mcore import setup  # noqa: F401  makes Core importable without a GPU
from megapref.mcore.device import gpu_number
from megapref.mcore.kernels import Machine, check_machine, choose, machine, no_decoding_attention

TE = {"Transformer Engine": "2.20.2"}
H100 = Machine((9, 0), (13, 0), {**TE, "flash-attn 4": "4.0.0b20"})
BLACKWELL = Machine((10, 0), (13, 0), TE)
ADA = Machine((8, 9), (12, 4), TE)
A100 = Machine((8, 0), (12, 4), TE)
BARE = Machine((9, 0), (13, 0), {"Transformer Engine": "2.20.2 does not work: OSError: libcudnn.so.9: cannot open"})
CPU = Machine(None, (13, 0), {"Transformer Engine": "2.20.2 is installed and not imported: there is no GPU"})
BF16 = Precision(dtype="bf16")
LLAMA = {"hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 14336, "gated_linear_unit": True, "activation_func": F.silu}


def test_a_hopper_gpu_with_everything_gets_everything():
    choice = choose(LLAMA, 1, BF16, Kernels(), H100)
    assert (choice.te_layers, choice.te_attention, choice.fused_rope, choice.fused_activation, choice.fused_gradients) == (True,) * 5
    assert choice.why == {}


@pytest.mark.parametrize("found, reason", [(CPU, "there is no GPU"), (BARE, "libcudnn")])
def test_without_transformer_engine_all_is_torch_and_says_why(found, reason):
    choice = choose(LLAMA, 1, BF16, Kernels(), found)
    assert not (choice.te_layers or choice.te_attention or choice.fused_rope or choice.fused_gradients)
    assert reason in choice.why["layers"] and reason in choice.why["attention"]
    assert choice.fused_activation == (found.capability is not None)


def test_overlap_without_transformer_engine_is_refused_before_anything_starts():
    cfg = load("dpo", ["precision=bf16", "parallel=tp2sp", "parallel.tp_comm_overlap=true"], world_size=2)
    with pytest.raises(ValueError, match=r"parallel.tp_comm_overlap=true needs Transformer Engine's userbuffers: there is no GPU; use false"):
        check_machine(cfg, CPU)
    check_machine(cfg, H100)


@pytest.mark.parametrize("environment, visible, number", [
    ({}, 1, 0),
    ({"LOCAL_RANK": "3"}, 8, 3),
    ({"LOCAL_RANK": "3"}, 1, 0),  # a launcher has left it one of its own
    ({"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, 1, None),
    ({"LOCAL_RANK": "3"}, 2, None),
])
def test_a_process_has_a_gpu_of_its_own(environment, visible, number):
    if number is not None:
        assert gpu_number(environment, visible) == number
        return
    with pytest.raises(ValueError, match=rf"process {environment['LOCAL_RANK']} of this machine .* start at most {visible} .* CUDA_VISIBLE_DEVICES="):
        gpu_number(environment, visible)


def test_this_machine_runs_in_torch():
    assert machine().capability is None
    choice = choose(LLAMA, 1, Precision(), Kernels(), machine())
    assert not (choice.te_layers or choice.te_attention or choice.fused_activation or choice.fused_bias_dropout)


@pytest.mark.parametrize("change, attention, reason", [
    ({"attention_softcap": 50.0}, False, "soft-capped"),
    ({"kv_channels": 256}, False, "256 wide"),
    ({"kv_channels": 128}, True, None),
    ({"two_rotary_bases": True}, True, None),
])
def test_attention_of_the_model_decides(change, attention, reason):
    choice = choose(LLAMA | change, 1, BF16, Kernels(), H100)
    assert choice.te_attention is attention and (reason or "") in choice.why.get("attention", "")
    assert choice.fused_rope is ("two_rotary_bases" not in change)


def test_gelu_is_not_fused_as_core_would_approximate_it():
    choice = choose(LLAMA | {"activation_func": F.gelu, "gated_linear_unit": False}, 1, BF16, Kernels(), H100)
    assert not choice.fused_activation and "tanh" in choice.why["activation"]


def test_fp32_stays_in_torch_and_options_are_obeyed():
    assert not choose(LLAMA, 1, Precision(), Kernels(), H100).te_layers
    choice = choose(LLAMA, 1, BF16, Kernels(layers="torch", attention="torch"), H100)
    assert not (choice.te_layers or choice.te_attention) and choice.why["layers"] == "kernels.layers=torch"
    with pytest.raises(ValueError, match=r"kernels.attention=te does not fit: .* 256 wide.*; use kernels.attention=auto or torch"):
        choose(LLAMA | {"kv_channels": 256}, 1, BF16, Kernels(attention="te"), H100)
    with pytest.raises(ValueError, match=r"precision.fp8=current needs kernels.layers=te, not torch"):
        choose(LLAMA, 1, Precision(dtype="bf16", fp8="current"), Kernels(layers="torch"), H100)


@pytest.mark.parametrize("recipe, found, message", [
    ("delayed", CPU, "there is no GPU; use precision=bf16 (fp32 where results are compared)"),
    ("current", BARE, "Transformer Engine 2.20.2 does not work: OSError: libcudnn.so.9: cannot open; use precision=bf16"),
    ("delayed", A100, "compute capability 8.0, the recipe needs 8.9 or newer; use precision=bf16"),
    ("blockwise", ADA, "compute capability 8.9, the recipe needs 9.0 or newer; use precision=fp8_delayed or precision=fp8_current or precision=bf16"),
    ("blockwise", Machine((9, 0), (12, 4), TE), "built for CUDA 12.4, the recipe needs 12.9 or newer"),
    ("mxfp8", H100, "compute capability 9.0, the recipe needs 10.0 or newer; use precision=fp8_delayed or"),
    ("mxfp8", Machine((12, 0), (13, 0), TE), "does not support the recipe yet"),
])
def test_fp8_that_cannot_run_says_what_is_missing_and_what_can(recipe, found, message):
    with pytest.raises(ValueError) as caught:
        choose(LLAMA, 1, Precision(dtype="bf16", fp8=recipe), Kernels(), found)
    assert f"precision.fp8={recipe} cannot run here: " in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("recipe, found", [("delayed", ADA), ("current", H100), ("blockwise", H100), ("mxfp8", BLACKWELL)])
def test_fp8_that_can_run(recipe, found):
    assert choose(LLAMA, 1, Precision(dtype="bf16", fp8=recipe), Kernels(), found).te_layers


def test_fp8_needs_widths_that_fit():
    with pytest.raises(ValueError, match=r"multiples of 16, the model's parts have MLP: 1789.*parallel.tensor=8"):
        choose(LLAMA | {"ffn_hidden_size": 14312}, 8, Precision(dtype="bf16", fp8="delayed"), Kernels(), H100)


def test_moments_and_offloading_need_what_they_need():
    def config(**change) -> Config:
        cfg = load("dpo", [])
        return Config(**{**{name: getattr(cfg, name) for name in ("run", "model", "data", "loss", "method")}, **change})

    check_machine(config(), CPU)
    with pytest.raises(ValueError, match=r"precision.moments=bf16 needs Transformer Engine's Adam: there is no GPU"):
        check_machine(config(precision=Precision(dtype="bf16", moments="bf16")), CPU)
    with pytest.raises(ValueError, match=r"optimizer.offload=0.5 .* no GPU; use 0"):
        check_machine(config(optimizer=Optimizer(offload=0.5)), CPU)


@pytest.mark.parametrize("found, message", [
    (CPU, None),
    (H100, None),
    (Machine((9, 0), (13, 0), {"flash-attn 3": "3.0.0"}), None),
    (Machine((8, 0), (12, 4), {"flash-attn": "2.8.0"}), None),
    (Machine((8, 0), (12, 4), {"flash-attn": "2.6.3"}), "install flash-attn (or flash-attn 2.7.3 or newer)"),
    (Machine((9, 0), (13, 0), TE), "install flash-attn-4, or flash-attn-3 (or flash-attn 2.7.3"),
])
def test_generation_names_the_attention_package_to_install(found, message):
    assert (no_decoding_attention(found) is None) if message is None else (message in no_decoding_attention(found))


def test_generation_in_fp32_is_for_the_cpu():
    assert "which has no precision.dtype=fp32; use precision=bf16" in no_decoding_attention(H100, "fp32")
    assert no_decoding_attention(CPU, "fp32") is None
    with pytest.raises(ValueError, match=r"method.pairs=online: generation on a GPU .* use precision=bf16, or use method.pairs=offline"):
        check_machine(load("online_dpo", []), H100)
    check_machine(load("online_dpo", ["precision=bf16"]), H100)
    check_machine(load("online_dpo", []), CPU)


@pytest.mark.parametrize("recipe, rows", [(None, 1), ("delayed", 16), ("current", 16), ("blockwise", 128), ("mxfp8", 32)])
def test_packs_are_padded_to_what_the_recipe_needs(recipe, rows):
    assert Precision(dtype="bf16", fp8=recipe).pad_multiple == rows


def test_layers_that_stay_in_bf16():
    assert Precision("bf16", "current", bf16_first_layers=1, bf16_last_layers=2, bf16_layers=[3]).kept_layers(8) == {0, 3, 6, 7}
    assert Precision("bf16", bf16_first_layers=1).kept_layers(8) == frozenset()
