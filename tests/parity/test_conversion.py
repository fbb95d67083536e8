"""Distributed checkpoints made of Hugging Face folders and the way back: bits, layouts, runs, memory, errors."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_models
import torch
from distributed_run import run_distributed
from safetensors.torch import load_file
from test_hf_models import same_bits
from tiny_runs import make_inputs, numbers, options, run_training

ROOT = Path(__file__).parents[2]
EVERY_KIND = ["qwen2_tied", "mixtral", "gemma3", "gpt_neox", "phi3", "olmo2"]  # of weights, norms and names
LAYOUTS = [{}, {"tensor": 2, "sequence": True}, {"pipeline": 2}]
EXPERTS = {"expert": 2}


def convert(*arguments) -> int:
    """The exit code of tools/convert_checkpoint.py, here or in a worker."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools" / "convert_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


def load_and_export(folder: Path, layout: dict, out: Path) -> None:
    """In a layout: the model of a folder, exported."""
    from megapref.config import Parallel
    from megapref.convert.families import read_spec
    from megapref.convert.hf import export_hf, load_hf
    from megapref.mcore import setup
    from megapref.mcore.model import build_model

    setup.start(Parallel(**layout), 0)
    spec = read_spec(folder)
    chunks = build_model(spec, Parallel(**layout))
    load_hf(chunks, spec, folder)
    export_hf(chunks, spec, folder, out)


def save_step(folder: Path, layout: dict, out: Path) -> None:
    """In a layout: a run's checkpoint of the model of a folder."""
    from megapref.config import Optimizer, Parallel, Precision
    from megapref.convert.families import read_spec
    from megapref.convert.hf import load_hf
    from megapref.mcore import saving, setup
    from megapref.mcore.model import build_model
    from megapref.mcore.optimizer import build_optimizer, wrap_for_training
    from megapref.mcore.step import TrainState

    setup.start(Parallel(**layout), 0)
    spec = read_spec(folder)
    chunks = build_model(spec, Parallel(**layout))
    load_hf(chunks, spec, folder)
    chunks = wrap_for_training(chunks)
    saving.finish_save(saving.begin_save(TrainState(chunks, build_optimizer(chunks, Optimizer(), Precision())), out, {}), 1)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_there_and_back_keeps_the_bits_and_every_layout_loads_them(name, tmp_path):
    source = tiny_models.make_checkpoint(tmp_path / "in", name)
    assert convert("hf-to-core", source, tmp_path / "core") == 0
    assert convert("core-to-hf", tmp_path / "core", tmp_path / "back") == 0
    assert same_bits(source, tmp_path / "back")
    for number, layout in enumerate([*LAYOUTS, EXPERTS] if name == "mixtral" else LAYOUTS):
        run_distributed(load_and_export, max(layout.values(), default=1), tmp_path / "core", layout, tmp_path / str(number))
        assert same_bits(source, tmp_path / str(number)), layout


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "mixtral"])
def test_a_runs_checkpoint_of_any_layout_becomes_a_folder(name, tmp_path):
    source = tiny_models.make_checkpoint(tmp_path / "in", name)
    for number, layout in enumerate([*LAYOUTS, EXPERTS] if name == "mixtral" else LAYOUTS):
        steps = tmp_path / f"steps{number}"
        run_distributed(save_step, max(layout.values(), default=1), source, layout, steps)
        assert convert("core-to-hf", steps / "step_000000", tmp_path / f"out{number}", "--model", source) == 0
        assert same_bits(source, tmp_path / f"out{number}"), layout


def test_a_run_from_a_converted_model_is_the_run_from_its_source(tmp_path):
    inputs = make_inputs(tmp_path / "inputs")
    core = str(tmp_path / "core")
    assert convert("hf-to-core", inputs["model"], core) == 0
    trees = {
        name: options({**inputs, "model": model}, tmp_path / name, "offline", parallel={"tensor": 2}, save={"export": True})
        for name, model in (("hf", inputs["model"]), ("converted", core))
    }
    for tree in trees.values():
        assert run_distributed(run_training, 2, tree) == ["", ""]
    assert numbers(tmp_path / "converted") == numbers(tmp_path / "hf")
    exported = tmp_path / "converted" / "hf"
    assert same_bits(tmp_path / "hf" / "hf", exported) and (exported / "tokenizer.json").is_file()
    [error] = run_distributed(run_training, 1, options(inputs, tmp_path / "resumed", "offline", run={"resume": core}))
    assert f"{core} is a converted model, which has no state of a run to go on with" in error
    step = next((tmp_path / "converted" / "checkpoints").iterdir())
    assert convert("core-to-hf", step, tmp_path / "again") == 0  # the run's config.yaml says what it started from
    assert same_bits(exported, tmp_path / "again") and (tmp_path / "again" / "tokenizer.json").is_file()


