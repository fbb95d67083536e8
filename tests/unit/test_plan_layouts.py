import importlib.util
import io
import json
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_models import LLAMA3, gpt
from rich.console import Console
from tiny_runs import make_inputs, options

from megapref.config import Config, Precision
from megapref.convert.families import to_spec
from megapref.plan import tables
from megapref.plan.hardware import GPUS, LINK_EFFICIENCY, LINK_LATENCY, MEMORY_EFFICIENCY, USABLE_MEMORY, parse_machine
from megapref.plan.layouts import make_plan
from megapref.plan.shapes import Layout, num_parameters
from megapref.plan.timing import gather, generation_time, model_flops, step_time
from megapref.plan.workload import Job, PairLengths, rank_packs, total
from megapref.planning import job_of, lengths_of, obstacles, plan_config
from megapref.schema import build

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("plan", ROOT / "tools" / "plan.py")
plan_tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plan_tool)

JOB = Job((PairLengths(500, 300, 200),) * 64)
QWEN2 = tiny_models.CONFIGS["qwen2"]


def mfu(spec, gpu: str, layout: Layout, sequence: int, packs_per_rank: int) -> float:
    """Of training on whole sequences without a reference, as in pre-training."""
    job = Job((PairLengths(1, sequence - 1, 0),) * packs_per_rank * layout.data, max_tokens=sequence, reference="none")
    packs = rank_packs(job, layout.data, 1)
    seconds = step_time(spec, job, layout, packs, "fused", GPUS[gpu]).total
    return model_flops(spec, total(packs)) * layout.data / layout.num_gpus / seconds / GPUS[gpu].flops["bf16"]


# time, against published figures; the one free number, MATMUL_EFFICIENCY, is set by the first


@pytest.mark.parametrize(
    ("layout", "sequence", "packs", "published"),
    [
        (Layout(8, 16, 8, 1, 64, True), 8192, 32, 430e12),  # table 4 of arXiv:2407.21783: 8,192 GPUs
        (Layout(8, 16, 8, 1, 128, True), 8192, 16, 400e12),  # 16,384 GPUs
        (Layout(8, 16, 8, 16, 8, True), 131072, 16, 380e12),  # 16,384 GPUs, long context
    ],
)
def test_llama_405b_is_as_fast_as_published(layout, sequence, packs, published):
    assert mfu(LLAMA3["405B"], "h100", layout, sequence, packs) * 989e12 == pytest.approx(published, rel=0.1)


def test_megatron_530b_is_as_fast_as_published():
    """arXiv:2205.05198: a GPT of 530 billion parameters on 2,240 A100 reaches 54.2 % of their peak."""
    spec = gpt(20480, 105, 128)
    assert num_parameters(spec) == pytest.approx(530e9, rel=0.01)
    assert mfu(spec, "a100", Layout(8, 35, 3, 1, 8, True, "selective"), 2048, 280) == pytest.approx(0.542, rel=0.1)


@pytest.mark.parametrize(("stages", "chunks", "packs"), [(4, 1, 8), (4, 2, 8), (8, 1, 1)])
def test_bubble_is_that_of_narayanan(stages, chunks, packs):
    """arXiv:2104.04473, section 2.2: (p - 1) / (v m) of the time of the packs themselves."""
    layout = Layout(pipeline=stages, virtual_pipeline=chunks)
    sizes = rank_packs(replace(JOB, pairs=JOB.pairs[:1]), 1, 1) * packs
    t = step_time(LLAMA3["8B"], replace(JOB, reference="none"), layout, sizes, "torch", GPUS["h100"])
    assert t.bubble == pytest.approx((stages - 1) / (chunks * packs) * (t.compute + t.pipeline))


def test_a_collective_is_bytes_by_bandwidth():
    h100 = GPUS["h100"]
    assert gather(8e9, 8, 8, h100) == pytest.approx(8e9 * 7 / 8 / (450e9 * LINK_EFFICIENCY) + LINK_LATENCY)
    assert gather(8e9, 16, 16, h100) == pytest.approx(8e9 * 15 / 16 / (50e9 * LINK_EFFICIENCY) + LINK_LATENCY)
    assert gather(8e9, 1, 1, h100) == 0


def test_generation_is_bound_by_reading_the_weights():
    job = replace(JOB, prompts=1, candidates=2, new_tokens=1000, kv_cache=20e9, pairs=(PairLengths(1, 1000, 1000),))
    seconds = generation_time(LLAMA3["8B"], job, Layout(), GPUS["h100"])
    assert seconds == pytest.approx(1000 * 2 * num_parameters(LLAMA3["8B"]) / (3.35e12 * MEMORY_EFFICIENCY), rel=0.03)
    assert generation_time(LLAMA3["8B"], replace(job, max_requests=1), Layout(), GPUS["h100"]) == pytest.approx(2 * seconds, rel=0.03)
    assert generation_time(LLAMA3["8B"], replace(job, samples_reference=True), Layout(), GPUS["h100"]) == pytest.approx(2 * seconds, rel=0.03)


