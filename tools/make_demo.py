"""Makes assets/demo: the text data, the tokenizer and the tiny Qwen2-type language model of the default job. Same seed, same files.

    tools/make_demo.py data     the text data, the tokenizer and the random initial model (seconds)
    tools/make_demo.py model    trains the initial model by the sft recipe and puts the result in assets/demo/model (minutes)
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from demo_text import Subject, answer, question, subjects
from make_model import row_texts, write_model

from megapref.batch import Completion, Prompt
from megapref.online.rewards import sentiment

ROOT = Path(__file__).resolve().parents[1]
NUM_ROWS = {"sft": (8000, 200), "preference": (600, 100), "prompts": (400, 64)}  # (train, validation)
# From random weights: a larger step and more of them than the recipe's, which starts from a trained model. Four times over the rows.
SFT_OVERRIDES = ["train.steps=1000", "optimizer.lr=3e-3", "optimizer.betas=[0.9,0.95]", "optimizer.warmup_steps=20"]
# A dialogue of one question and one answer renders as the plain rows do: the answer follows the question after one space.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ message['content'] | trim }}{% endif %}{% endfor %}"
)


def main() -> None:
    """Runs one of the two parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["data", "model"])
    parser.add_argument("--out", type=Path, default=ROOT / "assets/demo", help="where the data and the model go")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/make_demo", help="where the initial model and the sft run go")
    parser.add_argument("--seed", type=int, default=0)
    options, overrides = parser.parse_known_args()
    if options.part == "data" and overrides:
        parser.error(f"unknown arguments {overrides}; overrides of the sft recipe go with the part 'model'")
    if options.part == "data":
        write_data(options.out, options.seed)
        write_initial_model(options.out, options.work / "initial", options.seed)
    else:
        train_model(options.out, options.work, options.seed, overrides)


def write_data(folder: Path, seed: int) -> None:
    """Writes the six JSONL files; the validation files ask about subjects that no training row mentions."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, known in enumerate(subjects()):
        name = ("train", "validation")[split]
        rng = random.Random(f"{seed} {name}")
        write_jsonl(folder / f"sft_{name}.jsonl", (sft_row(rng, known) for _ in range(NUM_ROWS["sft"][split])))
        prompts: dict[str, None] = {}
        while len(prompts) < NUM_ROWS["prompts"][split]:
            prompts[question(rng, rng.choice(known))] = None
        write_jsonl(folder / f"prompts_{name}.jsonl", ({"prompt": prompt} for prompt in prompts))
        # Last, because how many answers it draws depends on the reward.
        write_jsonl(folder / f"preference_{name}.jsonl", (preference_row(rng, known) for _ in range(NUM_ROWS["preference"][split])))


def sft_row(rng: random.Random, known: list[Subject]) -> dict[str, str]:
    """A question and an answer, which starts with the space that parts it from the question."""
    subject = rng.choice(known)
    return {"prompt": question(rng, subject), "completion": " " + answer(rng, subject)}


def preference_row(rng: random.Random, known: list[Subject]) -> dict[str, str]:
    """A question with a kinder and a less kind answer."""
    subject = rng.choice(known)
    prompt = Prompt([], question(rng, subject), {}, 0)
    while True:
        answers = [Completion([], " " + answer(rng, subject), finished=True) for _ in range(2)]
        (first, first_score), (second, second_score) = zip(answers, sentiment([prompt] * 2, answers), strict=True)
        if first_score != second_score:
            chosen, rejected = (first, second) if first_score > second_score else (second, first)
            return {"prompt": prompt.text, "chosen": chosen.text, "rejected": rejected.text}


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_initial_model(data: Path, folder: Path, seed: int) -> None:
    """Writes a byte-level BPE tokenizer trained on the sft rows, and a Qwen2 model of about one million random weights."""
    texts = row_texts(data / "sft_train.jsonl")
    write_model(folder, texts, vocab=1536, layers=4, hidden=128, positions=512, seed=seed, chat_template=CHAT_TEMPLATE)


def train_model(data: Path, work: Path, seed: int, overrides: list[str]) -> None:
    """Trains the initial model by the sft recipe on one process and copies its Hugging Face export to the data's folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(ROOT / "launchers/train.py")]
    command += ["--config-name", "sft", f"run.dir={work / 'sft'}", f"run.seed={seed}", f"model.path={work / 'initial'}"]
    command += [f"data.train=[{{path: {data / 'sft_train.jsonl'}}}]"]
    command += [f"data.validation.demo.path={data / 'sft_validation.jsonl'}", *SFT_OVERRIDES, *overrides]
    subprocess.run(command, check=True)
    shutil.copytree(work / "sft/hf", data / "model", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
