"""The packed forward against transformers, one sequence at a time: log-probabilities and gradients in float32."""

import pytest
import torch
from distributed_run import run_distributed
from tiny_models import make_checkpoint, on_disk

from megapref.batch import TokenPair

LENGTHS = [(9, 12, 5), (3, 40, 33), (70, 8, 21), (15, 6, 6), (1, 1, 30), (25, 60, 2)]


def some_pairs(vocab: int = 131, seed: int = 3) -> list[TokenPair]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(2, vocab, (n,), generator=generator).tolist()  # noqa: E731
    return [TokenPair(draw(p), draw(a), draw(b), preference=1.0 if i % 2 else 0.25) for i, (p, a, b) in enumerate(LENGTHS)]


def transformers_dpo(folder, beta: float, entropy: float = 0.0):
    """Sums of completion log-probabilities [P, 2], the DPO loss against a reference of zeros less the weighted `entropy`, its gradients by name."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    rows, bonus = [], 0.0
    for pair in some_pairs():
        sides = []
        for completion in (pair.first_ids, pair.second_ids):
            ids = torch.tensor([[*pair.prompt_ids, *completion]])
            logps = model(ids).logits[0].log_softmax(-1)
            start = len(pair.prompt_ids) - 1
            sides.append(logps[start:-1].gather(1, ids[0, start + 1 :, None]).sum())
            bonus = bonus - 0.5 * (logps[start:-1].exp() * logps[start:-1]).sum() / len(LENGTHS)
        rows.append(torch.stack(sides))
    logps_P2 = torch.stack(rows)
    preference = torch.tensor([pair.preference for pair in some_pairs()])
    margin = beta * (logps_P2[:, 0] - logps_P2[:, 1])
    loss = -(preference * torch.nn.functional.logsigmoid(margin) + (1 - preference) * torch.nn.functional.logsigmoid(-margin)).mean()
    loss = loss - entropy * bonus
    loss.backward()
    gradients = on_disk(model, {name: parameter.grad for name, parameter in model.named_parameters()})
    return logps_P2.detach(), loss.item(), gradients


def packed_dpo(folder: str, beta: float, layout: dict, max_tokens: int, variants: list[tuple[bool, bool, float]]) -> list[tuple]:
    """The same through packs in a layout, for each of (share_prompt, keep_logits, entropy): sums of completions, sorted, where the last stage is;
    loss, norm of the gradient, number of packs; on one process the gradients by transformers' names."""
    from megapref.config import Optimizer, Parallel, Precision
    from megapref.convert.families import read_spec
    from megapref.convert.hf import load_hf
    from megapref.mcore import setup
    from megapref.mcore.model import build_model
    from megapref.mcore.optimizer import build_optimizer, wrap_for_training
    from megapref.mcore.step import TrainState

    parallel = Parallel(**layout)
    setup.start(parallel, 0)
    spec = read_spec(folder)
    chunks = build_model(spec, parallel)
    load_hf(chunks, spec, folder)
    chunks = wrap_for_training(chunks)
    state = TrainState(chunks, build_optimizer(chunks, Optimizer(lr=0.0, clip_grad=1e9), Precision()))
    return [_packed_step(state, spec, parallel, beta, max_tokens, *variant) for variant in variants]


