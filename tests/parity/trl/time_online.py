"""Times whole online DPO steps of TRL's OnlineDPOTrainer and of megapref on the same model and prompts, one process and one thread a run.

TRL lives in an environment of its own, as for time_trainer.py. As many runs as wanted of each side, in turns; every run adds a line of JSON to
DIR/online.jsonl, of which `table` takes medians:

    python tests/parity/trl/time_online.py inputs DIR
    trl_env/bin/python tests/parity/trl/time_online.py trl DIR
    python tests/parity/trl/time_online.py megapref DIR
    python tests/parity/trl/time_online.py table DIR

A step is: prompts from text, two samples of each at temperature 1, a reward, DPO on the better and the worse, AdamW. Both sides sample from one
distribution with numbers of their own, so single steps differ and means over steps are compared. `--model demo` is the embedded model, which ends its
answers; `random` is time_trainer.py's larger one, which hardly ever does: all its samples have the full length.
"""

import argparse
import json
import os
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from time_trainer import CLIP_GRAD, LR, ROOT, Meter, make_inputs

BETA = 0.1


def model_and_prompts(options: argparse.Namespace) -> tuple[Path, Path, Path]:
    """The folders of model and tokenizer, and the rows with the prompts."""
    if options.model == "random":
        return options.folder / "model", options.folder / "tokenizer", options.folder / "rows.jsonl"
    demo = ROOT / "assets" / "demo"
    return demo / "model", demo / "model", demo / "prompts_train.jsonl"


def variety(text: str) -> float:
    """A reward that costs nothing: the share of different words."""
    words = text.split()
    return len(set(words)) / max(len(words), 1)


def reward(prompts, completions) -> list[float]:
    return [variety(completion.text) for completion in completions]


