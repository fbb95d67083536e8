"""Models loaded from Hugging Face folders: logits and gradients of transformers, and the same bits back, under every layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from distributed_run import run_distributed
from family_differences import differences
from safetensors.torch import load_file

from megapref.config import Parallel

LAYOUTS = {"tp2": Parallel(tensor=2), "pp2": Parallel(pipeline=2), "tp2pp2": Parallel(tensor=2, pipeline=2)}
LENGTH = 300  # beyond the original context of the scaled rotary positions
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: tiny_models.make_checkpoint(root / name, name) for name in tiny_models.CONFIGS}


def load_model(folder: Path, parallel: Parallel):
    """In a process of a layout: starts it and returns its chunks with their weights, and the specification."""
    from megapref.convert.families import read_spec
    from megapref.convert.hf import load_hf
    from megapref.mcore import setup
    from megapref.mcore.model import build_model

    setup.start(parallel, seed=0)
    spec = read_spec(folder)
    chunks = build_model(spec, parallel)
    load_hf(chunks, spec, folder)
    return chunks, spec


def token_ids() -> torch.Tensor:
    return torch.randint(0, tiny_models.SHAPE["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(1))


def hf_logits_and_gradients(folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(token_ids()).logits
    _loss(logits).backward()
    return logits.detach(), tiny_models.on_disk(model, {name: parameter.grad for name, parameter in model.named_parameters()})


def _loss(logits: torch.Tensor) -> torch.Tensor:
    """Uses every logit unevenly, so that no gradient is all but zero by symmetry."""
    return (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))).sum() / len(logits)


def logits_on_every_rank(folder: Path, parallel: Parallel, export_to: Path) -> torch.Tensor | None:
    """Runs in each process of a layout: loads, exports, and returns the logits, whole, on the last stage's ranks."""
    from megapref.convert import hf

    chunks, spec = load_model(folder, parallel)
    hf.export_hf(chunks, spec, folder, export_to, max_file_bytes=20_000)
    with torch.no_grad():
        return forward_stages(chunks[0])[..., : spec.vocab_size] if parallel.pipeline > 1 else forward(chunks[0])[..., : spec.vocab_size]


def forward(model) -> torch.Tensor:
    positions = torch.arange(LENGTH).expand(2, -1)
    return model(token_ids(), positions, None, runtime_gather_output=True)