def _packed_step(state, spec, parallel, beta: float, max_tokens: int, share_prompt: bool, keep_logits: bool, entropy: float) -> tuple:
    """At a learning rate of 0, so that the next one begins with the same weights."""
    from functools import partial
    from unittest.mock import patch

    from megapref import losses
    from megapref.convert import mapping
    from megapref.data.packing import pack
    from megapref.mcore import forward, setup
    from megapref.mcore.model import named_weights
    from megapref.mcore.step import score_packs, train_step

    multiples = {"pad_multiple": parallel.pad_multiple, "pack_multiple": parallel.pack_multiple}
    packs = pack(some_pairs(), max_tokens=max_tokens, num_ranks=setup.data_parallel_size(), share_prompt=share_prompt, **multiples)
    mine = packs[setup.data_parallel_rank()]
    scored = zip(score_packs(state.chunks, mine), mine, strict=True)
    sums = [torch.zeros(2 * batch.num_rows).index_add(0, batch.cell_K, logps) for logps, batch in scored if logps is not None]
    with patch.object(forward, "KEPT_LOGITS_BYTES", forward.KEPT_LOGITS_BYTES if keep_logits else 0):
        dpo = partial(losses.dpo, beta=beta)
        with_entropy = partial(losses.combine, losses=[(dpo, 1.0)], entropy_regularization=entropy, entropy_mode="full_vocab")
        metrics = train_step(state, mine, with_entropy if entropy else dpo, lr=0.0)
    gradients = {}
    for core_name, numbers, parameter in named_weights(state.chunks) if torch.distributed.get_world_size() == 1 else ():
        gradients.update(mapping.hf_tensors(core_name, numbers, [parameter.main_grad.clone()], spec))
    return torch.cat(sums).sort().values if sums else None, metrics["loss"], metrics["grad_norm"], len(packs[0]), gradients


LAYOUTS = [
    {},
    {"tensor": 2},
    {"tensor": 2, "sequence": True},
    {"pipeline": 2},
    {"tensor": 2, "pipeline": 2},
    {"pipeline": 2, "first_stage_layers": 1},
    {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 2},
    {"context": 2},
    {"tensor": 2, "sequence": True, "context": 2},
    {"context": 2, "pipeline": 2, "recompute": "full"},
    {"recompute": "selective"},
    {"recompute": "full"},
]


@pytest.fixture(scope="module", params=["qwen2", "llama_tied"])
def checkpoint(request, tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, num_hidden_layers=6)
    return str(folder), {entropy: transformers_dpo(folder, 0.1, entropy) for entropy in (0.0, 0.05)}


VARIANTS = [(True, True, 0.0), (False, False, 0.0), (True, True, 0.05), (False, False, 0.05)]  # share_prompt, keep_logits, entropy


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packed_step_equals_transformers(checkpoint, layout):
    folder, expected = checkpoint
    world = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1)
    for results in run_distributed(packed_dpo, world, folder, 0.1, layout, 180, VARIANTS):
        for variant, result in zip(VARIANTS, results, strict=True):
            check_packed_step(result, expected[variant[-1]], variant)
            assert result[3] > 1  # packs
            assert result[4].keys() == (expected[0.0][2].keys() if world == 1 else set())


def check_packed_step(result: tuple, expected: tuple, what) -> None:
    """What `packed_dpo` has measured against what `transformers_dpo` has."""
    sums, packed_loss, grad_norm, _, packed_gradients = result
    logps_P2, loss, gradients = expected
    norm = torch.sqrt(sum(g.double().pow(2).sum() for g in gradients.values())).item()
    assert packed_loss == pytest.approx(loss, rel=1e-5), what
    assert grad_norm == pytest.approx(norm, rel=1e-5), what
    if sums is not None:
        torch.testing.assert_close(sums, logps_P2.flatten().sort().values, rtol=1e-5, atol=0)
    for name, gradient in packed_gradients.items():
        assert (gradient - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), (name, what)


def test_data_parallel_equals_one_process_whatever_the_packing(checkpoint):
    folder, (_, loss, _) = checkpoint[0], checkpoint[1][0.0]
    for world, max_tokens in ((1, 1000), (2, 180), (4, 1000)):  # the last: six pairs on four ranks
        results = [result for (result,) in run_distributed(packed_dpo, world, folder, 0.1, {}, max_tokens, VARIANTS[:1])]
        assert len({(r[1], r[2]) for r in results}) == 1
        assert results[0][1] == pytest.approx(loss, rel=1e-5)