def time_trl(options: argparse.Namespace) -> tuple[Meter, list[float]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    folder, tokenizer, rows = model_and_prompts(options)
    number = options.batch * (options.warmup + options.steps)
    prompts = [{"prompt": json.loads(line)["prompt"]} for line in rows.read_text().splitlines()[:number]]
    split = {"per_device_train_batch_size": options.micro_batch, "gradient_accumulation_steps": options.batch // options.micro_batch}
    adam = {"learning_rate": LR, "lr_scheduler_type": "constant", "max_grad_norm": CLIP_GRAD, "weight_decay": 0.0}
    sampling = {"max_new_tokens": options.new_tokens, "temperature": 1.0, "top_k": 0, "max_length": 1024}
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as output:
        run = {"beta": BETA, "max_steps": options.warmup + options.steps, "logging_steps": 1, "disable_dropout": True}
        args = OnlineDPOConfig(output, **split, **adam, **sampling, **plain, **run)
        policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
        trainer = OnlineDPOTrainer(
            policy,
            reference,
            reward_funcs=lambda prompts, completions, **_: [variety(text) for text in completions],
            args=args,
            train_dataset=Dataset.from_list(prompts),
            processing_class=AutoTokenizer.from_pretrained(tokenizer),
        )
        meter, tokens = Meter(), []
        generate = trainer._generate

        def counting(*args, **kwargs):
            made = generate(*args, **kwargs)
            tokens.append(int(made[3].sum()))  # the completions' mask
            return made

        trainer._generate = counting

        class Clock(TrainerCallback):
            def on_step_begin(self, *_, **__):
                meter.start()

            def on_step_end(self, *_, **__):
                meter.stop()

        trainer.add_callback(Clock())
        trainer.train()
    parts = options.batch // options.micro_batch
    return meter, [sum(tokens[i : i + parts]) for i in range(0, len(tokens), parts)]


def time_megapref(options: argparse.Namespace) -> tuple[Meter, list[float]]:
    """A run of the recipe `online_dpo` as launchers/train.py makes it; a step's clock starts before it samples."""
    from dataclasses import replace
    from unittest.mock import patch

    from megapref import build, train
    from megapref.config import load

    folder, tokenizer, rows = model_and_prompts(options)
    meters = []

    def wrap_for_training(chunks):  # the models are loaded, and nothing else
        meters.append(Meter())
        return wrapped(chunks)

    def build_run(*args):
        run = built(*args)

        def timed():
            while True:
                meters[0].start()
                yield next(run.source)

        return replace(run, source=timed())

    def step(*args):
        metrics = one_step(*args)
        meters[0].stop()
        return metrics

    wrapped, one_step, built = build.wrap_for_training, train.step, train.build
    with tempfile.TemporaryDirectory() as output:
        given = {
            "run.dir": f"{output}/run",
            "model.path": folder,
            "model.tokenizer": tokenizer,
            "data.train": f"[{{path: {rows}}}]",
            "reward": "null",
            "+reward.variety.function": "time_online:reward",
            "method.ties": "first",
            "train.steps": options.warmup + options.steps,
            "train.global_batch_size": options.batch,
            "pack.max_tokens": options.max_tokens,
            "generation.max_new_tokens": options.new_tokens,
            "loss.params.beta": BETA,
            "optimizer": f"{{lr: {LR}, schedule: constant, warmup_steps: 0, clip_grad: {CLIP_GRAD}}}",
            "save.export": "false",
            "log.tensorboard": "false",
        }
        cfg = load("online_dpo", [*(f"{key}={value}" for key, value in given.items()), "~data.validation"], None, world_size=1)
        patched = patch.object(train, "step", step), patch.object(train, "build", build_run)
        with patch.object(build, "wrap_for_training", wrap_for_training), patched[0], patched[1]:
            train.main(cfg)
        logged = [json.loads(line) for line in Path(output, "run", "metrics.jsonl").read_text().splitlines()]
    return meters[0], [record["generation/tokens"] for record in logged if record["step"]]


def show_table(options: argparse.Namespace) -> None:
    """Each side's prompts and sampled tokens per CPU second, a median over its runs, and the memory that a run added."""
    runs = defaultdict(list)
    for line in (options.folder / "online.jsonl").read_text().splitlines():
        run = json.loads(line)
        runs[run["model"], run["batch"], run["new_tokens"], run["side"], run["part"]].append(run)
    for (model, batch, new_tokens, side, part), same in sorted(runs.items()):
        speeds = sorted(batch * len(run["cpu_seconds"]) / sum(run["cpu_seconds"]) for run in same)
        tokens = median(sum(run["tokens"]) / sum(run["cpu_seconds"]) for run in same)
        length = median(sum(run["tokens"]) / (2 * batch * len(run["tokens"])) for run in same)
        added = median(run["added_bytes"] for run in same) / 2**20
        print(
            f"{model}, batch {batch}, up to {new_tokens} tokens (mean {length:.0f}), {side}, {part}: {median(speeds):.2f} prompts per CPU second "
            f"({speeds[0]:.2f} to {speeds[-1]:.2f}), {tokens:,.0f} sampled tokens per CPU second, {added:,.0f} MiB added, {len(same)} runs"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=("inputs", "trl", "megapref", "table"))
    add("folder", type=Path, metavar="DIR")
    add("--model", choices=("demo", "random"), default="demo")
    add("--batch", type=int, default=32, help="prompts an optimizer step")
    add("--micro-batch", type=int, default=32, help="prompts a pass of TRL, padded to the longest of them")
    add("--new-tokens", type=int, default=64, help="the most of a completion")
    add("--max-tokens", type=int, default=4096, help="of a pack of megapref")
    add("--steps", type=int, default=3, help="that count")
    add("--warmup", type=int, default=1, help="steps before them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what in ("inputs", "table"):
        options.pairs = 512
        return (make_inputs if options.what == "inputs" else show_table)(options)
    meter, tokens = (time_trl if options.what == "trl" else time_megapref)(options)
    part = f"{options.micro_batch} prompts padded" if options.what == "trl" else f"packs of {options.max_tokens}"
    run = {"side": options.what, "part": part, "model": options.model, "batch": options.batch, "new_tokens": options.new_tokens}
    run |= {"cpu_seconds": meter.steps[options.warmup :], "tokens": tokens[options.warmup :], "added_bytes": meter.added_bytes}
    with (options.folder / "online.jsonl").open("a") as log:
        log.write(json.dumps(run | {"load": os.getloadavg()[0]}) + "\n")
    return None


if __name__ == "__main__":
    main()
