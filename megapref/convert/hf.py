"""Hugging Face folders: finding them, streaming their weights into Core's shards, writing Core's shards as such a folder.

Both directions are exact: what is loaded and exported unchanged has the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module

from megapref import phases
from megapref.batch import ModelSpec
from megapref.convert import mapping
from megapref.convert.refit import whole_experts
from megapref.mcore import checkpoint, gather, setup
from megapref.mcore.model import named_weights, set_weight

MAX_FILE_BYTES = 5 * 10**9
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
)


def find_model(path: str, key: str = "model.path") -> Path:
    """The local folder of a model: `path` itself, or where the hub's model of that name was downloaded to. `key` says where the path is from."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", *_COMPANIONS]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{key}={path} is neither a folder nor a model that can be had from the Hugging Face hub: {reason}"
        ) from error


def load_hf(chunks: list[Module], spec: ModelSpec, folder: str | Path) -> None:
    """Fills the chunks with the folder's weights, each rank reading its shards only; a collective of all ranks.

    The folder is Hugging Face's, or one that convert/core.py made.
    Errors: ValueError naming tensors that are missing, not known, or of another shape than config.json says.
    """
    if checkpoint.is_checkpoint(Path(folder)):
        if any(hasattr(parameter, "_high_precision_init_val") for chunk in chunks for parameter in chunk.parameters()):  # see set_weight
            raise ValueError(f"{folder}: precision.fp8_weights=true starts from Hugging Face folders only; make one with core-to-hf, or use false")
        checkpoint.load_weights(chunks, Path(folder))
        return
    error = None
    try:
        files = tensor_files(Path(folder), spec)
        with ExitStack() as stack:
            opened = {file: stack.enter_context(open_weights(file)) for file in set(files.values())}
            _fill(chunks, spec, {name: opened[file] for name, file in files.items()})
    except (ValueError, OSError, SafetensorError) as caught:
        error = ValueError(f"{folder}: {caught}")
    setup.agree(error)


def export_hf(
    chunks: list[Module],
    spec: ModelSpec,
    source: str | Path,
    folder: str | Path,
    *,
    dtype: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    replace: bool = False,
) -> None:
    """Writes the model as a Hugging Face folder with the configuration and tokenizer of `source`; a collective of all ranks.

    `dtype` (default: that of `source`) names the type of the weights. The folder appears under its name when it is complete.
    Errors: ValueError when it cannot be written, or exists already and is not to `replace`.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    error = None
    if setup.is_first_rank():
        exists = folder.exists() and not replace
        error = ValueError(f"{folder} exists already; remove it or export to another folder") if exists else None
    setup.agree(error)
    tensors = gather.to_first_rank(_whole_tensors(chunks, spec, getattr(torch, dtype or spec.dtype)))
    try:
        if setup.is_first_rank():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_companions(Path(source), partial, dtype)
            _write_weights(tensors, partial, max_file_bytes)
            put(partial, folder)
    except (OSError, SafetensorError) as caught:
        error = ValueError(f"{folder} cannot be written: {caught}")
    for _ in tensors:  # the other ranks, and a first rank that failed: the senders must not be left waiting
        pass
    setup.agree(error)


def put(partial: Path, folder: Path) -> None:
    """Gives a complete folder its name; one that has it now goes last."""
    previous = folder.with_name(f".{folder.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def fingerprint(folder: Path) -> str:
    """A digest of config.json and of the end of every weight file, or of a converted folder's checksums: another for another model."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("manifest.json"))):
        with path.open("rb") as file:
            file.seek(-min(2**20, path.stat().st_size), os.SEEK_END)
            digest.update(path.name.encode() + file.read())
    return digest.hexdigest()[:16]


def tensor_files(folder: Path, spec: ModelSpec) -> dict[str, Path]:
    """The file of every tensor that the model has."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    elif (folder / "model.safetensors").is_file():
        with open_weights(folder / "model.safetensors") as file:
            files = dict.fromkeys(file.keys(), folder / "model.safetensors")
    else:
        raise ValueError("has neither model.safetensors nor model.safetensors.index.json; save the weights as safetensors")
    wanted = mapping.tensor_names(spec)
    # Old checkpoints hold rotary frequencies and causal masks, which follow from config.json; tied ones may hold the embedding a second time.
    buffers = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
    harmless = {name for name in files if name.endswith(buffers) or (spec.tied and name in ("lm_head.weight", "embed_out.weight"))}
    if missing := wanted - set(files):
        raise ValueError(f"lacks {_some(missing)} that a {spec.family} model of this config.json has")
    if unknown := set(files) - wanted - harmless:
        raise ValueError(f"has {_some(unknown)} that a {spec.family} model of this config.json does not have")
    if absent := {files[name].name for name in wanted if not files[name].is_file()}:
        raise ValueError(f"lacks {_some(absent, 'files')} that {index.name} names; was it copied or downloaded in full?")
    return {name: files[name] for name in wanted}


def open_weights(file: Path) -> safe_open:
    """A safetensors file. ValueError when it is not one, or not all of one."""
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file: {error}") from error


def _some(names: set[str], what: str = "tensors") -> str:
    listed = sorted(names)
    return f"{len(listed)} {what} ({', '.join(listed[:5])}{', ...' if len(listed) > 5 else ''})"


def _fill(chunks: list[Module], spec: ModelSpec, files: dict[str, safe_open]) -> None:
    for core_name, numbers, parameter in named_weights(chunks):
        phases.moved()
        size, rank = gather.tensor_parallel_size("expert" in numbers), gather.tensor_parallel_rank("expert" in numbers)
        shape, stored = tuple(parameter.shape), lambda name: files[name].get_slice(name)
        with torch.no_grad():
            set_weight(parameter, mapping.read_shard(core_name, numbers, shape, spec, size, rank, stored))


def _whole_tensors(chunks: list[Module], spec: ModelSpec, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of this pipeline stage."""
    for core_name, numbers, parameter in named_weights(chunks):
        if spec.tied and core_name == "output_layer.weight":
            continue  # the last stage's copy of the embedding
        for numbers_of_one, one in whole_experts(numbers, parameter.detach(), spec):
            shards = [one] if spec.weights[core_name][0] == "replicated" else gather.shards(one, "expert" in numbers)
            for name, tensor in mapping.hf_tensors(core_name, numbers_of_one, shards, spec):
                yield name, tensor.to(dtype)


def write_companions(source: Path, folder: Path, dtype: str | None) -> None:
    config = json.loads((source / "config.json").read_text())
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _write_weights(tensors: Iterator[tuple[str, Tensor]], folder: Path, max_file_bytes: int) -> None:
    """Writes tensors as they come, holding at most one file's worth of them."""
    files: list[list[str]] = []
    total = size = 0
    held: dict[str, Tensor] = {}

    def flush() -> None:
        files.append(list(held))
        save_file(held, folder / f"part-{len(files)}", metadata={"format": "pt"})
        held.clear()

    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if held and size + num_bytes > max_file_bytes:
            flush()
            size = 0
        phases.moved()
        held[name] = tensor.to("cpu", copy=True).contiguous()
        size, total = size + num_bytes, total + num_bytes
    flush()
    if len(files) == 1:
        (folder / "part-1").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
