"""What a family has beyond the plain decoder holds in packs, in generation and when the model is split: against transformers."""

from pathlib import Path

import pytest
import torch
from distributed_run import run_distributed
from test_hf_models import same_bits
from test_packed_forward import check_packed_step, packed_dpo, transformers_dpo
from tiny_models import make_checkpoint

NAMES = ["mistral_window", "qwen2_window", "mixtral", "qwen3_moe", "qwen3_moe_unnormalised", "gemma", "gemma2", "gemma3"]
NAMES += ["gpt_neox", "gpt_neox_sequential", "phi3", "olmo2"]
LAYOUTS = [{}, {"tensor": 2, "sequence": True}, {"pipeline": 2}]
# Families that differ in attention, in the order of a layer, and in norms that span tensor-parallel ranks.
DEEP = ["gemma2", "gpt_neox", "phi3", "olmo2"]
DEEP_LAYOUTS = [{"context": 2}, {"pipeline": 2, "virtual_pipeline": 2}]
SAMPLED_IN = [({"pipeline": 2, "virtual_pipeline": 2}, [1]), ({"tensor": 2, "sequence": True, "context": 2}, [1, 2])]
NEW_TOKENS = 12


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request, tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module", params=DEEP)
def deep_checkpoint(request, tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, num_hidden_layers=4))


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(6, 131, (length,), generator=generator).tolist() for length in (2, 60, 31)]


def transformers_greedy(folder: str) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    rows = [list(ids) for ids in prompts()]
    with torch.no_grad():
        for row in rows:
            for _ in range(NEW_TOKENS):
                row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    return [row[-NEW_TOKENS:] for row in rows]


def export_and_generate(folder: str, layout: dict, out: Path) -> list[list[int]]:
    from megapref.config import Generation, Parallel
    from megapref.convert.families import read_spec
    from megapref.convert.hf import export_hf, load_hf
    from megapref.mcore import setup
    from megapref.mcore.generation import Engine
    from megapref.mcore.model import build_model

    parallel = Parallel(**layout)
    setup.start(parallel, 0)
    spec = read_spec(folder)
    chunks = build_model(spec, parallel)
    load_hf(chunks, spec, folder)
    export_hf(chunks, spec, folder, out)
    engine = Engine(chunks[0], Generation(max_new_tokens=NEW_TOKENS, kv_cache_gb=0.01, max_requests=2), 100)
    return engine.generate(prompts(), lambda logits, requests, positions: logits.argmax(-1), [NEW_TOKENS] * len(prompts()), -1)


def generate_on_copies(folder: str, layout: dict, tensors: list[int]) -> list[list[list[int]]]:
    """Greedy tokens of copies of the weights in so many parts, as generation.parallel.tensor has it."""
    from megapref.config import Config, Generation, Parallel
    from megapref.convert.families import read_spec
    from megapref.convert.hf import load_hf
    from megapref.engines import make_engines
    from megapref.mcore import setup
    from megapref.mcore.model import build_model
    from megapref.parallel import SamplingParallel

    parallel = Parallel(**layout)
    setup.start(parallel, 0)
    spec = read_spec(folder)
    chunks = build_model(spec, parallel)
    load_hf(chunks, spec, folder)
    made = []
    for tensor in tensors:
        sampling = Generation(max_new_tokens=NEW_TOKENS, kv_cache_gb=0.01, max_requests=2, parallel=SamplingParallel(tensor=tensor))
        generate = make_engines(Config(parallel=parallel, generation=sampling), spec, 100, chunks, None, None, None)["policy"]
        made.append(generate(prompts(), lambda logits, requests, positions: logits.argmax(-1), [NEW_TOKENS] * len(prompts()), -1))
    return made


def world_of(layout: dict) -> int:
    return layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1)


def check_packed_steps(folder: str, layouts: list[dict]) -> None:
    expected = transformers_dpo(folder, 0.1)
    for layout in layouts:
        world = world_of(layout)
        variants = [(True, True, 0.0), (False, True, 0.0)][: 2 if world == 1 else 1]  # share_prompt, keep_logits, entropy
        for results in run_distributed(packed_dpo, world, folder, 0.1, layout, 180, variants):
            for variant, result in zip(variants, results, strict=True):
                check_packed_step(result, expected, (layout, variant))


def test_packed_steps_equal_transformers(checkpoint):
    check_packed_steps(checkpoint, LAYOUTS)


def test_packed_steps_equal_transformers_under_context_parallelism_and_virtual_stages(deep_checkpoint):
    check_packed_steps(deep_checkpoint, DEEP_LAYOUTS)


def test_copies_for_sampling_give_the_greedy_tokens_of_transformers(deep_checkpoint):
    expected = transformers_greedy(deep_checkpoint)
    for layout, tensors in SAMPLED_IN:
        for made in run_distributed(generate_on_copies, world_of(layout), deep_checkpoint, layout, tensors):
            assert made == [expected] * len(tensors), layout


def test_greedy_tokens_are_those_of_transformers_and_export_keeps_the_bits(checkpoint, tmp_path):
    expected = transformers_greedy(checkpoint)
    for number, layout in enumerate(LAYOUTS):
        out = tmp_path / str(number)
        for tokens in run_distributed(export_and_generate, world_of(layout), checkpoint, layout, out):
            assert tokens == expected, layout
        assert same_bits(Path(checkpoint), out), layout
