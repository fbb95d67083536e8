"""Makes a small random Qwen2-type model and a byte-level BPE tokenizer, trained on the text of JSONL rows: a start for the sft recipe.

    python tools/make_model.py rows.jsonl --out models/tiny --layers 4 --hidden 128 --vocab 2048
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

END, PAD = "<|endoftext|>", "<|pad|>"


def write_model(
    folder: Path, texts: Iterable[str], *, vocab: int, layers: int, hidden: int, positions: int, seed: int, chat_template: str | None = None
) -> None:
    """Writes tokenizer, configuration and random weights as a Hugging Face folder; heads are 32 wide, two of them share keys and values."""
    tokenizer = Tokenizer(models.BPE())
    # As Qwen2's own: transformers splits the words of a qwen2 folder so, whatever its tokenizer.json says.
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=positions)
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(folder)

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(wrapped),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
        initializer_range=0.05,
    )
    Qwen2ForCausalLM(config).float().save_pretrained(folder)


def row_texts(path: Path) -> Iterable[str]:
    """The prompt and completion (or chosen side) of each row, as one text."""
    for line in path.read_text(encoding="utf-8").split("\n"):  # not splitlines(): JSON strings may hold other line breaks
        if not line.strip():
            continue
        row = json.loads(line)
        yield "".join(str(row[key]) for key in ("prompt", "completion", "chosen") if key in row)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSONL with `prompt` and `completion` or `chosen`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128, help="a multiple of 64")
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.hidden % 64 or options.hidden <= 0:
        parser.error(f"--hidden={options.hidden} must be a multiple of 64")
    if not options.rows.is_file():
        parser.error(f"{options.rows}: no such file")
    sizes = {name: getattr(options, name) for name in ("vocab", "layers", "hidden", "positions", "seed")}
    write_model(options.out, row_texts(options.rows), **sizes)
    print(f"{options.out}: a random model and its tokenizer; train it with --config-name sft model.path={options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
