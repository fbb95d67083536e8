"""The engine against recomputing everything for every token: the same tokens, greedy and sampled, of one model and of a mixture of two, in every
layout and batching."""

from functools import partial

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


MIXTURE = 0.3


def recomputed(models, sampling, request_keys) -> list[list[int]]:
    """Each token from whole forward passes over everything before it, of one model or of {model: its share in the logits}."""
    from megapref.inference.sampling import sample, uniforms

    shares = models if isinstance(models, dict) else {models: 1.0}

    completions = []
    for ids, key in zip(prompts(), request_keys, strict=True):
        out: list[int] = []
        while len(out) < NEW_TOKENS and STOP not in out:
            tokens = torch.tensor([ids + out])
            with torch.no_grad():
                logits = sum(share * model(tokens, torch.arange(tokens.shape[1])[None], None)[0, -1:, :131] for model, share in shares.items())
            uniform = uniforms(np.array([key]), np.array([tokens.shape[1]]))
            out.append(int(sample(logits, uniform, sampling)))
        completions.append(out)
    return completions


def poisoned(engine, start, poison, *args):
    """Starts the engine with its caches full of `poison`."""
    started = start(*args)
    second = [started.controller.inference_wrapped_model.second_cache] if engine.opponent else []
    for cache in [started.context.memory_buffer, *second]:
        cache.fill_(poison)
    return started


def ends(ids: list[int]) -> bool:
    """Looks at two tokens, as a stop string may."""
    return sum(ids[-2:]) % 23 == 0


def cut(ids: list[int]) -> list[int]:
    return next((ids[:n] for n in range(1, len(ids)) if ends(ids[:n])), ids)


def load_models(layout: dict, *folders: str) -> list:
    from megapref.config import Parallel
    from megapref.convert.families import read_spec
    from megapref.convert.hf import load_hf
    from megapref.mcore import setup
    from megapref.mcore.model import build_model

    parallel = Parallel(**layout)
    setup.start(parallel, 0)
    models = []
    for folder in folders:
        chunks = build_model(read_spec(folder), parallel)
        load_hf(chunks, read_spec(folder), folder)
        models.append(chunks[0].eval())
    return models


def draw_first_tokens(folder: str, other_folder: str, number: int) -> tuple[list[int], torch.Tensor]:
    """The first tokens of many samples of one prompt from a mixture, and their exact distribution."""
    from megapref.config import Generation
    from megapref.inference.sampling import Sampling, keys, sample, uniforms
    from megapref.mcore.generation import Engine

    models = load_models({}, folder, other_folder)
    prompt, noise = [5, 3, 7], keys(1, np.arange(number))

    def draw(logits, requests, positions):
        return sample(logits, uniforms(noise[requests], positions), Sampling(temperature=0.7))

    engine = Engine(models[0], Generation(max_new_tokens=1, kv_cache_gb=0.01), 8, models[1])
    drawn = engine.generate([prompt] * number, draw, [1] * number, -1, coefficient=MIXTURE)
    with torch.no_grad():
        first, second = (model(torch.tensor([prompt]), torch.arange(3)[None], None)[0, -1].double() for model in models)
    return [ids[0] for ids in drawn], (((1 - MIXTURE) * first + MIXTURE * second) / 0.7).softmax(-1)


