"""The load-balancing loss of a mixture's routers against that of transformers, pair by pair, and routers that are frozen."""

import pytest
import torch
from distributed_run import run_distributed
from test_packed_forward import some_pairs
from tiny_models import make_checkpoint, on_disk


def transformers_balance(folder: str) -> tuple[float, dict[str, torch.Tensor], list[float]]:
    """The mean over pairs and layers of transformers' loss of the tokens that predict a pair's completions, its gradients by name, and each layer's
    busiest expert over the mean."""
    from transformers import AutoModelForCausalLM
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    num_experts, k = model.config.num_local_experts, model.config.num_experts_per_tok
    losses, choices = [], torch.zeros(model.config.num_hidden_layers, num_experts)
    for pair in some_pairs():
        sides = []
        for completion in (pair.first_ids, pair.second_ids):
            ids = torch.tensor([[*pair.prompt_ids, *completion]])
            layers = model(ids, output_router_logits=True).router_logits
            sides.append(torch.stack([logits[len(pair.prompt_ids) - 1 : -1] for logits in layers]))
        logits_LTE = torch.cat(sides, 1)
        losses += [load_balancing_loss_func((logits_TE,), num_experts, k) for logits_TE in logits_LTE]
        choices += torch.zeros_like(logits_LTE).scatter(-1, logits_LTE.topk(k).indices, 1).sum(1)
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = {name: torch.zeros_like(weight) if weight.grad is None else weight.grad for name, weight in model.named_parameters()}
    return loss.item(), on_disk(model, gradients), (choices.amax(1) / choices.mean(1)).tolist()


def packed_balance(folder: str, share_prompt: bool, max_tokens: int, recompute: str, freeze: bool = False):
    """The metrics of a step without another loss, coefficient 0.5 or none, and the gradients by transformers' names."""
    from megapref.batch import LossOutput
    from megapref.config import Optimizer, Parallel, Precision
    from megapref.convert import mapping
    from megapref.convert.families import read_spec
    from megapref.convert.hf import load_hf
    from megapref.data.packing import pack
    from megapref.mcore import setup
    from megapref.mcore.model import build_model, named_weights
    from megapref.mcore.optimizer import build_optimizer, wrap_for_training
    from megapref.mcore.router import prepare_routers
    from megapref.mcore.step import TrainState, train_step

    parallel = Parallel(recompute=recompute)
    setup.start(parallel, 0)
    spec = read_spec(folder)
    chunks = build_model(spec, parallel)
    load_hf(chunks, spec, folder)
    prepare_routers(chunks, 0.0 if freeze else 0.5, freeze)
    chunks = wrap_for_training(chunks)
    packs = pack(some_pairs(), max_tokens=max_tokens, share_prompt=share_prompt)[0]
    state = TrainState(chunks, build_optimizer(chunks, Optimizer(weight_decay=0.1, clip_grad=1e9), Precision()))
    loss = lambda pairs: LossOutput((0.1 if freeze else 0.0) * pairs.policy_P2.sum(), len(pairs.preference_P))  # noqa: E731
    metrics = train_step(state, packs, loss, lr=1e-2 if freeze else 0.0)
    if freeze:
        return {name: weight.detach() for core_name, numbers, parameter in named_weights(chunks)
                for name, weight in mapping.hf_tensors(core_name, numbers, [parameter], spec)}  # fmt: skip
    gradients = {}
    for core_name, numbers, parameter in named_weights(chunks):
        gradients.update(mapping.hf_tensors(core_name, numbers, [parameter.main_grad.clone()], spec))
    return metrics, gradients


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_load_balancing_loss_is_that_of_transformers(tmp_path, name):
    folder = str(make_checkpoint(tmp_path, name))
    expected, gradients, loads = transformers_balance(folder)
    for share_prompt, max_tokens, recompute in ((True, 120, "none"), (False, 1000, "none"), (True, 1000, "full")):
        metrics, packed = run_distributed(packed_balance, 1, folder, share_prompt, max_tokens, recompute)[0]
        assert metrics["moe/aux_loss"] == pytest.approx(expected, rel=1e-5)
        assert [metrics[f"moe/load_max/layer_{layer}"] for layer in range(2)] == pytest.approx(loads)
        assert metrics["moe/load_max"] == pytest.approx(max(loads))
        for tensor, gradient in packed.items():
            assert (gradient - 0.5 * gradients[tensor]).norm() <= 1e-5 * gradients[tensor].norm() + 1e-9, tensor


def test_frozen_routers_keep_their_bits(tmp_path):
    from safetensors.torch import load_file

    before = load_file(make_checkpoint(tmp_path, "mixtral") / "model.safetensors")
    after = run_distributed(packed_balance, 1, str(tmp_path), True, 1000, "none", True)[0]
    same = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert same == {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)}