def test_type_files_and_companions(tmp_path):
    source = tiny_models.make_checkpoint(tmp_path / "in", "qwen2", dtype=torch.bfloat16, max_shard_size="20KB")
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"top_k": 5}')
    assert convert("hf-to-core", source, tmp_path / "core") == 0
    assert convert("core-to-hf", tmp_path / "core", tmp_path / "back", "--max-file-gb", "1e-5") == 0
    assert same_bits(source, tmp_path / "back") and len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    for name in ("tokenizer.json", "generation_config.json", "config.json"):
        assert (tmp_path / "back" / name).read_text().strip() == (source / name).read_text().strip()
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").dtype == torch.bfloat16
    assert convert("hf-to-core", source, tmp_path / "wide", "--dtype", "float32") == 0
    assert convert("core-to-hf", tmp_path / "wide", tmp_path / "wide_back") == 0
    wide = load_file(tmp_path / "wide_back" / "model.safetensors")
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    assert json.loads((tmp_path / "wide_back" / "config.json").read_text())["dtype"] == "float32"
    assert convert("core-to-hf", tmp_path / "wide", tmp_path / "narrow", "--dtype", "bfloat16") == 0
    assert same_bits(source, tmp_path / "narrow")


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3_moe"])
def test_sequence_classifiers_convert(name, tmp_path):
    source = tiny_models.make_checkpoint(tmp_path / "in", name, scores=True, num_labels=3)
    assert convert("hf-to-core", source, tmp_path / "core") == 0
    assert convert("core-to-hf", tmp_path / "core", tmp_path / "back") == 0
    assert same_bits(source, tmp_path / "back")
    assert run_distributed(convert, 1, "verify", tmp_path / "core", "--model", source, "--tokens", 60, "--tolerance", 1e-5) == [0]


def change(folder: Path, out: Path) -> Path:
    """The folder with one weight doubled."""
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out


def test_verify_tells_equal_from_different_models(tmp_path):
    source = tiny_models.make_checkpoint(tmp_path / "in", "qwen3")
    assert convert("hf-to-core", source, tmp_path / "core") == 0
    changed = change(source, tmp_path / "changed")
    for against, code in ((source, 0), (changed, 1)):
        assert run_distributed(convert, 1, "verify", tmp_path / "core", "--model", against, "--tokens", 100) == [code]
    assert run_distributed(convert, 1, "verify", source, "--tokens", 100) == [0]


