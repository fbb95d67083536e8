"""Stop strings: a completion ends with the token that completes the first of them in its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase


def ends_with_stop(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
    """A function that says whether the last of a completion's token ids brings a stop string into its text; None where there are none.

    The text has special tokens by their names. To be asked after every token: it reads as many of the last ones as a stop string can be made of,
    as each gives at least a byte, and one more, because a SentencePiece tokenizer drops the space before a text.
    """
    if not stop:
        return None
    longest = max(len(text.encode()) for text in stop) + 1

    def ends(ids: Sequence[int]) -> bool:
        text = tokenizer.decode(ids[-longest:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(one in text for one in stop)

    return ends
