"""tools/benchmark.py: its clock, its synthetic pairs, that the bare step computes DPO; the suite for one GPU, its formulas and goals."""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import benchmark
import benchmark_clock
import benchmark_gpu
from benchmark_cases import LAYOUTS, training_cases
from benchmark_figures import Work, decode_bytes, decode_figures, goals, step_figures
from benchmark_floor import bare_dpo_step, completion_logps, lay_out
from benchmark_generation import share_of_step, transformers_round, wanted
from benchmark_inputs import make_model, synthetic_pairs
from benchmark_report import table_of
from benchmark_shapes import SHAPES, spec_of
from distributed_run import run_distributed

from megapref.batch import TokenPair
from megapref.plan.hardware import gpu_named
from megapref.plan.shapes import num_parameters


def test_clock_counts_nested_work_once(monkeypatch):
    ticks = iter(np.array([[10.0, 1.0], [13.0, 2.0]]))
    monkeypatch.setattr(benchmark_clock, "now", lambda: next(ticks))
    clock = benchmark_clock.Clock()
    inner = clock.timed("inner", lambda x: x + 1)
    assert clock.timed("outer", lambda x: inner(x) * 2)(3) == 8
    assert list(clock.spent) == ["outer"] and clock.spent["outer"].tolist() == [3.0, 1.0]


def test_rates_are_per_second_and_per_cpu_second():
    rates = benchmark.rates(np.array([4.0, 2.0]), 8, 100.0)
    assert (rates["items_per_s"], rates["tokens_per_s"], rates["items_per_cpu_s"], rates["tokens_per_cpu_s"]) == (2.0, 25.0, 4.0, 50.0)


def test_synthetic_pairs_are_seeded_and_skewed():
    pairs = synthetic_pairs(400, 100, seed=1)
    assert pairs == synthetic_pairs(400, 100, seed=1) != synthetic_pairs(400, 100, seed=2)
    sizes = np.array([[len(pair.prompt_ids), len(pair.first_ids), len(pair.second_ids)] for pair in pairs])
    assert (sizes >= [12, 20, 20]).all() and (sizes <= [400, 300, 300]).all()
    assert np.corrcoef(sizes[:, 1], sizes[:, 2])[0, 1] > 0.15
    assert (sizes.mean(0) > np.median(sizes, 0)).all()


@pytest.mark.parametrize("text", ["6", "0x64", "2x100", "ax64"])
def test_bad_shapes_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="multiple of 64"):
        benchmark.shape(text)


