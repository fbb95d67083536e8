"""The precision group: what each of its files says, and which combinations are refused before anything starts."""

import pytest

from megapref.config import load

OVERLAP = ["parallel=tp2sp", "parallel.tp_comm_overlap=true"]


@pytest.mark.parametrize("name, dtype, fp8", [
    ("fp32", "fp32", None),
    ("bf16", "bf16", None),
    ("fp8_delayed", "bf16", "delayed"),
    ("fp8_current", "bf16", "current"),
    ("fp8_blockwise", "bf16", "blockwise"),
    ("mxfp8", "bf16", "mxfp8"),
])
def test_every_precision_is_a_group_by_its_own_name(name, dtype, fp8):
    cfg = load("dpo", [f"precision={name}"])
    assert (cfg.precision.dtype, cfg.precision.fp8, cfg.precision.name) == (dtype, fp8, name)


def test_rows_are_padded_for_layout_and_matrix_products_together():
    cfg = load("dpo", ["precision=fp8_current", "parallel=cp2"], world_size=2)
    assert cfg.pad_multiple == 4 * 16


@pytest.mark.parametrize("overrides, message", [
    (["precision.fp8=current"], "precision.fp8=current is for the matrix products of a bf16 model, but precision.dtype=fp32; use precision=fp8_"),
    (["precision=bf16", "precision.fp8_weights=true"], "precision.fp8_weights=true is about FP8, but precision.fp8=null"),
    (["precision=mxfp8", "precision.fp8_weights=true"], "in ways that precision.fp8=mxfp8 has not; leave it out, or use precision=fp8_current"),
    (["precision=bf16", "precision.bf16_layers=[1]"], "precision.bf16_layers=[1] is about FP8"),
    (["precision=fp8_current", "precision.bf16_layers=[4]"], "precision.bf16_layers=[4] names layer 4, the model's are 0 to 3"),
    (["precision=fp8_current", "precision.bf16_first_layers=2", "precision.bf16_last_layers=2"], "all of the model's 4 layers would stay in bf16"),
    (["precision.gradients=bf16"], "precision.gradients=bf16 would be less exact than precision.dtype=fp32"),
    (["precision.moments=fp8"], "precision.moments=fp8 would be less exact"),
    (["precision.audit.every=2"], "precision.dtype=fp32 has none above it; use 0"),
    (["precision=bf16", "reference.fp8_weights=true"], "reference.fp8_weights=true needs precision.fp8 and reference.mode=resident"),
    (["precision=fp8_current", "precision.fp8_weights=true", "reference.mode=swapped"], "reference.mode=swapped exchanges weights"),
    (["precision=bf16", "parallel.tp_comm_overlap=true", "parallel.tensor=2"], "but parallel.sequence=false; use true, or no overlap"),
    ([*OVERLAP, "precision=fp32"], "which precision.dtype=fp32 does not use; use precision=bf16, or no overlap"),
    ([*OVERLAP, "precision=bf16", "kernels.layers=torch"], "which kernels.layers=torch does not use"),
    ([*OVERLAP, "precision=fp8_blockwise"], "has no buffers for precision.fp8=blockwise; use precision=fp8_current"),
    ([*OVERLAP, "precision=mxfp8", "pack.max_tokens=4000"], "needs packs of a multiple of 256, 128 rows for each of a pack's ranks"),
    (["parallel.offload_layers=4"], "parallel.offload_layers=4 must be less than the model's 4 layers; use at most 3"),
    (["parallel.offload_layers=1", "parallel.recompute=full"], "parallel.offload_layers=1 does not go with parallel.recompute=full"),
])
def test_combinations_that_are_refused(overrides, message):
    with pytest.raises(ValueError) as caught:
        load("dpo", overrides, world_size=None)
    assert message in str(caught.value)
