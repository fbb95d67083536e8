"""What a GPU alone can show: Transformer Engine's kernels and FP8 against plain torch, graphs, memory between phases.

Skipped, with the reason, where the machine lacks a GPU or a library. The bounds of FP8 are those of Transformer Engine's
Python with FP8 computed on a CPU (docs/gpu.md) until these tests have run on one.
"""

import pytest
from distributed_run import run_distributed
from tiny_models import make_checkpoint

from megapref.mcore import setup
from megapref.mcore.kernels import machine, no_decoding_attention

WIDE = dict(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
NEW_TOKENS = 64
# Of a completion token's log-probability against fp32 in plain torch: mean of the absolute difference. Computed on a CPU: 0.011, in FP8 0.11.
BOUNDS = {"bf16": 0.02, "fp8_delayed": 0.2, "fp8_current": 0.2, "fp8_blockwise": 0.2}
TIES = {"bf16": 0.05, "fp8_delayed": 0.5, "fp8_current": 0.5, "fp8_blockwise": 0.5}  # of logits, within which a token may be either

NO_TE = machine().lacks("Transformer Engine")
NO_DECODING = "there is no GPU" if machine().capability is None else no_decoding_attention(machine())
pytestmark = pytest.mark.gpu
needs_te = pytest.mark.skipif(NO_TE is not None, reason=str(NO_TE))
needs_decoding = pytest.mark.skipif(NO_DECODING is not None, reason=str(NO_DECODING))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("gpu"), "qwen3", **WIDE))


def prepared(folder: str, precision: str, share_prompt: bool = True, **kernels):
    """Chunks on the device, in the precision's kernels, with the test's pairs in packs of it."""
    import torch

    from megapref.batch import TokenPair
    from megapref.config import Kernels, Parallel, load
    from megapref.convert.families import read_spec
    from megapref.convert.hf import load_hf
    from megapref.data.packing import pack
    from megapref.mcore.model import build_model

    cfg = load("dpo", [f"precision={precision}"])
    setup.start(Parallel(), 0)
    spec = read_spec(folder)
    chunks = build_model(spec, Parallel(), cfg.precision, Kernels(**kernels))
    load_hf(chunks, spec, folder)
    for parameter in chunks[0].parameters():
        if parameter.ndim == 2:  # 0.2 wide as they are made: with as much as that, softmaxes are all but 0 and 1
            parameter.data.mul_(0.25)
    generator = torch.Generator().manual_seed(0)
    ids = lambda length: torch.randint(2, WIDE["vocab_size"], (length,), generator=generator).tolist()  # noqa: E731
    lengths = [(40, 30, 21), (7, 90, 3), (64, 16, 33), (1, 5, 60), (100, 1, 1), (30, 40, 50)]
    pairs = [TokenPair(ids(p), ids(a), ids(b), 1.0) for p, a, b in lengths]
    return cfg.precision, chunks, pack(pairs, max_tokens=384, share_prompt=share_prompt, pad_multiple=cfg.pad_multiple)[0]


def scores_and_gradients(folder: str, precision: str, share_prompt: bool, kernels: dict):
    """Sums of each side, sorted; log-probabilities of all completion tokens; the gradients of DPO's loss by name. On the CPU, in float32."""
    from functools import partial

    import torch

    from megapref import losses
    from megapref.config import Optimizer
    from megapref.mcore.model import named_weights
    from megapref.mcore.optimizer import build_optimizer, wrap_for_training
    from megapref.mcore.step import TrainState, score_packs, train_step

    options, chunks, packs = prepared(folder, precision, share_prompt, **kernels)
    chunks = wrap_for_training(chunks, options)
    state = TrainState(chunks, build_optimizer(chunks, Optimizer(lr=0.0, clip_grad=1e9), options))
    sums = [torch.zeros(2 * pack.num_rows).index_add(0, pack.cell_K.cpu(), logps.float().cpu()) for pack, logps in
            zip(packs, score_packs(chunks, packs), strict=True)]
    tokens = torch.cat([logps.float().cpu() for logps in score_packs(chunks, packs)])
    train_step(state, packs, partial(losses.dpo, beta=0.1), lr=0.0)
    gradients = {f"{name} {numbers}": parameter.main_grad.float().cpu().clone() for name, numbers, parameter in named_weights(chunks)}
    return torch.cat(sums).sort().values, tokens, gradients


def run(*args):
    return run_distributed(scores_and_gradients, 1, *args)[0]


def of_norm(gradients: dict, others: dict) -> float:
    """The norm of the difference of all gradients over that of the second."""
    square = lambda tensors: sum(float(tensor.square().sum()) for tensor in tensors)  # noqa: E731
    return (square(gradients[name] - others[name] for name in others) / square(others.values())) ** 0.5


@needs_te
def test_transformer_engine_equals_torch_in_bf16(folder):
    _, exact, exact_gradients = run(folder, "fp32", True, {})
    for kernels in ({"layers": "te", "attention": "te"}, {"layers": "te", "attention": "torch"}, {"layers": "torch", "attention": "te"}):
        _, tokens, gradients = run(folder, "bf16", True, kernels)
        assert (tokens - exact).abs().mean() < BOUNDS["bf16"], kernels
        assert of_norm(gradients, exact_gradients) < 0.05, kernels


