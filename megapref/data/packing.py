"""Lays the rows of one optimizer step, pairs or single completions, out in packs, the same packs on every rank.

`pack` is a pure function of the step's rows: every data-parallel rank calls it with all of them and takes its own list.
All ranks get the same number of packs (empty ones top up), so that collectives stay in step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megapref.batch import PackedBatch, TokenCompletion, TokenPair


def pack(
    rows: Sequence[TokenPair] | Sequence[TokenCompletion],
    *,
    max_tokens: int,
    num_ranks: int = 1,
    share_prompt: bool = True,
    pad_multiple: int = 1,
    pack_multiple: int = 1,
    one_length: bool = False,
) -> list[list[PackedBatch]]:
    """The packs of every data-parallel rank, `[num_ranks][packs]`, equally many for each, a multiple of `pack_multiple`.

    A pack holds at most `max_tokens` tokens, padded to a multiple of `pad_multiple`, or with `one_length` to the largest that it may have;
    rows keep the step's order within a pack.
    With `share_prompt` a pair is `[prompt | first | second]` and the second side attends to the prompt as its prefix;
    without, it is `[prompt | first | prompt | second]`.
    ValueError: a pair that fits in no pack, a pair without prompt or first tokens, pairs with differing extras.
    """
    if max_tokens < pad_multiple:
        raise ValueError(f"pack.max_tokens={max_tokens} is less than {pad_multiple}, which packs are padded to a multiple of; raise it")
    capacity = max_tokens // pad_multiple * pad_multiple
    # A completion is laid out as a pair without a second side.
    unpaired = bool(rows) and isinstance(rows[0], TokenCompletion)
    pairs = [TokenPair(row.prompt_ids, row.ids, first_mask=row.mask, ref_logps=row.ref_logps) for row in rows] if unpaired else rows
    sizes = [pair_tokens(pair, share_prompt=share_prompt) for pair in pairs]
    _check(pairs, sizes, capacity)
    extra_keys = sorted(pairs[0].extras) if pairs else []

    def lay_out(group: list[int]) -> PackedBatch:
        batch = _lay_out([pairs[i] for i in group], extra_keys, share_prompt, capacity if one_length else pad_multiple)
        if not unpaired:
            return batch
        return replace(batch, cell_K=batch.cell_K // 2, preference_P=None, desirable_C=torch.tensor([rows[i].desirable for i in group]).bool())

    return [[lay_out(group) for group in groups] for groups in assign(sizes, capacity, num_ranks, pack_multiple)]


def assign(sizes: Sequence[int], capacity: int, num_ranks: int, pack_multiple: int = 1) -> list[list[list[int]]]:
    """The numbers of the rows in each pack of each rank, `[num_ranks][packs][rows]`, from the rows' sizes alone."""
    return _deal(_group(sizes, capacity, num_ranks * pack_multiple), sizes, num_ranks)


def pair_tokens(pair: TokenPair, *, share_prompt: bool = True) -> int:
    """The number of tokens that a pair takes in a pack."""
    prompt_copies = 1 if share_prompt or not len(pair.second_ids) else 2
    return prompt_copies * len(pair.prompt_ids) + len(pair.first_ids) + len(pair.second_ids)


def packing_stats(packs: Sequence[Sequence[PackedBatch]]) -> dict[str, float]:
    """Metrics of the packs of all ranks: real per computed token, mean per largest load, real tokens, share spared by sharing prompts."""
    computed = [sum(len(batch.token_ids_T) for batch in rank) for rank in packs]
    padding = sum(batch.num_padding for rank in packs for batch in rank)
    tokens = sum(computed) - padding
    shared = sum(int(batch.segments_S[:, 3].sum()) for rank in packs for batch in rank)
    return {
        "pack/efficiency": tokens / sum(computed),
        "pack/balance": sum(computed) / len(computed) / max(computed),
        "pack/tokens": float(tokens),
        "pack/tokens_saved": shared / max(1, tokens + shared),
    }


def _check(pairs: Sequence[TokenPair], sizes: list[int], capacity: int) -> None:
    for i, (pair, size) in enumerate(zip(pairs, sizes, strict=True)):
        if not len(pair.prompt_ids) or not len(pair.first_ids):
            side = "prompt" if not len(pair.prompt_ids) else "first completion"
            raise ValueError(f"pair {i} of the step has an empty {side}; a completion's first token is predicted by the prompt's last")
        if pair.extras.keys() != pairs[0].extras.keys():
            raise ValueError(f"pair {i} of the step has extras {sorted(pair.extras)}, pair 0 {sorted(pairs[0].extras)}; give all the same")
        if size > capacity:
            raise ValueError(
                f"a pair of {size} tokens (prompt {len(pair.prompt_ids)}, completions {len(pair.first_ids)} and {len(pair.second_ids)}) "
                f"is longer than pack.max_tokens={capacity}; raise it, or shorten with data.max_length or generation.max_new_tokens"
            )


