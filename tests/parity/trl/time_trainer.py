"""Times whole training steps of TRL's DPOTrainer and of megapref on the same model and rows, one process and one thread a run.

TRL lives in an environment of its own, never in the product's (freeze_losses.py says how to make it). Inputs, then as many runs as wanted of
each side, in turns; every run adds a line of JSON to DIR/runs.jsonl, of which `table` takes medians:

    python tests/parity/trl/time_trainer.py inputs DIR
    trl_env/bin/python tests/parity/trl/time_trainer.py trl DIR --micro-batch 2
    python tests/parity/trl/time_trainer.py megapref DIR
    python tests/parity/trl/time_trainer.py table DIR

Both make the same optimizer steps on the same pairs in the same order; megapref's is a whole run of the recipe `dpo` from text. With
`--reference precomputed` the reference's log-probabilities are ready before the clock starts: by TRL's `precompute_ref_log_probs`, by our
`reference.mode=cached`.
Memory is the most resident memory while training, less what the process held with its models loaded and nothing else. TRL's rows are token ids.

A busy machine only ever adds to a step's CPU seconds, so `table` takes the least of each step over the runs.
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[3]
BETA, LR, CLIP_GRAD = 0.1, 1e-5, 1.0


class Meter:
    """CPU seconds of every step, and the memory added since it was made."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")  # resident memory becomes its own peak
        self._base, self.steps = resident("VmRSS"), []

    def start(self) -> None:
        self._started = time.process_time()

    def stop(self) -> None:
        self.steps.append(time.process_time() - self._started)
        self.added_bytes = resident("VmHWM") - self._base


