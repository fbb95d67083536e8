"""Tiny tokenizers made on the spot: byte-level BPE, so every text has tokens, with merges that cross the borders tests care about."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["the cat sat on the mat", "a dog ran to the old house", "what is two and three? it is five", "hello there, good morning to you"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_tokenizer(folder: Path, *, chat_template: str | None = CHATML, eos: str | None = "<|im_end|>", bos: bool = False, end: bool = False) -> str:
    """Saves a tokenizer in `folder` and returns its path; `bos` puts `<s>` in front of every text, `end` EOS behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    template = f"{'<s>:0 ' if bos else ''}$A:0{' <|im_end|>:0' if end else ''}"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(s, tokenizer.token_to_id(s)) for s in specials])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, additional_special_tokens=specials[1:])
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return str(folder)