def test_bare_step_is_dpo(tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    folder = make_model(tmp_path, 2, 64)
    pairs = [TokenPair([5, 6, 7], [8, 9], [10, 11, 12, 13]), TokenPair([20], [21, 22, 23], [24])]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = []
    for pair in pairs:
        for ids in (pair.first_ids, pair.second_ids):
            logps = model(torch.tensor([[*pair.prompt_ids, *ids]])).logits[0, len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
            expected.append(logps[range(len(ids)), ids].sum())
    torch.testing.assert_close(completion_logps(model, lay_out(pairs), 2), torch.stack(expected).view(2, 2), atol=1e-5, rtol=1e-5)
    step = bare_dpo_step(folder, lr=1e-2, beta=0.1, clip_grad=1.0)
    losses = [step(pairs)[0] for _ in range(3)]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6)
    assert losses[2] < losses[1] < losses[0]


def test_transformers_rows_end_at_their_own_lengths(tmp_path):
    """In batches, padded on the left, they are what each request gives alone."""
    torch.manual_seed(0)
    folder = make_model(tmp_path, 2, 64)
    requests = wanted([TokenPair([5, 6, 7], [0] * 2, [0] * 9), TokenPair([20] * 8, [0] * 4, [0])], longest=5)
    assert [limit for _, limit in requests] == [2, 5, 4, 1]
    together = transformers_round(folder, requests, slots=3)(0, 0.0)
    assert [len(ids) for ids in together] == [2, 5, 4, 1]
    assert together == [transformers_round(folder, [request], slots=1)(0, 0.0)[0] for request in requests]


def test_share_of_sampling_in_a_step():
    share = share_of_step({"items_per_s": 2.0, "items_per_cpu_s": 1.0}, {"items_per_s": 4.0, "items_per_cpu_s": 1.0})
    assert share == pytest.approx({"items_per_s": 0.5, "items_per_cpu_s": 2 / 3})


# the suite for one GPU


def small_suite(folder):
    """The report of the whole suite on CPU, as small as it gets, through the command line."""
    out = folder / "suite.json"
    sizes = "--pairs 2 --warmup 1 --steps 1 --batches 1 2 --prompt-tokens 8 --new-tokens 4 --max-tokens 2048"
    code = benchmark.main(["--suite", "gpu", "--shapes", "tiny", "--precisions", "fp32", "fp8_delayed", *sizes.split(), "--out", str(out)])
    return code, json.loads(out.read_text())


def test_suite_runs_without_a_gpu(tmp_path):
    ((code, report),) = run_distributed(small_suite, 1, tmp_path)
    kinds = [f"{kind}, {layout}" for kind in ("dpo cached", "dpo live") for layout in ("shared", "packed", "padded")]
    rows = {row["step"]: row for row in report["rows"] if row["precision"] == "fp32"}
    assert code == 0 and {row["status"] for row in rows.values()} == {"ok"} and report["kernels"].keys() == {"tiny fp32"}
    assert {row["step"]: row["status"] for row in report["rows"] if row["precision"] == "fp8_delayed"}.keys() == rows.keys()
    assert all("there is no GPU" in row["status"] for row in report["rows"] if row["precision"] == "fp8_delayed")
    assert set(rows) == {"sft, packed", "sft, padded", *kinds, "decode 1", "decode 2"}
    assert all(row["mfu"] is None and row["tflops"] > 0 for name, row in rows.items() if "decode" not in name)
    assert all("reference scoring" in rows[name]["phases"] for name in kinds if "live" in name)
    assert rows["dpo live, padded"]["tokens"] == rows["dpo live, packed"]["tokens"] > rows["dpo live, shared"]["tokens"]
    assert rows["decode 2"]["hbm_share"] is None and rows["decode 2"]["step_bytes"] > rows["decode 1"]["step_bytes"]
    assert {goal["goal"].partition(" per")[0] for goal in report["goals"]} >= {"tokens/s of DPO with a live reference", "time saved"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (ValueError("precision.fp8=delayed cannot run here: there is no GPU\nmore"), "precision.fp8=delayed cannot run here: there is no GPU"),
        (RuntimeError("a kernel failed"), "failed: RuntimeError: a kernel failed"),
    ],
)
def test_what_cannot_be_measured_is_a_row_that_says_why(error, status):
    def fail():
        raise error

    rows = [{"status": "ok"}, {"status": "an earlier reason"}]
    benchmark_gpu.attempt(rows, math.inf, fail)
    assert [row["status"] for row in rows] == [status, "an earlier reason"]


def test_nothing_is_begun_when_the_time_is_over():
    row = {"status": "ok"}
    benchmark_gpu.attempt([row], -math.inf, lambda: pytest.fail("was begun"))
    assert "--budget-seconds" in row["status"]


PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen3-4b": 4_022_468_096,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
}


def test_shapes_have_as_many_parameters_as_the_published_models():
    assert {name: num_parameters(spec_of(name)) for name in SHAPES if name not in ("small", "tiny")} == PARAMETERS
    assert spec_of("qwen3-4b", 3).transformer["num_layers"] == 3


def test_work_counts_no_pads_and_is_the_formula():
    spec = spec_of("tiny")
    pairs = [TokenPair([1] * 5, [2] * 3, [3] * 4), TokenPair([1] * 2, [2] * 6, [3])]
    cases = {case.name: case for case in training_cases(spec, pairs, ["sft", "dpo-live", "dpo-cached"], LAYOUTS)}
    layers, hidden, ffn, width, heads, groups, words = 2, 64, 192, 16, 4, 2, 1024
    matrices = hidden * (heads + 2 * groups) * width + hidden * heads * width + 3 * hidden * ffn
    scores = sum(n * (n + 1) / 2 for n in (8, 9, 8, 3))  # each completion with its prompt
    flops = 3 * (2 * layers * matrices * 28 + 4 * layers * heads * width * scores + 2 * hidden * words * 14)
    for name in ("dpo live, packed", "dpo live, padded", "dpo cached, packed", "sft, packed", "sft, padded"):
        assert cases[name].work == Work(2.0, 28, 28, pytest.approx(flops)), name
    shared = cases["dpo live, shared"].work
    assert (shared.pairs, shared.tokens, shared.unshared_tokens) == (2.0, 21, 28) and shared.flops < flops
    filled = cases["dpo cached, padded"].pairs
    assert {len(pair.prompt_ids) + len(side) for pair in filled for side in (pair.first_ids, pair.second_ids)} == {9}
    assert [sum(mask) for pair in filled for mask in (pair.first_mask, pair.second_mask)] == [3, 4, 6, 1]
    figures = step_figures(shared, 0.5, 1e12)
    assert (figures["tokens_per_s"], figures["unshared_tokens_per_s"], figures["pairs_per_s"]) == (42, 56, 4)
    assert figures["mfu"] == pytest.approx(shared.flops * 2 / 1e12) and step_figures(shared, 0.5, None)["mfu"] is None


