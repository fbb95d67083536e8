"""The audit against a model that was built one precision higher, and against a step that was not audited."""

import math

import pytest
from distributed_run import run_distributed
from tiny_models import make_checkpoint
from tiny_runs import make_inputs, metrics_of, options, run_training

from megapref.config import load
from megapref.progress import audit_warnings


def audited(folder: str, layout: dict):
    """Of a bf16 policy that was moved off its reference: the audit; the same from models in fp32 with the same weights; two steps' gradient norms."""
    from functools import partial

    import torch
    from test_packed_forward import some_pairs

    from megapref import losses
    from megapref.config import Optimizer, Parallel, Precision
    from megapref.convert.families import read_spec
    from megapref.convert.hf import load_hf
    from megapref.data.packing import pack
    from megapref.mcore import reference, setup
    from megapref.mcore.audit import audit
    from megapref.mcore.model import build_model
    from megapref.mcore.optimizer import build_optimizer, wrap_for_training
    from megapref.mcore.step import TrainState, score_packs, train_step

    parallel, bf16 = Parallel(**layout), Precision(dtype="bf16")
    setup.start(parallel, 0)
    spec = read_spec(folder)

    def model(precision: Precision) -> list[torch.nn.Module]:
        chunks = build_model(spec, parallel, precision)
        load_hf(chunks, spec, folder)
        return chunks

    def nudge(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        for parameter in chunks[0].parameters():
            parameter.data.copy_((parameter.data.bfloat16() * 1.125).bfloat16())
        return chunks

    policy, ref = nudge(model(bf16)), reference.resident(model(bf16))
    chunks = wrap_for_training(policy, bf16)
    state = TrainState(chunks, build_optimizer(chunks, Optimizer(lr=0.0, clip_grad=1e9), bf16))
    packs = reference.fill_reference(ref, pack(some_pairs(), max_tokens=200)[0])
    step = partial(train_step, state, packs, partial(losses.dpo, beta=0.1), lr=0.0)
    before = step()["grad_norm"]
    found = audit(chunks, packs, ref)
    after = step()["grad_norm"]

    higher = nudge(model(Precision())), reference.resident(model(Precision()))
    for parameter in higher[1].chunks[0].parameters():
        parameter.data.copy_(parameter.data.bfloat16())
    own, exact = score_packs(chunks, packs), score_packs(higher[0], packs)
    exact_packs = reference.fill_reference(higher[1], packs)
    expected = None
    if own[0] is not None:
        kl, largest, margins = [], 0.0, []
        for one, exact_pack, own_K, exact_K in zip(packs, exact_packs, own, exact, strict=True):
            kl += [math.exp(d) - 1 - d for d in (exact_K - own_K).tolist()]
            largest = max(largest, float((exact_K - own_K).abs().max()))
            for row in range(one.num_rows):
                sides = [one.cell_K == 2 * row + side for side in (0, 1)]
                ratios = [(own_K - one.ref_logps_K, exact_K - exact_pack.ref_logps_K)[i] for i in (0, 1)]
                margins.append([float(ratio[sides[0]].sum() - ratio[sides[1]].sum()) for ratio in ratios])
        expected = {
            "audit/kl": sum(kl) / len(kl),
            "audit/largest_difference": largest,
            "audit/margin_difference": sum(abs(a - b) for a, b in margins) / len(margins),
            "audit/sign_flips": sum((a > 0) != (b > 0) for a, b in margins) / len(margins),
        }
    return found, expected, before, after


@pytest.mark.parametrize("layout", [{}, {"pipeline": 2}], ids=str)
def test_an_audit_is_the_difference_to_a_model_built_one_precision_higher_and_changes_nothing(tmp_path, layout):
    folder = make_checkpoint(tmp_path, "llama_tied")
    results = run_distributed(audited, layout.get("pipeline", 1), str(folder), layout)
    expected = next(expected for _, expected, *_ in results if expected)
    for found, _, before, after in results:
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert found["audit/kl"] > 0 and found["audit/margin_difference"] > 0
        assert before == after


def test_an_audited_run_logs_it_when_it_is_due_and_trains_as_any_other(tmp_path):
    inputs, logged = make_inputs(tmp_path / "inputs"), {}
    for every in (0, 2):
        precision = {"dtype": "bf16", "audit": {"every": every, "pairs": 3}}
        tree = options(inputs, tmp_path / f"audit{every}", "offline", precision=precision, train={"steps": 4}, save={"export": False})
        assert run_distributed(run_training, 1, tree) == [""]
        logged[every] = metrics_of(tmp_path / f"audit{every}")
    assert [record["step"] for record in logged[2] if "audit/sign_flips" in record] == [2, 4]
    assert not any("audit/kl" in record for record in logged[0])
    assert [record.get("grad_norm") for record in logged[2]] == [record.get("grad_norm") for record in logged[0]]


def test_what_an_audit_warns_of():
    cfg = load("dpo", ["precision=fp8_current"])
    assert audit_warnings(cfg, {"audit/kl": 0.01, "audit/sign_flips": 0.05}) == []
    kl, *others = audit_warnings(cfg, {"audit/kl": 0.02})
    assert others == [] and "between precision=fp8_current and bf16 is 0.0200 nats per token (limit 0.01); keep more layers in bf16" in kl
    flips, *others = audit_warnings(load("dpo", ["precision=bf16"]), {"audit/sign_flips": 0.25})
    assert others == [] and "25% of the audited pairs have margins of another sign than in fp32 (limit 5%)" in flips