def test_a_step_costs_what_its_method_does():
    packs = rank_packs(JOB, 8, 1)

    def time_of(**changes) -> float:
        return step_time(LLAMA3["8B"], replace(JOB, **changes), Layout(data=8), packs, "torch", GPUS["h100"]).total

    assert time_of(reference="none") == time_of(reference="cached") < time_of(reference="resident") < time_of(reference="swapped")
    assert time_of(prompts=64, new_tokens=500, kv_cache=1e9) > time_of()


def test_fp8_speeds_up_the_layers_products_alone():
    packs = rank_packs(JOB, 8, 1)
    plain, fp8 = (step_time(LLAMA3["8B"], replace(JOB, fp8=on), Layout(data=8), packs, "fused", GPUS["h100"]) for on in (False, True))
    assert plain.compute / 2 < fp8.compute < plain.compute and (fp8.data, fp8.bubble) == (plain.data, plain.bubble)
    lean = step_time(LLAMA3["8B"], replace(JOB, fp8=True, fp8_weights=True, gradients="bf16"), Layout(data=8), packs, "fused", GPUS["h100"])
    assert lean.data == pytest.approx((fp8.data - 2 * LINK_LATENCY) / 2 + 2 * LINK_LATENCY)  # 2 + 1 for 4 + 2 bytes


def test_a_gpu_without_fp8_is_named():
    with pytest.raises(ValueError, match=r"A100 SXM 80 GB has no fp8 matrix products; plan for bf16"):
        make_plan(LLAMA3["8B"], replace(JOB, fp8=True), GPUS["a100"], 8, "fused", lambda layout: None)


# ranking


@settings(max_examples=15, deadline=None)
@given(gpus=st.sampled_from([1, 4, 8, 12, 32]), gpu=st.sampled_from(sorted(GPUS)), kernels=st.sampled_from(["torch", "fused"]))
def test_plans_are_ranked_and_use_every_gpu(gpus, gpu, kernels):
    plan = make_plan(LLAMA3["8B"], JOB, GPUS[gpu], gpus, kernels, lambda layout: "pipeline=2" if layout.pipeline > 1 else None)
    assert plan.ranked and {p.layout.num_gpus for p in plan.ranked} == {gpus}
    assert all(p.fits == (p.memory.total <= USABLE_MEMORY * GPUS[gpu].memory) for p in plan.ranked)
    assert plan.fitting == sorted(plan.fitting, key=lambda p: p.time.total)
    assert plan.ranked[: len(plan.fitting)] == plan.fitting
    assert all(p.layout.tensor <= 8 and 0 < p.mfu < 1 for p in plan.ranked)
    assert all(p.time.total == pytest.approx(sum(getattr(p.time, f.name) for f in fields(p.time))) for p in plan.ranked)
    if plan.chosen:
        assert plan.chosen.obstacle is None and plan.chosen.layout.pipeline == 1
        assert plan.fastest.time.total <= plan.chosen.time.total
    Console(file=io.StringIO()).print(tables.report(plan, 4))
    assert json.loads(json.dumps(tables.as_json(plan, 4)))["num_gpus"] == gpus


def test_only_what_the_product_runs_is_said_to_run():
    spec = LLAMA3["405B"]
    why = obstacles(spec)
    assert why(Layout(8, 14, data=9)) is None
    assert why(Layout(8, 16, data=8)) is None  # 126 layers: 7 in the first and the last stage, 8 in the others
    assert "parallel.virtual_pipeline=2 does not divide the 7 layers" in why(Layout(8, 16, 2, data=8))
    assert "does not divide the model's num_hidden_layers=126" in why(Layout(8, 12))
    assert why(Layout(8, recompute="full")) is None


