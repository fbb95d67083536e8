"""A judge within the run: its probabilities against transformers' next-token probabilities, at every layout, and in whole runs."""

import pytest
import torch
from distributed_run import run_distributed
from tiny_models import make_checkpoint
from tiny_runs import make_inputs, metrics_of, options, run_training
from tiny_tokenizers import CHATML, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from megapref.batch import Completion, Prompt

TEXTS = [("a cat sat", "two dogs ran to the house"), ("hello", "good morning"), ("same", "same"), ("", "three")]
LAYOUTS = {"one": {}, "tp2": {"tensor": 2}, "tp2sp": {"tensor": 2, "sequence": True}, "pp2": {"pipeline": 2}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    paths = make_inputs(folder / "run")
    save_tokenizer(folder / "judge", chat_template=CHATML)
    make_checkpoint(folder / "judge", "llama", seed=5, vocab_size=len(AutoTokenizer.from_pretrained(folder / "judge")))
    (folder / "template.jinja").write_text("{{ prompt }}? A {{ a }}; B {{ b }}")
    return paths | {"judge": str(folder / "judge"), "template": str(folder / "template.jinja")}


def questions():
    rows = [(f"which {'one ' * i}is it", a, b) for i, (a, b) in enumerate(TEXTS)]
    prompts = [Prompt([1], "<rendered>", {"prompt": prompt}, i) for i, (prompt, _, _) in enumerate(rows)]
    return rows, prompts, *([Completion([2], row[side], True) for row in rows] for side in (1, 2))


def judged(inputs, parallel, params):
    """What the judge gives on this rank, in packs of 64 tokens."""
    from megapref.config import Config
    from megapref.judge_model import local_model
    from megapref.mcore import setup
    from megapref.online.model_judge import prefer
    from megapref.schema import build

    errors = []
    cfg = build(Config, {"run": {"dir": "unused"}, "parallel": parallel, "pack": {"max_tokens": 64}, "model": {"path": inputs["model"]}}, errors)
    setup.start(cfg.parallel, 0)
    local = local_model(cfg, None, None, [], None, inputs["judge"])
    _, *pairs = questions()
    return prefer(local, *pairs, model=inputs["judge"], template=inputs["template"], **params)


def judged_in_shares(folder, inputs, parallel):
    """The same of a mixture, asked by the first share of the pairs alone; the second has no questions."""
    from functools import partial

    from megapref.config import Config
    from megapref.judge_model import local_model
    from megapref.mcore import setup
    from megapref.online.judges import ask_judge
    from megapref.online.model_judge import prefer
    from megapref.schema import build

    cfg = build(Config, {"run": {"dir": "unused"}, "parallel": parallel, "pack": {"max_tokens": 64}, "model": {"path": inputs["model"]}}, [])
    setup.start(cfg.parallel, 0)
    asked = partial(prefer, local_model(cfg, None, None, [], None, folder), model=folder, template=inputs["template"])
    return ask_judge(asked)(*(column if setup.data_parallel_rank() == 0 else [] for column in questions()[1:])).preferences


def by_transformers(inputs, prefix="", swap=True):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(inputs["judge"]).eval(), AutoTokenizer.from_pretrained(inputs["judge"])
    a_id, b_id = (tokenizer.convert_tokens_to_ids(letter) for letter in "AB")

    def p_of_a(prompt, a, b):
        text = f"<|im_start|>user\n{prompt}? A {a}; B {b}<|im_end|>\n<|im_start|>assistant\n{prefix}"
        with torch.no_grad():
            p = model(tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]).logits[0, -1].softmax(-1)
        return (p[a_id] / (p[a_id] + p[b_id])).item()

    rows = questions()[0]
    return [0.5 if a == b else (p_of_a(p, a, b) + 1 - p_of_a(p, b, a)) / 2 if swap else p_of_a(p, a, b) for p, a, b in rows]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verdicts_are_transformers_probabilities_of_the_letters(inputs, layout):
    parallel = LAYOUTS[layout]
    for judgement in run_distributed(judged, 1 if layout == "one" else 2, inputs, parallel, {}):
        assert judgement.preferences == pytest.approx(by_transformers(inputs), rel=1e-5)
        assert judgement.texts[2] is None and all(0 < float(p) < 1 for p in judgement.texts[0].split("\n---\n"))
        assert judgement.sums["judge/agreement"][1] == 3 and judgement.sums["judge/too_long"] == (0, 0)


def test_ranks_that_share_experts_may_have_different_numbers_of_questions(inputs, tmp_path):
    save_tokenizer(tmp_path, chat_template=CHATML)
    mixture = str(make_checkpoint(tmp_path, "mixtral", vocab_size=len(AutoTokenizer.from_pretrained(tmp_path))))
    expected = by_transformers(inputs | {"judge": mixture})
    for folder, verdicts in ((mixture, expected), (inputs["judge"], by_transformers(inputs))):
        first, second = run_distributed(judged_in_shares, 2, folder, inputs, {"expert": 2}, timeout=60)
        assert first == pytest.approx(verdicts, rel=1e-5) and second == []


def test_one_order_a_prefix_and_questions_that_are_too_long(inputs):
    (plain,) = run_distributed(judged, 1, inputs, {}, {"swap": False, "prefix": "The better one is "})
    (too_long,) = run_distributed(judged, 1, inputs, {}, {"swap": False, "system": "x" * 600})
    assert plain.preferences == pytest.approx(by_transformers(inputs, "The better one is ", swap=False), rel=1e-5)
    assert too_long.preferences == [None, None, 0.5, None] and too_long.sums["judge/too_long"] == (3, 0)


@pytest.mark.parametrize("model", ["policy", "reference", "judge"])
def test_runs_with_it_are_the_same_at_two_layouts(inputs, tmp_path, model):
    judge = {"function": "online.model_judge:prefer", "params": {"model": inputs.get(model, model), "template": inputs["template"]}}
    groups = {"judge": judge, "reward": {}, "train": {"steps": 2}, "reference": {"mode": "swapped" if model == "reference" else "resident"}}
    for name, world in (("one", 1), ("tp2", 2)):
        tree = options(inputs, tmp_path / name, "online", **groups, parallel=LAYOUTS[name])
        tree["reward"] = {}
        assert run_distributed(run_training, world, tree) == [""] * world
    for one, two in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "tp2"), strict=True):
        judged = {name: value for name, value in one.items() if name in ("loss", "eval/win_rate") or name.startswith("judge/")}
        assert {name: two[name] for name in judged} == pytest.approx(judged, rel=1e-5, abs=1e-6)
    assert {"loss", "judge/agreement", "judge/too_long"} <= metrics_of(tmp_path / "one")[-1].keys()


def test_a_reference_that_is_not_there_is_named(inputs, tmp_path):
    judge = {"function": "online.model_judge:prefer", "params": {"model": "reference"}}
    tree = options(inputs, tmp_path / "run", "online", judge=judge, reference={"mode": "free"}, data={"validation": {}})
    (message,) = run_distributed(run_training, 1, tree)
    assert 'judge.params.model="reference", but reference.mode="free" holds none' in message
