"""Hugging Face folders to Megatron-Core's distributed checkpoints and back; what is in either; whether it computes what transformers does.

    python tools/convert_checkpoint.py hf-to-core Qwen/Qwen2.5-7B-Instruct models/qwen-core     # model.path=models/qwen-core, at any layout
    python tools/convert_checkpoint.py core-to-hf runs/mine/checkpoints/step_000100 models/mine
    python tools/convert_checkpoint.py inspect runs/mine/checkpoints/step_000100
    python tools/convert_checkpoint.py verify models/qwen-core --model Qwen/Qwen2.5-7B-Instruct

One process, no GPU, one tensor in memory at a time (verify: the whole model twice, in float32). The bits come back, unless --dtype changes them.
See docs/conversion.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import yaml

from megapref.config import resolve_path
from megapref.convert import core
from megapref.convert.families import read_spec
from megapref.convert.hf import find_model, open_weights
from megapref.convert.verify import compare
from megapref.mcore import checkpoint
from megapref.mcore.stored import Stored

DTYPES = ("float32", "bfloat16", "float16")
_SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "BOOL": 1}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2


def _hf_to_core(options: argparse.Namespace) -> int:
    core.hf_to_core(find_model(options.source, "SOURCE"), Path(options.out), options.dtype)
    print(f"{options.out} is a model as a run takes it: model.path={options.out}")
    return 0


def _core_to_hf(options: argparse.Namespace) -> int:
    source = Path(options.source)
    if not checkpoint.is_checkpoint(source):
        raise ValueError(f"{source} is no checkpoint, as it has no manifest.json: give the folder of one, such as checkpoints/step_000010")
    core.core_to_hf(source, Path(options.out), _model_of(source, options.model), options.dtype, int(options.max_file_gb * 1e9))
    print(f"{options.out} is a Hugging Face folder")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    path = Path(options.source) if Path(options.source).is_dir() else find_model(options.source, "SOURCE")
    is_core = checkpoint.is_checkpoint(path)
    if (path / "config.json").is_file():
        _print_model(path)
    rows = _core_rows(path) if is_core else _hf_rows(path)
    width = max((len(row[0]) for row in rows), default=0)
    for name, dtype, shape, num_bytes in rows:
        print(f"{name:<{width}}  {dtype:<8}  {_as_text(num_bytes):>9}  {' x '.join(map(str, shape))}")
    print(f"{len(rows)} tensors, {_as_text(sum(row[3] for row in rows))}")
    problem = checkpoint.find_problem(path) if is_core else None
    state = "none are kept" if not is_core else "all files are as they were written" if problem is None else problem
    print(f"checksums: {state}")
    return 0 if problem is None else 1


def _print_model(path: Path) -> None:
    spec = read_spec(path, classifier=True)
    sizes = spec.transformer
    architectures = json.loads((path / "config.json").read_text()).get("architectures") or [spec.family]
    print(f"{', '.join(architectures)}: {sizes['num_layers']} layers, ", end="")
    print(f"hidden size {sizes['hidden_size']}, {sizes['num_attention_heads']} heads, {sizes['num_query_groups']} of keys and values, ", end="")
    experts = f"{sizes['num_moe_experts']} experts, " if "num_moe_experts" in sizes else ""
    print(f"{experts}vocabulary {spec.vocab_size}, {spec.max_positions} positions, {spec.dtype}")


def _core_rows(path: Path) -> list[tuple[str, str, tuple[int, ...], int]]:
    rows = []
    for name, (shape, dtype) in sorted(Stored(path).tensors.items()):
        num_elements = 1
        for size in shape:
            num_elements *= size
        rows.append((name, str(dtype).removeprefix("torch."), shape, num_elements * dtype.itemsize))
    return rows


def _hf_rows(path: Path) -> list[tuple[str, str, tuple[int, ...], int]]:
    rows = []
    for file in sorted(path.glob("*.safetensors")):
        with open_weights(file) as opened:
            for name in opened.keys():  # noqa: SIM118  no dictionary
                tensor = opened.get_slice(name)
                num_bytes = _SIZES.get(tensor.get_dtype(), 0)
                for size in tensor.get_shape():
                    num_bytes *= size
                rows.append((name, tensor.get_dtype(), tuple(tensor.get_shape()), num_bytes))
    if not rows:
        raise ValueError(f"{path} has neither safetensors files nor a checkpoint's manifest.json")
    return sorted(rows)


def _verify(options: argparse.Namespace) -> int:
    source = Path(options.source) if Path(options.source).is_dir() else find_model(options.source, "SOURCE")
    if checkpoint.is_checkpoint(source) and options.model is None and (source / "config.json").is_file():
        raise ValueError(f"{source} is a converted model: name the Hugging Face folder it should equal with --model")
    model = _model_of(source, options.model) if checkpoint.is_checkpoint(source) or options.model else source
    found = compare(source, model, options.tokens, options.seed)
    bound = options.tolerance * found.largest
    print(f"{found.num_logits} logits up to {found.largest:.4g}; largest difference {found.difference:.3g}, allowed {bound:.3g}; ", end="")
    print(f"the same token is the most likely in {100 * found.agreement:.2f} % of the rows")
    return 0 if found.difference <= bound else 1


def _model_of(source: Path, model: str | None) -> Path:
    """The folder with configuration and tokenizer: as given, or the checkpoint's own, or the model that its run started from."""
    if model is not None:
        return find_model(model, "--model")
    if (source / "config.json").is_file():
        return source
    config = source.parent.parent / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{source} is in no run directory: name the model it is of with --model")
    return find_model(resolve_path(yaml.safe_load(config.read_text())["model"]["path"]))


def _as_text(num_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="hf-to-core | core-to-hf | inspect | verify")
    for name, run, about in (
        ("hf-to-core", _hf_to_core, "a Hugging Face folder or hub name to a distributed checkpoint"),
        ("core-to-hf", _core_to_hf, "a checkpoint, a run's or a converted one, to a Hugging Face folder"),
        ("inspect", _inspect, "what is in either: model, tensors, shapes, types, sizes, checksums; exit code 1 where a file has changed"),
        ("verify", _verify, "logits of random tokens beside those of transformers; exit code 1 where they differ"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        command.add_argument("source", metavar="SOURCE")
        if run in (_hf_to_core, _core_to_hf):
            command.add_argument("out", metavar="OUT")
            command.add_argument("--dtype", choices=DTYPES, help="of the weights; default: that of the Hugging Face folder")
        if run in (_core_to_hf, _verify):
            command.add_argument("--model", help="Hugging Face folder or hub name; default: what the checkpoint's run started from")
        if run is _core_to_hf:
            command.add_argument("--max-file-gb", type=float, default=5.0, metavar="GB", help="size of a safetensors file")
        if run is _verify:
            command.add_argument("--tokens", type=int, default=512, metavar="N", help="of each of two rows")
            command.add_argument("--tolerance", type=float, default=1e-4, help="of the largest logit")
            command.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name in ("max_file_gb", "tokens"):
        if getattr(options, name, 1) <= 0:
            parser.error(f"--{name.replace('_', '-')}={getattr(options, name)} must be above 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