def test_share_of_the_memory_bandwidth():
    spec = spec_of("tiny")
    model = torch.nn.ModuleDict({"word_embeddings": torch.nn.Embedding(1024, 64), "rest": torch.nn.Linear(64, 10, bias=False)})
    read = decode_bytes(spec, model, "fp32", context=300.0)
    assert read == 4 * 640 + 3 * 100 * (2 * 4 * 2 * 16 * 2)  # keys and values, float32, 2 heads of width 16, 2 layers
    h200 = gpu_named("NVIDIA H200")
    assert decode_figures(3, read, 2 * read / 4.8e12, h200)["hbm_share"] == pytest.approx(0.5)
    assert gpu_named("NVIDIA H100 PCIe") is None and decode_figures(3, read, 1.0, None)["hbm_share"] is None


def test_goals_are_held_against_the_rows_they_are_about():
    def row(step, precision="bf16", **figures):
        return {"shape": "qwen3-4b", "precision": precision, "step": step, "status": "ok", **figures}

    rows = [
        row("sft, packed", tokens_per_s=100.0, mfu=0.41, seconds=1.0, tokens=400),
        row("dpo cached, packed", tokens_per_s=96.0, mfu=0.47, seconds=1.0, tokens=400),
        row("dpo cached, shared", tokens_per_s=95.0, mfu=0.44, seconds=0.8, tokens=300),
        row("dpo live, packed", tokens_per_s=69.0, mfu=0.60, seconds=1.3, tokens=400),
        row("dpo cached, shared", "fp8_delayed", tokens_per_s=133.0, mfu=0.3, seconds=0.6, tokens=300),
        row("decode 256", tokens_per_s=9.0, hbm_share=0.39),
        row("dpo live, shared") | {"status": "out of memory"},
    ]
    found = {(goal["goal"], goal["of"].split(",")[0]): (goal["measured"], goal["target"]) for goal in goals(rows, 4096)}
    assert found == {
        ("bf16 MFU, 1.5B to 4B, packs of 4,096", "qwen3-4b bf16"): (0.47, 0.45),
        ("time saved per tokens saved by sharing the prompt", "qwen3-4b bf16"): (pytest.approx(0.2 / 0.25), 0.9),
        ("tokens/s of DPO with a live reference per those of SFT", "qwen3-4b bf16"): (0.69, 0.7),
        ("tokens/s of DPO with a cached reference per those of SFT", "qwen3-4b bf16"): (0.96, 0.95),
        ("FP8 tokens/s per those of bf16, 4B and more", "qwen3-4b fp8_delayed"): (pytest.approx(1.4), 1.3),
        ("decoding, batch 256: share of the memory bandwidth", "qwen3-4b bf16"): (0.39, 0.4),
    }
    assert [goal["of"] for goal in goals(rows, 2048) if goal["goal"].startswith("bf16 MFU")] == ["no row"]
    assert [(goal["of"], goal["measured"]) for goal in goals([], 4096)] == [("no row", None)] * 6


def test_table_says_what_is_not_there():
    row = {"shape": "tiny", "layers": 2, "precision": "fp32", "step": "a", "status": "ok", "seconds": 0.5, "mfu": None}
    row |= {"phases": {"forward": 1.0, "backward": 3.0}}
    full, over = row | {"status": "out of memory", "step": "b"}, row | {"status": "not run", "step": "c"}
    columns = [list(column.cells) for column in table_of([row, full, row, over, over | {"step": "d"}]).columns]
    assert columns[0] == ["tiny (2 layers)"] * 4 and columns[2] == ["a", "b", "a", "2 rows"]
    assert columns[-1] == ["fwd 25% bwd 75%", "out of memory", "fwd 25% bwd 75%", "not run"]
    assert columns[3] == ["500.0", "", "500.0", ""] and columns[8] == ["n/a", "", "n/a", ""]