def forward_stages(model) -> torch.Tensor:
    """`forward` through the pipeline, one stage after the other: the last stage's logits, nothing ([0]) before it."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    hidden = torch.empty(LENGTH, 2, model.config.hidden_size)
    if not parallel_state.is_pipeline_first_stage():
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    out = forward(model)
    if parallel_state.is_pipeline_last_stage():
        return out
    dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return torch.empty(0)


def same_bits(left: Path, right: Path) -> bool:
    a, b = ({k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()} for folder in (left, right))
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_logits_gradients_and_export_on_one_process(checkpoints, name, tmp_path):
    folder = checkpoints[name]
    logits, gradients, same = run_distributed(logits_gradients_and_export, 1, folder, tmp_path / "out")[0]
    hf_logits, hf_gradients = hf_logits_and_gradients(folder)
    torch.testing.assert_close(logits, hf_logits, rtol=0, atol=TOLERANCE)
    assert gradients.keys() == hf_gradients.keys()
    for parameter, gradient in gradients.items():
        assert (gradient - hf_gradients[parameter]).norm() <= TOLERANCE * hf_gradients[parameter].norm(), parameter
    assert same


def logits_gradients_and_export(folder: Path, export_to: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor], bool]:
    from megapref.convert import hf, mapping
    from megapref.mcore.model import named_weights

    chunks, spec = load_model(folder, Parallel())
    hf.export_hf(chunks, spec, folder, export_to)
    logits = forward(chunks[0])
    _loss(logits).backward()
    gradients = {}
    for core_name, numbers, parameter in named_weights(chunks):
        gradients.update(mapping.hf_tensors(core_name, numbers, [parameter.grad], spec))
    return logits.detach(), gradients, same_bits(folder, export_to)


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_bfloat16_is_as_near_as_that_of_transformers(checkpoints, name):
    found = run_distributed(differences, 1, checkpoints[name])[0]
    assert found["ours"] <= 0.07 and found["ours"] <= 1.2 * found["transformers"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_logits_and_files(checkpoints, layout, tmp_path):
    parallel = LAYOUTS[layout]
    for name in ("llama", "qwen2_tied", "qwen3"):
        folder, out = checkpoints[name], tmp_path / name
        results = run_distributed(logits_on_every_rank, parallel.tensor * parallel.pipeline, folder, parallel, out)
        expected = hf_logits_and_gradients(folder)[0]
        last_stage = [logits for logits in results if logits.numel()]
        assert len(last_stage) == parallel.tensor
        for logits in last_stage:
            torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
        assert len(list(out.glob("*.safetensors"))) > 1 and same_bits(folder, out)


def test_export_is_a_folder_that_transformers_loads(checkpoints, tmp_path):
    """Sharded source, bfloat16 and tokenizer files are kept."""
    folder = tiny_models.make_checkpoint(tmp_path / "in", "qwen2", dtype=torch.bfloat16, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text("{}")
    assert len(list(folder.glob("*.safetensors"))) > 1
    run_distributed(load_and_export, 1, folder, tmp_path / "out", 40_000)
    assert same_bits(folder, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16 and again.lm_head.weight.abs().sum() > 0


def load_and_export(folder: Path, out: Path, max_file_bytes: int) -> None:
    from megapref.convert import hf

    chunks, spec = load_model(folder, Parallel())
    hf.export_hf(chunks, spec, folder, out, max_file_bytes=max_file_bytes)


def export_somewhere_bad(folder: Path, out: Path, parallel: Parallel) -> str:
    from megapref.convert import hf

    chunks, spec = load_model(folder, parallel)
    with pytest.raises(ValueError) as error:
        hf.export_hf(chunks, spec, folder, out)
    return str(error.value)


def test_export_that_fails_fails_on_every_rank_and_leaves_nothing(checkpoints, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    for out, part in ((tmp_path / "full", "exists already"), (tmp_path / "file" / "out", "cannot be written")):
        messages = run_distributed(export_somewhere_bad, 2, checkpoints["qwen2"], out, Parallel(pipeline=2))
        assert all(str(out) in message and part in message for message in messages)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"] and not list((tmp_path / "full").iterdir())


def load_error(folder: Path, parallel: Parallel) -> str:

    with pytest.raises(ValueError) as error:
        load_model(folder, parallel)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias"), "lacks 1 tensors (model.layers.1.self_attn.k_proj.bias)"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "has 1 tensors (extra)"),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(50, 32)}),
            "model.layers.1.mlp.up_proj.weight has shape (50, 32), config.json makes it (48, 32)",
        ),
        (None, "neither model.safetensors nor"),
    ],
)
def test_wrong_tensors_are_named_on_every_rank(checkpoints, tmp_path, change, expected):
    from safetensors.torch import save_file

    folder = shutil.copytree(checkpoints["qwen2"], tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if change is not None:
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    messages = run_distributed(load_error, 2, folder, Parallel(pipeline=2))
    assert all(expected in message and str(folder) in message for message in messages)


def test_truncated_file_is_an_error(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["qwen2"], tmp_path / "copy")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    assert str(folder) in run_distributed(load_error, 1, folder, Parallel())[0]


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        (Parallel(tensor=4), "parallel.tensor=4 does not divide the model's key-value heads (2); use 1, 2"),
        (Parallel(pipeline=3), "parallel.pipeline=3 does not divide the model's num_hidden_layers=2; use 1 or 2"),
        (Parallel(sequence=True), "parallel.sequence"),
        (Parallel(pipeline=2, virtual_pipeline=2), "parallel.virtual_pipeline=2 does not divide the 1 layers of a stage"),
    ],
)
def test_layout_that_does_not_fit_the_model(parallel, expected):
    from megapref.convert.families import to_spec
    from megapref.mcore.model import check_layout

    with pytest.raises(ValueError) as error:
        check_layout(to_spec(tiny_models.CONFIGS["qwen2"]), parallel)
    assert expected in str(error.value)


def test_experts_split_over_tensor_parallel_ranks_need_sequence_parallelism():
    from megapref.convert.families import to_spec
    from megapref.mcore.model import check_layout

    with pytest.raises(ValueError, match=r"mixture of experts needs parallel\.sequence=true"):
        check_layout(to_spec(tiny_models.CONFIGS["mixtral"]), Parallel(tensor=2))
