"""Samples from a checkpoint, or chats with it.

    python tools/generate.py runs/online_dpo --prompt "Tell me about the hotel by the harbour." --samples 3
    python tools/generate.py Qwen/Qwen2.5-0.5B-Instruct --chat          # a conversation, line by line

PATH is a Hugging Face folder, a hub name, or a run directory (its exported model, or else its newest checkpoint).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import yaml

from megapref.batch import Prompt
from megapref.config import Generation, Parallel, Precision, resolve_path
from megapref.convert.families import read_spec
from megapref.convert.hf import find_model, load_hf
from megapref.data.chat import load_tokenizer
from megapref.inference.engine import make_generate
from megapref.mcore import checkpoint, setup
from megapref.mcore.generation import Engine
from megapref.mcore.kernels import machine
from megapref.mcore.model import build_model


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    setup.start(Parallel(), options.seed)
    try:
        chunks, folder = _load(Path(options.path))
        tokenizer = load_tokenizer(str(folder))
        if options.chat and not tokenizer.chat_template:
            raise ValueError(f"{folder}: its tokenizer has no chat template; leave out --chat to continue plain text")
        generation = Generation(options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.stop)
        room = chunks[0].max_sequence_length
        engine = Engine(chunks[0], generation, room)
        generate = make_generate({"policy": engine.generate}, generation, tokenizer, options.seed, room)

        def complete(text: str, turn: int) -> list[str]:
            ids = tokenizer(text, add_special_tokens=not options.chat)["input_ids"]
            if not 0 < len(ids) < room:
                raise ValueError(f"a prompt of {len(ids)} tokens does not fit: it must have 1 to {room - 1}, to leave some of the model's {room}")
            prompts = [Prompt(ids, text, {}, index) for index in range(options.samples)]
            return [completion.text for completion in generate(prompts, "policy", step=turn, side=0)]

        _talk(complete, tokenizer, options)
    except ValueError as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    finally:
        setup.stop()
    return 0


def _talk(complete, tokenizer, options: argparse.Namespace) -> None:
    messages: list[dict[str, str]] = []
    lines = options.prompt or _typed_lines("you> " if options.chat else "prompt> ")
    for turn, line in enumerate(lines):
        text = line
        if options.chat:
            messages.append({"role": "user", "content": line})
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        replies = complete(text, turn)
        messages.append({"role": "assistant", "content": replies[0]})
        for reply in replies:
            print(reply.strip() if options.chat else f"{line}{reply}", end="\n\n" if len(replies) > 1 else "\n", flush=True)


def _typed_lines(mark: str):
    while True:
        try:
            line = input(mark if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


def _load(path: Path) -> tuple[list[torch.nn.Module], Path]:
    """The model, and the Hugging Face folder that its tokenizer is in."""
    is_run = (path / "config.yaml").is_file()
    exported = path / "hf"
    newest = checkpoint.latest_checkpoint(path / "checkpoints") if is_run and not exported.is_dir() else None
    if is_run and newest is None and not exported.is_dir():
        raise ValueError(f"{path} is a run without an exported model (hf/) or a usable checkpoint; let it run to its first save")
    source = yaml.safe_load((path / "config.yaml").read_text())["model"]["path"] if newest else str(exported if is_run else path)
    folder = find_model(resolve_path(source))
    spec = read_spec(folder)
    chunks = build_model(spec, Parallel(), Precision("fp32" if machine().capability is None else "bf16"))
    if newest:
        checkpoint.load_weights(chunks, newest)
    else:
        load_hf(chunks, spec, folder)
    return chunks, folder


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--prompt", action="append", help="a text to continue (several times for several); default: lines typed or piped in")
    parser.add_argument("--chat", action="store_true", help="use the chat template and keep the conversation")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="completions of each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a sample, which keeps it; several times for several")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name, fits, rule in (
        ("samples", options.samples >= 1, "at least 1"),
        ("max_new_tokens", options.max_new_tokens >= 1, "at least 1"),
        ("temperature", options.temperature >= 0, "0 or more"),
        ("top_p", 0 < options.top_p <= 1, "above 0 and at most 1"),
        ("top_k", options.top_k >= 0, "0 or more"),
        ("stop", "" not in options.stop, "some text"),
    ):
        if not fits:
            parser.error(f"--{name.replace('_', '-')}={getattr(options, name)} must be {rule}")
    return options


if __name__ == "__main__":
    sys.exit(main())
