"""tools/make_reward_model.py: a model that learns which side is chosen, and scores as the reward function reads it."""

import importlib.util
import sys
from pathlib import Path

import pytest
from tiny_runs import make_inputs, write_rows

from megapref.batch import Completion, Prompt
from megapref.online.reward_models import sequence_classifier

spec = importlib.util.spec_from_file_location("make_reward_model", Path(__file__).resolve().parents[2] / "tools" / "make_reward_model.py")
make_reward_model = sys.modules["make_reward_model"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_reward_model)


def test_it_learns_the_chosen_side_and_is_a_reward(tmp_path, capsys):
    inputs = make_inputs(tmp_path / "inputs")
    arguments = [inputs["model"], inputs["pairs"], "--out", str(tmp_path / "reward"), "--test", inputs["pairs"]]
    assert make_reward_model.main([*arguments, "--epochs", "20", "--lr", "1e-2", "--batch", "4"]) == 0
    assert "100.0% of 8 pairs trained on, 100.0% of 8 pairs held out" in capsys.readouterr().out
    prompts = [Prompt([], "", {"prompt": "the cat"}, n) for n in range(2)]
    chosen, rejected = sequence_classifier(
        prompts, [Completion([], text, True) for text in (" sat on the mat", " ran")], path=str(tmp_path / "reward")
    )
    assert chosen > rejected


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"prompt": "a", "completion": "b"}], ids=str)
def test_rows_without_a_pair_are_named(tmp_path, capsys, row):
    inputs = make_inputs(tmp_path / "inputs")
    rows = write_rows(tmp_path / "rows.jsonl", [row])
    assert make_reward_model.main([inputs["model"], rows, "--out", str(tmp_path / "reward")]) == 2
    assert f"{rows}" in capsys.readouterr().err and not (tmp_path / "reward").exists()
