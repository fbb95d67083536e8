"""The engine against recomputing everything for every token: the same tokens, greedy and sampled, in every layout and batching."""

import numpy as np
import pytest
import torch
from distributed_run import run_distributed
from tiny_models import make_checkpoint

NEW_TOKENS = 20
STOP = 90
# 14 blocks of 16 tokens (2 layers x 2 KV heads x 8 x 2 x 4 bytes a token) where all requests together want 20.
CROWDED_GB = 14 * 16 * 256 / 2**30


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(6, 131, (n,), generator=generator).tolist() for n in (3, 17, 1, 40, 8, 23, 9, 30)]


def recomputed(model, sampling, request_keys) -> list[list[int]]:
    """Each token from a whole forward pass over everything before it."""
    from megapref.inference.sampling import sample, uniforms

    completions = []
    for ids, key in zip(prompts(), request_keys, strict=True):
        out: list[int] = []
        while len(out) < NEW_TOKENS and STOP not in out:
            tokens = torch.tensor([ids + out])
            with torch.no_grad():
                logits = model(tokens, torch.arange(tokens.shape[1])[None], None)[0, -1:, : model.true_vocab_size]
            uniform = uniforms(np.array([key]), np.array([tokens.shape[1]]))
            out.append(int(sample(logits, uniform, sampling)))
        completions.append(out)
    return completions


def generate_in_layout(folder: str, layout: dict) -> dict:
    from megapref.config import Generation, Parallel
    from megapref.convert.families import read_spec
    from megapref.convert.hf import load_hf
    from megapref.inference.sampling import Sampling, keys, sample, uniforms
    from megapref.mcore import cpu, setup
    from megapref.mcore.generation import Engine
    from megapref.mcore.model import build_model

    parallel = Parallel(**layout)
    setup.start(parallel, 0)
    spec = read_spec(folder)
    chunks = build_model(spec, parallel, torch.float32)
    load_hf(chunks, spec, folder)
    request_keys = keys(11, 0, np.arange(len(prompts())), 0)
    results: dict = {}

    def run(which=None, sampling=Sampling(temperature=0.8), poison=None, **options):  # noqa: B008
        which = list(range(len(prompts()))) if which is None else which
        generation = Generation(**{"max_new_tokens": NEW_TOKENS, "kv_cache_gb": 0.01, **options})
        engine = Engine(chunks[0], generation, max_length=100)

        def draw(logits, requests, positions):
            return sample(logits, uniforms(request_keys[which][requests], positions), sampling)

        if poison is not None:
            with cpu.core_calls():
                engine._start().suspend()
            resume = engine.engine.context.reinitialize_inference_state_buffers

            def poisoned(*args, **kwargs):
                resume(*args, **kwargs)
                engine.engine.context.memory_buffer.fill_(poison)

            engine.engine.context.reinitialize_inference_state_buffers = poisoned
        out = engine.generate([prompts()[i] for i in which], draw, NEW_TOKENS, STOP)
        return out, engine, draw

    sampled, engine, draw = run()
    results["sampled"] = sampled
    results["greedy"] = run(sampling=Sampling(temperature=0))[0]
    results["one by one"] = [run([i])[0][0] for i in range(len(prompts()))]
    results["three slots"] = run(max_requests=3)[0]
    results["poisoned"] = run(poison=float("nan"))[0]
    crowded, crowded_engine, _ = run(kv_cache_gb=CROWDED_GB / (parallel.tensor * parallel.pipeline))
    results["evicted"], results["evictions"] = crowded, crowded_engine.engine.evicted_request_count
    results["again"] = engine.generate(prompts(), draw, NEW_TOKENS, STOP)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.mul_(1.5)
    results["changed weights"] = engine.generate(prompts(), draw, NEW_TOKENS, STOP)
    if not layout:
        results["recomputed changed"] = recomputed(chunks[0], Sampling(temperature=0.8), request_keys)
        load_hf(chunks, spec, folder)
        results["recomputed"] = recomputed(chunks[0], Sampling(temperature=0.8), request_keys)
        results["recomputed greedy"] = recomputed(chunks[0], Sampling(temperature=0), request_keys)
    return results


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = str(make_checkpoint(tmp_path_factory.mktemp("engine"), "qwen2"))
    return folder, run_distributed(generate_in_layout, 1, folder, {})[0]


def test_engine_equals_recomputing(one_process):
    _, results = one_process
    assert results["sampled"] == results["recomputed"]
    assert results["greedy"] == results["recomputed greedy"]
    assert any(ids[-1] == STOP for ids in results["sampled"]) and any(len(ids) == NEW_TOKENS for ids in results["sampled"])


def test_a_sample_does_not_depend_on_batching_or_cache_content(one_process):
    _, results = one_process
    assert results["evictions"] > 0
    for name in ("one by one", "three slots", "poisoned", "evicted", "again"):
        assert results[name] == results["sampled"], name


def test_no_cache_outlives_a_weight_change(one_process):
    _, results = one_process
    assert results["changed weights"] == results["recomputed changed"] != results["sampled"]


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}], ids=str)
def test_layouts_give_the_same_tokens(one_process, layout):
    folder, expected = one_process
    world = layout.get("tensor", 1) * layout.get("pipeline", 1)
    for results in run_distributed(generate_in_layout, world, folder, layout):
        for name in ("sampled", "greedy", "three slots", "poisoned", "changed weights"):
            assert results[name] == expected[name], name