def test_what_fits_nowhere_is_told(capsys):
    assert plan_tool.main([str(ROOT / "docs/scaling/llama3_405b.json"), "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert "Nothing fits in 72.0 GB a GPU" in out and "Use more GPUs" in " ".join(out.split())


# the tool and the launcher


def test_tool_prints_the_same_numbers_in_every_form(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(QWEN2))
    words = [str(tmp_path), "--gpus", "4", "--method", "xpo", "--batch", "8", "--prompt", "40", "--completion", "30", "--kv-cache-gb", "1"]
    assert plan_tool.main([*words, "--json", "--layout", "tensor=2", "pipeline=2"]) == 0
    (parsed,) = json.loads(capsys.readouterr().out)
    assert parsed["parameters"] == num_parameters(to_spec(QWEN2))
    assert parsed["asked"]["layout"]["tensor"] == parsed["asked"]["layout"]["pipeline"] == 2
    assert parsed["chosen"]["obstacle"] is None and parsed["chosen"]["memory"]["kv_cache"] == 2**30
    assert parsed["chosen"]["time"]["total"] == min(p["time"]["total"] for p in parsed["fitting"] if p["obstacle"] is None)
    assert plan_tool.main(words) == 0
    assert f"Chosen: {Layout(**parsed['chosen']['layout'])}" in capsys.readouterr().out
    assert plan_tool.main([str(file), "--gpus", "2,4", "--batch", "8", "--markdown"]) == 0
    assert [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[4:]] == ["2", "4"]


def test_tool_reads_histograms(tmp_path):
    file = tmp_path / "lengths.json"
    file.write_text("[[10, 5, 5, 3], [2, 1, 0, 1]]")
    assert plan_tool.read_histogram(file) == [(PairLengths(2, 1, 0), 1.0), (PairLengths(10, 5, 5), 3.0)]


@pytest.mark.parametrize("text", ["[[1, 2, 3]]", "{", "[[0, 1, 1, 1]]", '[["a", 1, 1, 1]]'])
def test_a_broken_histogram_is_named(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    (tmp_path / "lengths.json").write_text(text)
    assert plan_tool.main([str(tmp_path), "--gpus", "2", "--lengths", str(tmp_path / "lengths.json")]) == 2
    assert "lengths.json: a histogram of lengths is a JSON list of [prompt, first, second, weight]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layout", "tensor=3"], "--layout tensor=3: its 3 ranks do not divide 4 GPUs"),
        (["--layout", "tensors=2"], "--layout tensors=2: not NAME=VALUE"),
        (["--max-tokens", "100"], "a pair of 1536 tokens is longer than a pack of 100; raise pack.max_tokens"),
    ],
)
def test_wrong_options_are_named(tmp_path, capsys, words, message):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    assert plan_tool.main([str(tmp_path), "--gpus", "4", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["64", "h100", "0xh100", "8xv100", "8 x h100"])
def test_a_machine_that_is_not_known(text):
    with pytest.raises(ValueError, match=r"not NUMBERxGPU, such as 64xh100; the GPUs that are known are a100, h100, h200"):
        parse_machine(text)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def config_of(inputs, tmp_path, pairs: str, **groups) -> Config:
    errors: list[str] = []
    cfg = build(Config, options(inputs, tmp_path / "run", pairs, **groups), errors)
    assert not errors
    return cfg


@pytest.mark.parametrize("pairs", ["offline", "online"])
def test_a_configs_run_is_planned_from_its_rows(inputs, tmp_path, pairs):
    cfg = config_of(inputs, tmp_path, pairs, parallel={"tensor": 2})
    spec = to_spec(json.loads((Path(inputs["model"]) / "config.json").read_text()))
    job = job_of(cfg, spec)
    assert len(job.pairs) == cfg.train.global_batch_size
    assert (job.prompts > 0) == (pairs == "online") and job.reference == cfg.reference.mode
    longest = max(pair.first for pair in job.pairs)
    assert longest == cfg.generation.max_new_tokens if pairs == "online" else 0 < longest < 20
    assert plan_config(replace(cfg, precision=Precision("bf16")), 4, GPUS["a100"]).kernels == "fused"
    plan = plan_config(cfg, 4, GPUS["a100"])
    assert plan.kernels == "torch"
    assert plan.of_asked.layout == Layout(tensor=2, data=2) and plan.of_asked.fits


def test_all_pairs_of_several_candidates_are_counted(inputs, tmp_path):
    spec = to_spec(json.loads((Path(inputs["model"]) / "config.json").read_text()))
    for candidates, expected in (("policy_policy", 6), ("policy_reference", 4)):
        method = {"pairs": "online", "candidates": candidates, "num_candidates": 4, "pairing": "all"}
        cfg = config_of(inputs, tmp_path, "online", method=method)
        assert len(job_of(cfg, spec).pairs) == expected * cfg.train.global_batch_size


def test_lengths_of_rows():
    from megapref.batch import Prompt, TokenCompletion, TokenPair

    assert lengths_of(Prompt([1, 2], "", {}, 0), 9, 20) == PairLengths(2, 9, 9)
    assert lengths_of(Prompt([1, 2], "", {}, 0), 9, 8) == PairLengths(2, 6, 6)
    assert lengths_of(TokenPair([1], [2, 3], [4]), 9, 20) == PairLengths(1, 2, 1)
    assert lengths_of(TokenCompletion([1], [2, 3], True), 9, 20) == PairLengths(1, 2, 0)


def test_tables_of_the_scaling_page_are_what_its_commands_print(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "scaling.md").read_text()
    blocks = re.findall(r"```bash\npython tools/plan.py (.*?)\n```\n\n(.*?)\n\n<!-- end -->", text, re.DOTALL)
    assert len(blocks) == 3
    for command, table in blocks:
        assert plan_tool.main(shlex.split(command.replace("\\\n", " "))) == 0
        assert capsys.readouterr().out.strip() == table.strip()
