"""What a family has beyond the plain decoder holds in packs, in generation and when the model is split: against transformers."""

from pathlib import Path

import pytest
import torch
from distributed_run import run_distributed
from test_hf_models import same_bits
from test_packed_forward import packed_dpo, transformers_dpo
from tiny_models import make_checkpoint

NAMES = ["mistral_window", "qwen2_window", "mixtral", "qwen3_moe", "qwen3_moe_unnormalised", "gemma", "gemma2", "gemma3"]
NAMES += ["gpt_neox", "gpt_neox_sequential", "phi3", "olmo2"]
LAYOUTS = [{}, {"tensor": 2, "sequence": True}, {"pipeline": 2}]
NEW_TOKENS = 12


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request, tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp(request.param), request.param))


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


def test_packed_steps_equal_transformers(checkpoint):
    logps_P2, loss, gradients = transformers_dpo(checkpoint, 0.1)
    norm = torch.sqrt(sum(g.double().pow(2).sum() for g in gradients.values())).item()
    for layout in LAYOUTS:
        world = layout.get("tensor", 1) * layout.get("pipeline", 1)
        for share_prompt in (True, False) if world == 1 else (True,):
            for result in run_distributed(packed_dpo, world, checkpoint, 0.1, 0.0, layout, share_prompt, True, 180):
                sums, packed_loss, grad_norm, _, packed_gradients = result
                assert packed_loss == pytest.approx(loss, rel=1e-5), layout
                assert grad_norm == pytest.approx(norm, rel=1e-5), layout
                if sums is not None:
                    torch.testing.assert_close(sums, logps_P2.flatten().sort().values, rtol=1e-5, atol=0)
                for name, gradient in packed_gradients.items():
                    assert (gradient - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name


def test_greedy_tokens_are_those_of_transformers_and_export_keeps_the_bits(checkpoint, tmp_path):
    expected = transformers_greedy(checkpoint)
    for number, layout in enumerate(LAYOUTS):
        world, out = layout.get("tensor", 1) * layout.get("pipeline", 1), tmp_path / str(number)
        for tokens in run_distributed(export_and_generate, world, checkpoint, layout, out):
            assert tokens == expected, layout
        assert same_bits(Path(checkpoint), out), layout
