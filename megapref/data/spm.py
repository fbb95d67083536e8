"""Makes a tokenizer that knows where its tokens lie in the text from a SentencePiece `.model` file, which by itself does not say."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
UNIGRAM, BPE = 1, 2  # its kinds of model
CONTROL, USER_DEFINED = 3, 4  # its kinds of pieces


def from_sentencepiece(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a SentencePiece model, unigram or BPE, as transformers reads Llama's: BOS in front where the model has one.

    Its control and user-defined pieces are found in the text. A text that begins with a space gets no second one in front.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise ValueError(f"model.tokenizer={file}: is not a SentencePiece model ({error}); give a folder or a .model file") from error
    trainer = proto.trainer_spec
    if trainer.model_type not in (UNIGRAM, BPE) or not proto.pieces:
        raise ValueError(f"model.tokenizer={file}: is not a SentencePiece model of type unigram or BPE; train one of these")
    tokenizer = tokenizers.Tokenizer(_unigram(proto) if trainer.model_type == UNIGRAM else _bpe(proto))
    _add_text_rules(tokenizer, proto.normalizer_spec)
    added = [piece for piece in proto.pieces if piece.type in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([tokenizers.AddedToken(p.piece, normalized=False, special=p.type == CONTROL) for p in added])

    def piece(number: int) -> str | None:
        return proto.pieces[number].piece if 0 <= number < len(proto.pieces) else None

    bos = piece(trainer.bos_id)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, trainer.bos_id)])
    unk, eos, pad = piece(trainer.unk_id), piece(trainer.eos_id), piece(trainer.pad_id)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token=unk, pad_token=pad, name_or_path=str(file)
    )


def _unigram(proto) -> models.Model:
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    return models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback)


def _bpe(proto) -> models.Model:
    """SentencePiece joins the two neighbours whose joint piece has the highest score; a list of merges says the same."""
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    merges = []
    for piece in sorted(proto.pieces, key=lambda piece: -piece.score):
        halves = ((piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece)))
        merges += [(left, right) for left, right in halves if left in vocab and right in vocab]
    unk = proto.pieces[proto.trainer_spec.unk_id].piece
    return models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback)


def _add_text_rules(tokenizer: tokenizers.Tokenizer, spec) -> None:
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        # The space in front is the one that the dummy prefix would put there.
        steps += [normalizers.Strip(left=not spec.add_dummy_prefix), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "first" if spec.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