def resident(field: str) -> int:
    """Bytes of resident memory, now (VmRSS) or at its peak (VmHWM)."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def make_inputs(options: argparse.Namespace) -> None:
    """The random model and the synthetic pairs of tools/benchmark.py, as a text of words "w17" that a tokenizer gives back token for token."""
    sys.path.append(str(ROOT / "tools"))
    from benchmark_inputs import make_model, synthetic_pairs
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    options.folder.mkdir(parents=True, exist_ok=True)
    make_model(options.folder / "model", 6, 256)
    special = ["<unknown>", "<pad>", "<end>"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(3, 8192))])}, unk_token=special[0]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    # In a folder of its own: in one of a qwen2 model transformers splits words as Qwen2 does, whatever the tokenizer says.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=special[1], eos_token=special[2])
    tokenizer.save_pretrained(options.folder / "tokenizer")
    pairs = synthetic_pairs(options.pairs, 8192, 0)
    spoken = lambda ids: "".join(f" w{i}" for i in ids)  # noqa: E731
    texts = [{"prompt": spoken(p.prompt_ids), "chosen": spoken(p.first_ids), "rejected": spoken(p.second_ids)} for p in pairs]
    assert all(tokenizer(text["prompt"])["input_ids"] == list(pair.prompt_ids) for text, pair in zip(texts, pairs, strict=True))
    (options.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    # A completion is trained with the end of text behind it.
    rows = [{"prompt_ids": p.prompt_ids, "chosen_ids": [*p.first_ids, 2], "rejected_ids": [*p.second_ids, 2]} for p in pairs]
    (options.folder / "rows.json").write_text(json.dumps(rows))


def read_rows(options: argparse.Namespace) -> list[dict]:
    return json.loads((options.folder / "rows.json").read_text())[: options.batch * (options.warmup + options.steps)]


def time_trl(options: argparse.Namespace) -> tuple[Meter, list]:
    from freeze_trace import token_trainer
    from transformers import TrainerCallback

    precomputed = options.reference == "precomputed"
    split = {"per_device_train_batch_size": options.micro_batch, "gradient_accumulation_steps": options.batch // options.micro_batch}
    adam = {"learning_rate": LR, "lr_scheduler_type": "constant", "max_grad_norm": CLIP_GRAD, "weight_decay": 0.0}
    run = {"beta": BETA, "max_steps": options.warmup + options.steps, "precompute_ref_log_probs": precomputed}
    with tempfile.TemporaryDirectory() as output:
        trainer = token_trainer(str(options.folder / "model"), read_rows(options), output, **split, **adam, **run)
        meter = Meter()

        class Clock(TrainerCallback):
            def on_step_begin(self, *_, **__):
                meter.start()

            def on_step_end(self, *_, **__):
                meter.stop()

        trainer.add_callback(Clock())
        trainer.train()
    return meter, [(logs["loss"], logs["grad_norm"]) for logs in trainer.state.log_history if "loss" in logs]


def time_megapref(options: argparse.Namespace) -> tuple[Meter, list]:
    """A run of the recipe `dpo` as launchers/train.py makes it, with a clock around its steps; the cache is filled by the first run."""
    from unittest.mock import patch

    from megapref import build, train
    from megapref.config import load

    meters = []

    def wrap_for_training(chunks):  # the models are loaded, and nothing else
        meters.append(Meter())
        return wrapped(chunks)

    def step(*args):
        meters[0].start()
        metrics = one_step(*args)
        meters[0].stop()
        return metrics

    wrapped, one_step = build.wrap_for_training, train.step
    reference = {"reference.mode": "resident"}
    if options.reference == "precomputed":
        reference = {"reference.mode": "cached", "reference.cache": options.folder / "reference_cache"}
    with tempfile.TemporaryDirectory() as output:
        given = {
            "run.dir": f"{output}/run",
            "model.path": options.folder / "model",
            "model.tokenizer": options.folder / "tokenizer",
            "data.train": f"[{{path: {options.folder / 'rows.jsonl'}}}]",
            "data.shuffle": "false",
            "train.steps": options.warmup + options.steps,
            "train.global_batch_size": options.batch,
            "pack.max_tokens": options.max_tokens,
            "loss.params.beta": BETA,
            "optimizer": f"{{lr: {LR}, schedule: constant, warmup_steps: 0, clip_grad: {CLIP_GRAD}}}",
            "save.export": "false",
        } | reference
        cfg = load("dpo", [*(f"{key}={value}" for key, value in given.items()), "~data.validation"], None, world_size=1)
        with patch.object(build, "wrap_for_training", wrap_for_training), patch.object(train, "step", step):
            train.main(cfg)
        logged = [json.loads(line) for line in Path(output, "run", "metrics.jsonl").read_text().splitlines()]
    return meters[0], [(record["loss"], record["grad_norm"]) for record in logged]


def show_table(options: argparse.Namespace) -> None:
    """Each side's speed and memory, having checked that all runs of the same batch made the same steps."""
    runs, first = defaultdict(list), {}
    for line in (options.folder / "runs.jsonl").read_text().splitlines():
        run = json.loads(line)
        expected = first.setdefault(run["batch"], run["outcomes"])
        steps = zip(expected, run["outcomes"], strict=False)
        assert all(math.isclose(*both, rel_tol=1e-3) for step in steps for both in zip(*step, strict=True)), f"not the steps of the first run: {line}"
        runs[run["reference"], run["batch"], run["side"], run["part"]].append(run)
    for (reference, batch, side, part), same in sorted(runs.items()):
        of_runs = [batch * len(run["cpu_seconds"]) / sum(run["cpu_seconds"]) for run in same]
        least = [min(step) for step in zip(*(run["cpu_seconds"] for run in same), strict=True)]
        speed = f"{batch * len(least) / sum(least):.2f} pairs per CPU second (single runs {min(of_runs):.2f} to {max(of_runs):.2f})"
        added = median(run["added_bytes"] for run in same) / 2**20
        print(f"{reference} reference, batch {batch}, {side}, {part}: {speed}, {added:,.0f} MiB added, {len(same)} runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=("inputs", "trl", "megapref", "table"))
    add("folder", type=Path, metavar="DIR")
    add("--pairs", type=int, default=1024, help="of the inputs")
    add("--batch", type=int, default=8, help="pairs an optimizer step")
    add("--micro-batch", type=int, default=8, help="pairs a forward pass of TRL, padded to the longest of them")
    add("--max-tokens", type=int, default=4096, help="of a pack of megapref")
    add("--reference", choices=("live", "precomputed"), default="live")
    add("--steps", type=int, default=8, help="that count")
    add("--warmup", type=int, default=1, help="steps before them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what in ("inputs", "table"):
        return (make_inputs if options.what == "inputs" else show_table)(options)
    meter, outcomes = (time_trl if options.what == "trl" else time_megapref)(options)
    part = f"{options.micro_batch} pairs padded" if options.what == "trl" else f"packs of {options.max_tokens}"
    run = {"side": options.what, "part": part, "reference": options.reference, "batch": options.batch}
    run |= {"cpu_seconds": meter.steps[options.warmup :], "added_bytes": meter.added_bytes, "load": os.getloadavg()[0], "outcomes": outcomes}
    with (options.folder / "runs.jsonl").open("a") as log:
        log.write(json.dumps(run) + "\n")
    return None


if __name__ == "__main__":
    main()