def _group(sizes: Sequence[int], capacity: int, multiple: int) -> list[list[int]]:
    """Groups of pair numbers, a `multiple` of them: as few as first-fit decreasing needs, evenly filled where that fits."""
    largest_first = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    fitted = _first_fit(largest_first, sizes, capacity)
    num_packs = multiple * max(1, -(-len(fitted) // multiple))
    groups = _balanced(largest_first, sizes, capacity, num_packs)
    return groups or fitted + [[] for _ in range(num_packs - len(fitted))]


def _first_fit(order: list[int], sizes: Sequence[int], capacity: int) -> list[list[int]]:
    room = np.full(len(sizes), capacity)
    groups: list[list[int]] = []
    for i in order:
        k = int(np.argmax(room >= sizes[i]))
        if k == len(groups):
            groups.append([])
        groups[k].append(i)
        room[k] -= sizes[i]
    return groups


def _balanced(order: list[int], sizes: Sequence[int], capacity: int, num_packs: int) -> list[list[int]] | None:
    """Each pair into the least loaded pack; None where one does not fit."""
    load = np.zeros(num_packs, dtype=np.int64)
    groups: list[list[int]] = [[] for _ in range(num_packs)]
    for i in order:
        k = int(np.argmin(load))
        if load[k] + sizes[i] > capacity:
            return None
        groups[k].append(i)
        load[k] += sizes[i]
    return groups


def _deal(groups: list[list[int]], sizes: Sequence[int], num_ranks: int) -> list[list[list[int]]]:
    """Equally many groups to every rank: round by round the largest goes to the rank with the fewest tokens."""
    loads = [sum(sizes[i] for i in group) for group in groups]
    largest_first = sorted(range(len(groups)), key=lambda g: -loads[g])
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    total = [0] * num_ranks
    for start in range(0, len(groups), num_ranks):
        lightest_first = sorted(range(num_ranks), key=lambda r: total[r])
        for rank, g in zip(lightest_first, largest_first[start : start + num_ranks], strict=True):
            ranks[rank].append(sorted(groups[g]))
            total[rank] += loads[g]
    return ranks


def _lay_out(pairs: list[TokenPair], extra_keys: list[str], share_prompt: bool, pad_multiple: int) -> PackedBatch:
    # A piece is a run of tokens of one kind. A pair has four: prompt, first, prompt again, second; shared or unneeded ones are of length 0.
    pieces: list[Sequence[int]] = []
    for pair in pairs:
        again = () if share_prompt or not len(pair.second_ids) else pair.prompt_ids
        pieces += [pair.prompt_ids, pair.first_ids, again, pair.second_ids]
    length = np.array([len(piece) for piece in pieces], dtype=np.int64)
    start = np.cumsum(length) - length
    prompt, first, again, second = length.reshape(-1, 4).T
    prompt_at, _, again_at, second_at = start.reshape(-1, 4).T
    num_tokens = int(length.sum())
    num_padding = -num_tokens % pad_multiple or (0 if num_tokens else pad_multiple)

    tokens = np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces] + [np.zeros(num_padding, dtype=np.int64)])
    is_completion = np.tile([False, True], len(length) // 2)
    position_offset = np.stack([0 * prompt, prompt, 0 * prompt, prompt], axis=1).reshape(-1)
    positions = np.arange(num_tokens) + np.repeat(position_offset - start, length)
    target = np.flatnonzero(np.repeat(is_completion, length))
    # Token t is predicted at t - 1, but where the prompt is shared the second side's first token is predicted by the prompt's last.
    query = target - 1
    shared = (second > 0) & (again == 0)
    query[np.searchsorted(target, second_at[shared])] = prompt_at[shared] + prompt[shared] - 1
    trained = _trained(pairs)
    target, query, cell = target[trained], query[trained], np.repeat(np.arange(2 * len(pairs)), length.reshape(-1, 2)[:, 1])[trained]

    side_segments = [
        np.stack([prompt_at, prompt + first, prompt_at, 0 * prompt], axis=1),
        np.stack([again_at, again + second, np.where(shared, prompt_at, again_at), np.where(shared, prompt, 0)], axis=1),
    ]
    segments = np.stack(side_segments, axis=1).reshape(-1, 4)
    segments = np.concatenate([segments, [[num_tokens, num_padding, num_tokens, 0]]])
    return PackedBatch(
        token_ids_T=torch.from_numpy(tokens),
        position_ids_T=torch.from_numpy(np.concatenate([positions, np.zeros(num_padding, dtype=np.int64)])),
        segments_S=torch.from_numpy(segments[segments[:, 1] > 0]),
        query_index_K=torch.from_numpy(query),
        target_ids_K=torch.from_numpy(tokens[target]),
        cell_K=torch.from_numpy(cell),
        preference_P=torch.tensor([pair.preference for pair in pairs], dtype=torch.float32),
        num_padding=num_padding,
        ref_logps_K=_known_ref_logps(pairs, len(target)),
        extras={key: torch.tensor([pair.extras[key] for pair in pairs], dtype=torch.float32) for key in extra_keys},
    )


def _known_ref_logps(pairs: Sequence[TokenPair], num_trained: int) -> torch.Tensor | None:
    known = [np.asarray(pair.ref_logps, dtype=np.float32) for pair in pairs if pair.ref_logps is not None]
    if not known:
        return None
    assert len(known) == len(pairs), f"{len(pairs) - len(known)} of {len(pairs)} pairs of a pack have no log-probabilities of the reference"
    ref_logps_K = torch.from_numpy(np.concatenate(known))
    assert len(ref_logps_K) == num_trained, f"{len(ref_logps_K)} log-probabilities of the reference for {num_trained} trained tokens"
    return ref_logps_K


def _trained(pairs: Sequence[TokenPair]) -> np.ndarray:
    """[tokens of all completions] whether each is trained."""
    sides = [side for pair in pairs for side in ((pair.first_ids, pair.first_mask), (pair.second_ids, pair.second_mask))]
    masks = [np.ones(len(ids), dtype=bool) if mask is None else np.asarray(mask, dtype=bool) for ids, mask in sides]
    return np.concatenate([np.zeros(0, dtype=bool), *masks])
