"""Reward models: Hugging Face sequence-classification checkpoints that score a prompt with its completion."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Literal

from transformers import PreTrainedTokenizerBase

from megapref.batch import Completion, Prompt
from megapref.inference.classifier import classify, load_classifier
from megapref.online.judge_text import as_written


def sequence_classifier(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    path: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: Literal["auto", "cpu"] = "auto",
    chat: bool | None = None,
    label: Annotated[int, ">= 0"] | None = None,
    max_length: Annotated[int, ">= 1"] | None = None,
    truncation: Literal["keep_end", "keep_start", "error"] = "keep_end",
    max_tokens: Annotated[int, ">= 1"] = 16384,
) -> list[float]:
    """The model's logit for each completion after its prompt, tokenised anew with the model's own tokenizer. docs/judges.md has the parameters.

    ValueError for a checkpoint that is none of a reward model, a text over `max_length` with `truncation` error, a conversation without template.
    """
    classifier = load_classifier(path, dtype, device)
    labels = classifier.model.config.num_labels
    if (label or 0) >= labels or (label is None and labels > 1):
        raise ValueError(f"path={path} has {labels} labels; set parameter label to the number of the one that is the score, 0 to {labels - 1}")
    limit = min((n for n in (max_length, classifier.max_positions) if n), default=None)
    tokens = [tokenize(classifier.tokenizer, prompt, completion, chat) for prompt, completion in zip(prompts, completions, strict=True)]
    long = [i for i, ids in enumerate(tokens) if limit and len(ids) > limit]
    if long and truncation == "error":
        raise ValueError(f"prompt row {prompts[long[0]].index}: with its completion {len(tokens[long[0]])} tokens, max_length={limit}")
    if long:
        logging.getLogger(__name__).warning("reward model %s: %d of %d texts were cut to %d tokens", path, len(long), len(tokens), limit)
    cut = slice(-limit, None) if limit and truncation == "keep_end" else slice(limit)
    return classify(classifier, [ids[cut] for ids in tokens], max_tokens)[:, label or 0].tolist()


sequence_classifier.per_node = True  # one process of each node loads the model and scores for all of them


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Completion, chat: bool | None) -> list[int]:
    """The tokens of prompt and completion as a `chat` in the model's template, or as plain text; None: as a chat where there is a template.

    A string is the only message of the user. Plain text has the tokenizer's special tokens around it.
    """
    written = as_written(prompt)
    if chat is None:
        chat = tokenizer.chat_template is not None
    if not chat:
        if not isinstance(written, str):
            raise ValueError(f"prompt row {prompt.index} is a conversation, but the reward model's tokenizer has no chat template, or chat=false")
        return tokenizer(written + completion.text, verbose=False)["input_ids"]
    messages = [{"role": "user", "content": written}] if isinstance(written, str) else list(written)
    text = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": completion.text}], tokenize=False)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