def generate_in_layout(folder: str, other_folder: str, layout: dict) -> dict:
    from megapref.config import Generation
    from megapref.convert.families import read_spec
    from megapref.convert.hf import load_hf
    from megapref.inference.sampling import Sampling, keys, sample, uniforms
    from megapref.mcore.generation import Engine

    model, other = load_models(layout, folder, other_folder)
    ranks = layout.get("tensor", 1) * layout.get("pipeline", 1)
    request_keys = keys(11, 0, np.arange(len(prompts())), 0)
    results: dict = {}

    def run(which=None, sampling=Sampling(temperature=0.8), poison=None, mixture=None, ends=None, **options):  # noqa: B008
        which = list(range(len(prompts()))) if which is None else which
        generation = Generation(**{"max_new_tokens": NEW_TOKENS, "kv_cache_gb": 0.01, **options})
        engine = Engine(model, generation, 100, None if mixture is None else other)

        def draw(logits, requests, positions):
            return sample(logits, uniforms(request_keys[which][requests], positions), sampling)

        if poison is not None:
            engine._start = partial(poisoned, engine, engine._start, poison)
        out = engine.generate([prompts()[i] for i in which], draw, [NEW_TOKENS] * len(which), STOP, ends, coefficient=mixture)
        return out, engine, draw

    # Each prompt twice: what shares its prefill is the same, and nothing of it outlives the weights.
    twice = [i for i in range(len(prompts())) for _ in range(2)]
    slots, crowd, poison, mixed = {"max_requests": 3}, {"kv_cache_gb": CROWDED_GB / ranks}, {"poison": float("nan")}, {"mixture": MIXTURE}
    runs = {"greedy": {"sampling": Sampling(temperature=0)}, "three slots": slots, "poisoned": poison, "ended, evicted": {"ends": ends, **crowd}}
    runs |= {"mixture": mixed, "mixture, evicted": mixed | crowd, "only the other": {"mixture": 1.0}}
    runs |= {"shared, evicted": {"which": twice, **crowd}, "shared mixture": {"which": twice, **mixed}}
    if not layout:
        runs |= {"ended": {"ends": ends}, "ended, three slots": {"ends": ends, **slots}, "ended mixture": {"ends": ends, **mixed}}
        runs |= {"mixture, three slots": mixed | slots, "mixture, poisoned": mixed | poison, "none of the other": {"mixture": 0.0}}
        runs |= {"shared, three slots": {"which": twice, **slots}, "shared, poisoned": {"which": twice, **poison}}
    results["sampled"], engine, draw = run()
    results["shared"], sharing, draw_twice = run(twice)
    results |= {name: run(**options)[0] for name, options in runs.items()}
    if not layout:
        results["one by one"] = [run([i])[0][0] for i in range(len(prompts()))]
        results["evicted"], crowded, _ = run(**crowd)
        results["evictions"] = crowded.engine.evicted_request_count
        results["again"] = engine.generate(prompts(), draw, [NEW_TOKENS] * len(prompts()), STOP)
        results["computed tokens"] = sharing.engine._prefill_tokens_computed
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    told, inference = [], []
    model.set_is_first_microbatch = lambda: told.append(True)  # weights in FP8, which layers keep, are made anew then
    hook = model.register_forward_hook(lambda *_: inference.append(torch.zeros(1).is_inference()))
    results["changed weights"] = engine.generate(prompts(), draw, [NEW_TOKENS] * len(prompts()), STOP)
    results["shared, changed weights"] = sharing.generate([prompts()[i] for i in twice], draw_twice, [NEW_TOKENS] * len(twice), STOP)
    hook.remove()
    if not layout:
        results["told of changed weights"], results["in inference mode"] = len(told), any(inference)
        results["recomputed changed"] = recomputed(model, Sampling(temperature=0.8), request_keys)
        load_hf([model], read_spec(folder), folder)
        results["recomputed"] = recomputed(model, Sampling(temperature=0.8), request_keys)
        results["recomputed greedy"] = recomputed(model, Sampling(temperature=0), request_keys)
        results["recomputed other"] = recomputed(other, Sampling(temperature=0.8), request_keys)
        results["recomputed mixture"] = recomputed({model: 1 - MIXTURE, other: MIXTURE}, Sampling(temperature=0.8), request_keys)
    return results


def generate_in_fp8(folder: str, layout: dict) -> tuple[list[list[int]], list[int]]:
    """Greedy completions by a model that is said to be in FP8, whose layers are torch's, and the numbers of rows that they were padded to."""
    from megatron.core import fp8_utils
    from megatron.core.inference.model_inference_wrappers import abstract_model_inference_wrapper as wrapper
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from megapref.config import Generation
    from megapref.inference.sampling import Sampling, sample
    from megapref.mcore.generation import Engine

    (model,) = load_models(layout, folder)
    model.config.fp8, model.config.pad_multiple = "hybrid", 16
    kinds = {kind: type(kind.__name__, (kind,), {}) for kind in (ColumnParallelLinear, RowParallelLinear)}
    layers = [module for module in model.decoder.modules() if type(module) in kinds]
    for layer in layers:
        layer.__class__ = kinds[type(layer)]

    def refused(*args):
        raise AssertionError("Core's padding")

    def prepare(model):
        for layer in layers:
            layer.forward = refused
        return model

    before = fp8_utils.TE_LINEAR_TYPES, wrapper.prepare_model_for_fp8_inference
    fp8_utils.TE_LINEAR_TYPES, wrapper.prepare_model_for_fp8_inference = tuple(kinds.values()), prepare
    padded: list[int] = []
    pad, torch.nn.functional.pad = torch.nn.functional.pad, lambda x, widths: padded.append(len(x) + widths[-1]) or pad(x, widths)
    try:
        engine = Engine(model, Generation(max_new_tokens=NEW_TOKENS, kv_cache_gb=0.01), 100)
        draw = lambda logits, requests, positions: sample(logits, None, Sampling(temperature=0))  # noqa: E731
        completions = engine.generate(prompts()[:3], draw, [NEW_TOKENS] * 3, STOP)
    finally:
        torch.nn.functional.pad = pad
        fp8_utils.TE_LINEAR_TYPES, wrapper.prepare_model_for_fp8_inference = before
    assert not any("forward" in vars(layer) for layer in layers), "training would pad, too"
    return completions, padded


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folders = [str(make_checkpoint(tmp_path_factory.mktemp("engine"), "qwen2", seed=seed)) for seed in (0, 1)]
    return folders, run_distributed(generate_in_layout, 1, *folders, {})[0]


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