@needs_te
def test_a_shared_prompt_in_cudnn_attention_equals_two_passes(folder):
    shared, _, shared_gradients = run(folder, "bf16", True, {})
    twice, _, twice_gradients = run(folder, "bf16", False, {})
    assert (shared - twice).abs().max() < 0.5  # sums of up to 90 tokens
    assert of_norm(shared_gradients, twice_gradients) < 0.05


@needs_te
@pytest.mark.parametrize("precision", ["fp8_delayed", "fp8_current", "fp8_blockwise"])
def test_fp8_is_as_near_as_its_recipe_allows(folder, precision):
    _, exact, _ = run(folder, "fp32", True, {})
    _, tokens, _ = run(folder, precision, True, {})
    assert 0 < (tokens - exact).abs().mean() < BOUNDS[precision]


def generated(folder: str, precision: str, kernels: dict):
    """Greedy completions of the engine after the weights have changed, the argmax of a forward pass over each of them, and memory after each call."""
    import torch

    from megapref.config import Generation
    from megapref.inference.sampling import Sampling, sample
    from megapref.mcore.device import current
    from megapref.mcore.generation import Engine

    _, (chunk,), _ = prepared(folder, precision, **kernels)
    prompts = [[5, 3, 7, 11, 2], [9] * 40, [4, 100, 6]]
    engine = Engine(chunk, Generation(max_new_tokens=NEW_TOKENS, max_requests=8), 256)
    draw = lambda logits, requests, positions: sample(logits, None, Sampling(temperature=0))  # noqa: E731
    is_gpu = torch.cuda.is_available()
    held = []
    for factor in (1.0, -1.0):  # the first call makes what stays
        for parameter in chunk.parameters():
            parameter.data.mul_(factor if parameter.ndim == 2 else 1.0)
        completions = engine.generate(prompts, draw, [NEW_TOKENS] * len(prompts), -1)
        held.append(torch.cuda.memory_allocated() if is_gpu else 0)
    chunk.set_is_first_microbatch()
    cache = engine.config.buffer_size_gb * 2**30
    argmaxes, margins = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion], device=current())
        end = ids.shape[1] - 1
        ids = torch.nn.functional.pad(ids, (0, -ids.shape[1] % 128))  # as FP8 wants them; no token sees a later one
        with torch.no_grad():
            logits = chunk(ids, torch.arange(ids.shape[1], device=ids.device)[None], None)[0, len(prompt) - 1 : end].float()
        argmaxes.append(logits.argmax(-1).tolist())
        best = logits.topk(2).values
        margins.append((best[:, 0] - best[:, 1]).tolist())
    return completions, argmaxes, margins, held, cache


def differing(completions, argmaxes, margins, tie: float) -> int:
    """Tokens that are not the argmax, ties of logits within rounding left out."""
    return sum(
        token != best
        for row in zip(completions, argmaxes, margins, strict=True)
        for token, best, margin in zip(*row, strict=True)
        if margin > tie
    )


@needs_te
@needs_decoding
@pytest.mark.parametrize("precision", ["bf16", "fp8_delayed", "fp8_current", "fp8_blockwise"])
def test_the_engine_decodes_what_the_training_forward_predicts_and_frees_its_cache(folder, precision):
    completions, argmaxes, margins, held, cache = run_distributed(generated, 1, folder, precision, {})[0]
    assert differing(completions, argmaxes, margins, TIES[precision]) == 0
    assert held[1] - held[0] < 0.01 * cache


@needs_decoding
def test_graphs_of_decoding_change_no_token(folder):
    eager = run_distributed(generated, 1, folder, "bf16", {})[0][0]
    assert run_distributed(generated, 1, folder, "bf16", {"decoding_graphs": 4})[0][0] == eager


def curve(folder: str, precision: str, steps: int) -> list[float]:
    """DPO's loss of so many steps on the same pairs, against the model as it was."""
    from functools import partial

    from megapref import losses
    from megapref.config import Optimizer
    from megapref.mcore import reference
    from megapref.mcore.optimizer import build_optimizer, wrap_for_training
    from megapref.mcore.step import TrainState, train_step

    options, chunks, packs = prepared(folder, precision)
    packs = reference.fill_reference(reference.resident(chunks), packs)
    for parameter in chunks[0].requires_grad_(True).train().parameters():
        parameter.requires_grad_(True)
    chunks = wrap_for_training(chunks, options)
    state = TrainState(chunks, build_optimizer(chunks, Optimizer(lr=1e-4), options))
    return [train_step(state, packs, partial(losses.dpo, beta=0.1), lr=1e-4)["loss"] for _ in range(steps)]


@needs_te
@pytest.mark.parametrize("precision", ["fp8_delayed", "fp8_current", "fp8_blockwise"])
def test_twenty_steps_in_fp8_follow_those_in_bf16(folder, precision):
    bf16 = run_distributed(curve, 1, folder, "bf16", 20)[0]
    fp8 = run_distributed(curve, 1, folder, precision, 20)[0]
    assert bf16[-1] < 0.9 * bf16[0] and fp8[-1] < 0.9 * fp8[0]
    assert abs(sum(bf16) - sum(fp8)) / len(bf16) < 0.05  # on average: bf16 weights move in steps that come a little earlier or later