def test_inspect_shows_both_kinds_and_finds_flipped_bytes(tmp_path, capfd):
    source = tiny_models.make_checkpoint(tmp_path / "in", "mixtral")
    assert convert("inspect", source) == 0
    text = capfd.readouterr().out
    assert "MixtralForCausalLM: 2 layers" in text and "4 experts" in text and "131 x 32" in text and "checksums: none" in text
    assert convert("hf-to-core", source, tmp_path / "core") == convert("inspect", tmp_path / "core") == 0
    text = capfd.readouterr().out
    assert "decoder.layers.mlp.experts.experts.linear_fc1.weight" in text and "2 x 4 x 96 x 32" in text
    assert "checksums: all files are as they were written" in text
    data = bytearray((tmp_path / "core" / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "core" / "__0_0.distcp").write_bytes(data)
    assert convert("inspect", tmp_path / "core") == 1
    assert "checksums: __0_0.distcp is not what was saved" in capfd.readouterr().out
    assert convert("core-to-hf", tmp_path / "core", tmp_path / "back") == 2
    assert "__0_0.distcp is not what was saved" in capfd.readouterr().err and not (tmp_path / "back").exists()
    (tmp_path / "core" / ".metadata").write_bytes(b"")
    assert convert("inspect", tmp_path / "core") == 2
    assert ".metadata cannot be read: EOFError" in capfd.readouterr().err


def test_what_cannot_be_converted_is_named_and_leaves_nothing(tmp_path, capfd):
    source = tiny_models.make_checkpoint(tmp_path / "in", "qwen2")
    other = tiny_models.make_checkpoint(tmp_path / "other", "qwen2", num_hidden_layers=3)
    assert convert("hf-to-core", source, tmp_path / "core") == 0
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    bare, cut = (Path(shutil.copytree(source, tmp_path / name)) for name in ("bare", "cut"))
    (bare / "model.safetensors").unlink()
    os.truncate(cut / "model.safetensors", 9000)
    partial = tiny_models.make_checkpoint(tmp_path / "partial", "qwen2", max_shard_size="20KB")
    next(partial.glob("model-00002-*")).unlink()
    yarn = tmp_path / "yarn"
    yarn.mkdir()
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    (yarn / "config.json").write_text(json.dumps({**json.loads((source / "config.json").read_text()), "rope_parameters": rope}))
    for arguments, part in (
        (("hf-to-core", source, tmp_path / "core"), "exists already"),
        (("hf-to-core", source, tmp_path / "file" / "out"), "cannot be written"),
        (("hf-to-core", yarn, tmp_path / "out"), "rope_type='yarn' is not supported; supported: default, linear, llama3"),
        (("hf-to-core", tmp_path / "empty", tmp_path / "out"), "has no config.json"),
        (("hf-to-core", bare, tmp_path / "out"), f"{bare}: has neither model.safetensors nor"),
        (("hf-to-core", partial, tmp_path / "out"), "lacks 1 files (model-00002-of-"),
        (("hf-to-core", cut, tmp_path / "out"), "cut/model.safetensors is no whole safetensors file"),
        (("core-to-hf", tmp_path / "empty", tmp_path / "out"), "is no checkpoint"),
        (("core-to-hf", tmp_path / "core", tmp_path / "out", "--model", other), "is of another model than"),
        (("inspect", tmp_path / "empty"), "neither safetensors files nor"),
        (("verify", tmp_path / "core"), "--model"),
    ):
        assert convert(*arguments) == 2, arguments
        assert part in capfd.readouterr().err, arguments
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    in_fp8 = torch.nn.Linear(1, 1)
    in_fp8.weight._high_precision_init_val = torch.zeros(1, 1)
    from megapref.convert.hf import load_hf

    with pytest.raises(ValueError, match="fp8_weights=true starts from Hugging Face folders only"):
        load_hf([in_fp8], None, tmp_path / "core")


@contextmanager
def files_of_at_most(num_bytes: int):
    """As on a disk that fills up while writing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_space_is_told_and_nothing_is_left(tmp_path, capfd, monkeypatch):
    source = tiny_models.make_checkpoint(tmp_path / "in", "qwen2")
    assert convert("hf-to-core", source, tmp_path / "core") == 0
    for command in (("hf-to-core", source), ("core-to-hf", tmp_path / "core")):
        with files_of_at_most(20_000):
            assert convert(*command, tmp_path / "out") == 2
        assert "out cannot be written: " in capfd.readouterr().err
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
            assert convert(*command, tmp_path / "out") == 2
        assert "GB, 0.000 GB are free" in capfd.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_memory_is_that_of_one_parameter_not_of_the_model(tmp_path):
    """Its own memory: pages of the files that are read can be dropped."""
    wide = dict(hidden_size=512, intermediate_size=2048, head_dim=64, num_attention_heads=8, num_hidden_layers=6)
    source = tiny_models.make_checkpoint(tmp_path / "in", "llama", **wide)
    largest, total = 2 * 2048 * 512 * 4, sum(file.stat().st_size for file in source.glob("*.safetensors"))
    warm = tiny_models.make_checkpoint(tmp_path / "warm", "llama")
    arguments = [sys.executable, "-c", MEASURE, *map(str, (warm, source, tmp_path))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc keeps pieces of up to 32 MB that were freed, and may use them again
    output = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=True, env=environment).stdout
    peaks = [int(peak) for peak in output.splitlines()[-1].split()]
    assert len(peaks) == 2 and max(peaks) < 1.5 * largest < total / 7, peaks
    assert same_bits(source, tmp_path / "back_in")


# Prints for each direction, after the same with a small model, the most memory of its own that the process had, less that before.
MEASURE = """
import pathlib, sys, threading
from tools import convert_checkpoint
def own():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
def peak(*arguments):
    before, seen, done = own(), [], threading.Event()
    def watch():
        while not done.wait(0.001):
            seen.append(own())
    watcher = threading.Thread(target=watch)
    watcher.start()
    code = convert_checkpoint.main(arguments)
    done.set()
    watcher.join()
    assert code == 0
    return max(seen) - before
out = sys.argv[3]
for model in sys.argv[1:3]:
    core, back = (f"{out}/{kind}_{pathlib.Path(model).name}" for kind in ("core", "back"))
    peaks = peak("hf-to-core", model, core), peak("core-to-hf", core, back)
print(*peaks)
"""