def test_prompts_that_begin_alike_share_their_prefill(one_process):
    _, results = one_process
    sampled, mixed, changed = ([ids for ids in results[name] for _ in range(2)] for name in ("sampled", "mixture", "changed weights"))
    for name in ("shared", "shared, three slots", "shared, poisoned", "shared, evicted"):
        assert results[name] == sampled, name
    assert results["shared mixture"] == mixed and results["shared, changed weights"] == changed
    lengths = [len(ids) for ids in prompts()]
    blocks = [min(n // 16, max(n - 2, 0) // 16) for n in lengths]  # Core computes two tokens or more
    assert results["computed tokens"] == 2 * sum(lengths) - 16 * sum(blocks) < 1.7 * sum(lengths)


def test_a_completion_ends_where_it_is_told_to(one_process):
    _, results = one_process
    expected = [cut(ids) for ids in results["recomputed"]]
    assert sum(map(len, expected)) < sum(map(len, results["sampled"])) and any(len(ids) == NEW_TOKENS for ids in expected)
    for name in ("ended", "ended, three slots", "ended, evicted"):
        assert results[name] == expected, name
    assert results["ended mixture"] == [cut(ids) for ids in results["recomputed mixture"]]


def test_no_cache_outlives_a_weight_change(one_process):
    _, results = one_process
    assert results["changed weights"] == results["recomputed changed"] != results["sampled"]
    assert results["told of changed weights"] == 2  # once in every call


def test_what_layers_keep_may_be_changed_in_training(one_process):
    assert not one_process[1]["in inference mode"]


def test_a_mixture_is_one_of_logits_token_by_token(one_process):
    _, results = one_process
    assert results["none of the other"] == results["sampled"] and results["only the other"] == results["recomputed other"]
    assert results["mixture"] == results["recomputed mixture"] and results["mixture"] not in (results["sampled"], results["recomputed other"])
    for name in ("three slots", "poisoned", "evicted"):
        assert results[f"mixture, {name}"] == results["mixture"], name


def test_a_mixture_has_the_exact_distribution(tmp_path):
    words, number = 12, 1500
    folders = [str(make_checkpoint(tmp_path / str(seed), "qwen2", seed=seed, vocab_size=words)) for seed in (2, 3)]
    drawn, exact = run_distributed(draw_first_tokens, 1, *folders, number)[0]
    expected = number * exact
    observed = torch.bincount(torch.tensor(drawn), minlength=words)
    assert expected.min() > 5
    assert ((observed - expected) ** 2 / expected).sum() < 31.3  # 99.9 % quantile with 11 degrees of freedom


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}], ids=str)
def test_layouts_give_the_same_tokens(one_process, layout):
    folders, expected = one_process
    world = layout.get("tensor", 1) * layout.get("pipeline", 1)
    for results in run_distributed(generate_in_layout, world, *folders, layout):
        assert len(results) == 13
        for name, tokens in results.items():
            assert tokens == expected[name], name


@pytest.mark.parametrize("layout", [{"tensor": 2, "sequence": True}, {"pipeline": 2}], ids=str)
def test_layers_in_fp8_are_given_whole_multiples_of_rows_and_change_nothing(one_process, layout):
    folders, expected = one_process
    for completions, padded in run_distributed(generate_in_fp8, 2, folders[0], layout):
        assert completions == expected["greedy"][:3]
        assert padded and not any(rows % 16 for rows in padded)
