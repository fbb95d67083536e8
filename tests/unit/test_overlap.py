"""Which buffers overlap has, and when layers do without: with Transformer Engine's module replaced by one that notes what it is told."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from torch.nn import Linear, Sequential

from megapref.config import Parallel, Precision
from megapref.mcore import overlap


@pytest.fixture
def base(monkeypatch):
    """transformer_engine.pytorch.module.base, as far as it is used."""
    made = []
    base = SimpleNamespace(
        UserBufferQuantizationMode=SimpleNamespace(FP8="fp8", NONE="none"),
        is_ub_initialized=lambda: bool(made),
        initialize_ub=lambda **options: made.append(options),
        destroy_ub=made.clear,
        made=made,
    )
    names = overlap._BASE.split(".")
    for i in range(1, len(names)):
        monkeypatch.setitem(sys.modules, ".".join(names[:i]), ModuleType(names[i - 1]))
    sys.modules[".".join(names[:-1])].base = base
    monkeypatch.setitem(sys.modules, overlap._BASE, base)
    return base


@pytest.mark.parametrize("precision, modes", [
    (Precision("bf16"), ["none"]),
    (Precision("bf16", fp8="current"), ["fp8"]),
    (Precision("bf16", fp8="current", bf16_last_layers=1), ["fp8", "none"]),
])
def test_buffers_hold_a_ranks_rows_of_a_whole_pack_in_each_type_that_layers_have(base, precision, modes):
    for _ in range(2):  # policy, reference
        overlap.start(Parallel(tensor=2, sequence=True, context=4), precision, 4096, 512)
    assert [(made["shape"], made["tp_size"], made["quantization_modes"]) for made in base.made] == [([1024, 512], 2, modes)]
    overlap.stop()
    assert not base.made


def test_without_it_there_is_nothing_to_stop():
    overlap.stop()


def test_layers_are_paused_in_forward_passes_of_other_lengths_and_go_on_as_they_were():
    model = Sequential(Linear(2, 2), Linear(2, 2), Linear(2, 2))
    for layer, name, flags in ((model[0], "qkv", (True, False)), (model[1], "proj", (False, True))):
        layer.ub_name, layer.ub_overlap_ag_fprop, layer.ub_overlap_rs_fprop = name, *flags
    model[2].ub_name = "fc1"  # as one of experts, which has no flags
    states = lambda: [(layer.ub_overlap_ag_fprop, layer.ub_overlap_rs_fprop) for layer in model[:2]]  # noqa: E731
    with pytest.raises(RuntimeError), overlap.paused([model]):
        assert states() == [(False, False)] * 2 and not hasattr(model[2], "ub_overlap_ag_fprop")
        raise RuntimeError
    assert states() == [(True, False), (False, True)]
