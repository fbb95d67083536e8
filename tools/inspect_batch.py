"""Shows what the model will see: how rows became tokens, which were dropped and why, and how a step's pairs lie in packs.

    python tools/inspect_batch.py --config-name dpo
    python tools/inspect_batch.py --config-name dpo data.train='[{path: mine.jsonl}]' --step 3 --packs 2

Takes the recipe and overrides that training takes, and loads no weights. Bad rows are always skipped here, so that all of them are listed.
In packs the prompt is blue, what is trained of the chosen side green, of the rejected red; what is not trained of them stands in ‹ › and is dim.
A loss of single completions (loss=kto) shows those: desirable ones green, undesirable ones red.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from megapref.batch import PackedBatch, Prompt, TokenCompletion, TokenPair
from megapref.config import Config, load
from megapref.data.chat import load_tokenizer
from megapref.data.mixture import Rows, step_rows
from megapref.data.offline import load_pairs, pair_options
from megapref.data.packing import pack, packing_stats
from megapref.data.prompts import load_prompts, prompt_options
from megapref.data.rows import BadRow
from megapref.losses.combined import is_of_completions
from megapref.methods import load_losses

SIDES = (("chosen", "green"), ("rejected", "red"))
LABELS = (("desirable", "green"), ("undesirable", "red"))
KINDS = {Prompt: "prompts", TokenPair: "pairs", TokenCompletion: "completions"}
EXAMPLES = 3  # of dropped rows of each kind, and of prompts
BARS = 10


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console(highlight=False)
    try:
        cfg = load(options.config_name, options.overrides, options.config_dir, world_size=None)
        tokenizer = load_tokenizer(cfg.model.tokenizer or cfg.model.path, cfg.model.chat_template)
        dropped: list[BadRow] = []
        rows, counts = load_rows(cfg, tokenizer, dropped)
        show_rows(console, cfg, rows, counts, dropped)
        order = {"global_batch_size": cfg.train.global_batch_size, "seed": cfg.run.seed, "shuffle": cfg.data.shuffle}
        batch = [rows[i] for i in step_rows(rows.sizes, rows.weights, step=options.step, **order)]
        if cfg.method.pairs == "online":
            show_prompts(console, batch, options.step)
        else:
            show_packs(console, cfg, tokenizer, batch, options)
    except ValueError as error:
        print(f"inspect_batch: {error}", file=sys.stderr)
        return 2
    return 0


def load_rows(cfg: Config, tokenizer: PreTrainedTokenizerBase, dropped: list[BadRow]) -> tuple[Rows, dict[str, int]]:
    """The rows that training would have with bad rows and ties skipped, and what was counted; `dropped` gets the reasons."""
    cfg = replace(cfg, data=replace(cfg.data, on_bad_row="skip", ties="skip"))
    pack_tokens = cfg.pack.max_tokens // cfg.pad_multiple * cfg.pad_multiple
    if cfg.method.pairs == "online":
        return load_prompts(cfg.data.train, tokenizer, **prompt_options(cfg, pack_tokens, cfg.data.max_length), dropped=dropped)
    unpaired = is_of_completions(load_losses(cfg.loss)[0])
    return load_pairs(cfg.data.train, tokenizer, **pair_options(cfg, pack_tokens), unpaired=unpaired, dropped=dropped)


def show_rows(console: Console, cfg: Config, rows: Rows, counts: dict[str, int], dropped: list[BadRow]) -> None:
    """Prints what the sources gave, what was left out of them and why, and how long the rows are."""
    kind = KINDS[type(rows[0])]
    table = Table("source", kind, "weight", title=f"Sources: {len(rows)} {kind}", title_justify="left", box=box.SIMPLE_HEAD)
    for source, size in zip(cfg.data.train, rows.sizes, strict=True):
        table.add_row(Text(source.path), str(size), "-" if source.weight is None else f"{source.weight:g}")
    console.print(table)
    counted = ", ".join(f"{number} {name.removeprefix('data/').replace('_rows', '')}" for name, number in counts.items())
    console.print(f"Rows: {counted}")
    for name, errors in groupby(sorted(dropped, key=lambda error: type(error).__name__), key=lambda error: type(error).__name__):
        listed = list(errors)
        console.print(f"  {name}: {len(listed)}, of which the first:", style="yellow")
        for error in listed[:EXAMPLES]:
            console.print(Padding(Text(str(error)), (0, 0, 0, 4)))
    stops = [key for key, value in (("data.on_bad_row", cfg.data.on_bad_row), ("data.ties", cfg.data.ties)) if value == "error"]
    if any(type(error).__name__ in ("BadRow", "Tie") for error in dropped) and stops:
        console.print(f"  Training stops at such a row: {'=error, '.join(stops)}=error.", style="yellow")
    for label, lengths in lengths_of(rows).items():
        console.print(f"\nTokens of {label}: mean {sum(lengths) / len(lengths):.1f}, longest {max(lengths)}")
        for line in histogram(lengths):
            console.print(Text(f"  {line}"))


def lengths_of(rows: Sequence[Prompt | TokenPair | TokenCompletion]) -> dict[str, list[int]]:
    """Tokens of the prompts, and of each side of pairs, or completions of each label, where there is one."""
    if isinstance(rows[0], Prompt):
        return {"prompts": [len(prompt.ids) for prompt in rows]}
    prompts = [len(row.prompt_ids) for row in rows]
    if isinstance(rows[0], TokenCompletion):
        by_label = {name: [len(row.ids) for row in rows if row.desirable == good] for (name, _), good in zip(LABELS, (True, False), strict=True)}
        return {"prompts": prompts} | {f"{name} completions": values for name, values in by_label.items() if values}
    lengths = {
        "prompts": prompts,
        "chosen": [len(pair.first_ids) for pair in rows],
        "rejected": [len(pair.second_ids) for pair in rows if len(pair.second_ids)],
    }
    return {label: values for label, values in lengths.items() if values}


def histogram(lengths: Sequence[int], bars: int = BARS, width: int = 40) -> list[str]:
    """Lines `from - to  bar  count` of `bars` equal ranges from the shortest to the longest."""
    low, high = min(lengths), max(lengths)
    step = max(1, -(-(high - low + 1) // bars))
    counts = [0] * ((high - low) // step + 1)
    for length in lengths:
        counts[(length - low) // step] += 1
    digits = len(str(high))
    return [
        f"{low + i * step:>{digits}} - {min(high, low + (i + 1) * step - 1):<{digits}}  {'█' * -(-count * width // max(counts)):<{width}} {count}"
        for i, count in enumerate(counts)
    ]


def show_prompts(console: Console, prompts: list[Prompt], step: int) -> None:
    """Prints the first prompts of a step; their completions are sampled in training."""
    console.print(f"\nStep {step}: {len(prompts)} prompts, of which the first", style="bold")
    for prompt in prompts[:EXAMPLES]:
        console.print(Text.assemble((f"  {len(prompt.ids):>5} tokens  ", "dim"), (_visible(prompt.text), "blue")))


def show_packs(
    console: Console, cfg: Config, tokenizer: PreTrainedTokenizerBase, rows: list[TokenPair] | list[TokenCompletion], options: argparse.Namespace
) -> None:
    """Prints the packs of a step, as one data-parallel rank has them."""
    packs = pack(
        rows,
        max_tokens=cfg.pack.max_tokens,
        share_prompt=cfg.pack.share_prompt,
        pad_multiple=cfg.pad_multiple,
        pack_multiple=cfg.parallel.pack_multiple,
        one_length=cfg.parallel.tp_comm_overlap,
    )
    stats, kind = packing_stats(packs), KINDS[type(rows[0])]
    saved = f", {stats['pack/tokens_saved']:.1%} of the tokens saved by sharing prompts" if kind == "pairs" else ""
    heading = f"\nStep {options.step}: {kind} {len(rows)}, packs {len(packs[0])}, efficiency {stats['pack/efficiency']:.3f}{saved}"
    console.print(heading, style="bold")
    for number, batch in enumerate(packs[0][: options.packs]):
        tokens = f"{len(batch.token_ids_T)} tokens, {batch.num_padding} of them padding, {len(batch.target_ids_K)} trained"
        console.print(f"\nPack {number}: {batch.num_rows} {kind}, {tokens}", style="bold")
        for row, runs in groupby(runs_of(batch), key=lambda run: run.row):
            extras = "".join(f", {name} {values[row]:g}" for name, values in sorted(batch.extras.items()))
            what = f"completion {row}" if batch.preference_P is None else f"pair {row}: preference {batch.preference_P[row]:g}"
            console.print(f" {what}{extras}", style="bold")
            for run in runs:
                _show_run(console, tokenizer, batch, run)


@dataclass(frozen=True)
class Run:
    """Tokens `start` to before `end` of a pack, of one row and kind; `side` None is the prompt, `prefix` the tokens they attend to besides.

    A completion that is no side of a pair is side 0 if it is desirable, 1 if not.
    """

    row: int
    side: int | None
    is_trained: bool
    start: int
    end: int
    prefix: tuple[int, int] | None


def runs_of(batch: PackedBatch) -> Iterator[Run]:
    """The runs of a pack in their order, read from what the model gets: the segments, and from where which token is predicted."""
    segments = batch.segments_S.tolist()
    cell_K = batch.cell_K if batch.desirable_C is None else 2 * batch.cell_K + ~batch.desirable_C[batch.cell_K]
    # A side that shares its prompt is predicted from the prompt's end on, all others from the token before.
    first_of = {prefix + length - 1: start for start, _, prefix, length in segments if length}
    shared_length = {prefix: length for _, _, prefix, length in segments if length}
    predicted = zip(batch.query_index_K.tolist(), cell_K.tolist(), strict=True)
    cell_of = {first_of[query] if cell % 2 and query in first_of else query + 1: cell for query, cell in predicted}
    for start, length, prefix, prefix_length in segments:
        cells = [cell_of.get(index) for index in range(start, start + length)]
        cell = next((cell for cell in cells if cell is not None), None)
        if cell is None:
            continue  # padding
        # A prompt that is shared is as long as the other side says; one that is not ends where training begins.
        border = 0 if prefix_length else shared_length.get(start, cells.index(cell))
        attended = (prefix, prefix + prefix_length) if prefix_length else None
        if border:
            yield Run(cell // 2, None, False, start, start + border, attended)
        at = start + border
        for is_trained, group in groupby(cells[border:], key=lambda cell: cell is not None):
            end = at + len(list(group))
            yield Run(cell // 2, cell % 2, is_trained, at, end, attended)
            at = end


def _show_run(console: Console, tokenizer: PreTrainedTokenizerBase, batch: PackedBatch, run: Run) -> None:
    sides = SIDES if batch.desirable_C is None else LABELS
    name, style = ("prompt", "blue") if run.side is None else sides[run.side]
    text = _visible(tokenizer.decode(batch.token_ids_T[run.start : run.end]))
    if run.side is not None and not run.is_trained:
        text, style = f"‹{text}›", "dim"
    positions = batch.position_ids_T[run.start : run.end]
    where = f"tokens {run.start}-{run.end - 1}, positions {positions[0]}-{positions[-1]}"
    prefix = f", attends to {run.prefix[0]}-{run.prefix[1] - 1}" if run.prefix else ""
    what = "trained" if run.is_trained else "not trained"
    console.print(Text.assemble((f"  {name:<12}", style), (f"{where}{prefix}, {what}", "dim")))
    console.print(Padding(Text(text, style), (0, 0, 0, 14)))


def _visible(text: str) -> str:
    """The text on one line, with marks for what cannot be seen."""
    return "".join({"\n": "⏎", "\t": "→"}.get(letter, letter if letter.isprintable() else "�") for letter in text)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", required=True, metavar="RECIPE")
    parser.add_argument("--config-dir", metavar="DIR", help="more recipes and groups, your own")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="which step's pairs; the first is 0")
    parser.add_argument("--packs", type=int, default=1, metavar="K", help="how many packs to print")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args(arguments)
    for name, least in (("step", 0), ("packs", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name}={getattr(options, name)} must be at least {least}")
    return options


if __name__ == "__main__":
    sys.exit(main())
