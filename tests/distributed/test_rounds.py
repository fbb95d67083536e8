"""Rounds of generation, sampled for several steps at once: with which weights, the same at every layout, and exactly gone on with after a kill, a
signal or a longer run."""

import json
import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from distributed_run import run_distributed, signals_of
from tiny_runs import make_inputs, metrics_of, numbers, options, run_training
from transformers import AutoTokenizer

STOP = ["e", " "]
GROUPS = {
    "generation": {"sync_every": 3, "stop": STOP, "temperature": 1.0, "max_new_tokens": 8, "max_requests": 16, "kv_cache_gb": 0.01},
    "train": {"steps": 7},
    "save": {"every": 3, "keep": 9},
    "optimizer": {"warmup_steps": 0, "lr": 2e-2},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The directory of a run of seven steps in rounds of three, on one process, that nothing disturbed."""
    return trained(inputs, tmp_path_factory.mktemp("whole") / "run")


def trained(inputs, run_dir: Path, world: int = 1, **groups) -> Path:
    tree = options(inputs, run_dir, "online", **{**GROUPS, **groups})
    assert set(run_distributed(run_training, world, tree)) == {""}
    return run_dir


def ledger_of(run_dir: Path) -> list[list[dict]]:
    return [pq.read_table(path).to_pylist() for path in sorted((run_dir / "ledger").glob("*.parquet"))]


def same_as(run_dir: Path, whole: Path) -> None:
    assert numbers(run_dir) == numbers(whole)
    assert ledger_of(run_dir) == ledger_of(whole)


def test_a_round_is_sampled_with_the_weights_of_its_first_step(inputs, whole, tmp_path):
    assert [record.get("generation/staleness") for record in metrics_of(whole) if "loss" in record] == [0, 1, 2, 0, 1, 2, 0]
    rows = ledger_of(whole)
    assert [{row["weight_version"] for row in step} for step in rows] == [{0}, {0}, {0}, {3}, {3}, {3}, {6}]
    # The first step of a round is an ordinary one; in the others the samples are those of weights that do not move, which here are the same.
    still = trained(inputs, tmp_path / "still", optimizer={"lr": 0.0, "warmup_steps": 0}, generation={**GROUPS["generation"], "sync_every": 1})
    ids = [[(row["first_ids"], row["second_ids"]) for row in step] for step in rows]
    of_still = [[(row["first_ids"], row["second_ids"]) for row in step] for step in ledger_of(still)]
    assert ids[:3] == of_still[:3] and ids[3] != of_still[3]


def test_stop_strings_end_what_is_trained_on(inputs, whole):
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    ended = 0
    for row in (row for step in ledger_of(whole) for row in step):
        for side in ("first", "second"):
            ids = row[f"{side}_ids"]
            has_stop = [any(one in tokenizer.decode(ids[:n]) for one in STOP) for n in range(1, len(ids) + 1)]
            assert not any(has_stop[:-1]) and row[f"{side}_finished"] == (has_stop[-1] or ids[-1] == tokenizer.eos_token_id)
            assert len(ids) == 8 or row[f"{side}_finished"]
            ended += has_stop[-1]
    assert ended > 10


@pytest.mark.parametrize(("world", "parallel"), [(2, {}), (2, {"tensor": 2}), (2, {"pipeline": 2})], ids=str)
def test_layouts_give_the_same_run(inputs, whole, tmp_path, world, parallel):
    run_dir = trained(inputs, tmp_path / "run", world, parallel=parallel, data={"train": [{"path": inputs["prompts"]}], "validation": {}})
    assert ledger_of(run_dir) == ledger_of(whole)
    for mine, theirs in zip((r for r in metrics_of(run_dir) if "loss" in r), (r for r in metrics_of(whole) if "loss" in r), strict=True):
        assert [mine[name] for name in ("loss", "grad_norm")] == pytest.approx([theirs[name] for name in ("loss", "grad_norm")], rel=1e-3)


def train_until_sent(tree: dict, step: int, number: int) -> bool:
    """Trains; the process sends itself a signal at the end of the given step. Whether it stopped as it was asked to."""
    from megapref import signals, train
    from megapref.config import Config
    from megapref.schema import build

    train_step = train.train_step

    def and_send(state, *args):
        metrics = train_step(state, *args)
        if state.step == step:
            os.kill(os.getpid(), number)
        return metrics

    train.train_step = and_send
    try:
        with signals.noted():
            return train.main(build(Config, tree, []))
    finally:
        train.train_step = train_step


def test_killed_within_a_round_it_samples_the_round_again(inputs, whole, tmp_path):
    tree = options(inputs, tmp_path / "run", "online", **GROUPS)
    assert signals_of(train_until_sent, 1, tree, 5, signal.SIGKILL) == [signal.SIGKILL]
    assert len(ledger_of(tmp_path / "run")) == 5
    same_as(trained(inputs, tmp_path / "run", run={"resume": "auto"}), whole)


def test_asked_to_stop_within_a_round_it_finishes_it(inputs, whole, tmp_path):
    tree = options(inputs, tmp_path / "run", "online", **GROUPS)
    assert run_distributed(train_until_sent, 1, tree, 4, signal.SIGTERM) == [True]
    assert json.loads((tmp_path / "run" / "stopped.json").read_text())["step"] == 6
    same_as(trained(inputs, tmp_path / "run", run={"resume": "auto"}), whole)


def test_the_end_within_a_round_is_no_place_to_go_on_from(inputs, whole, tmp_path):
    start = {"resume": str(whole / "checkpoints" / "step_000007")}
    (message,) = run_distributed(run_training, 1, options(inputs, tmp_path / "run", "online", **GROUPS | {"train": {"steps": 9}}, run=start))
    assert "step 7 is within a round of generation.sync_every=3 steps" in message and "the weights of step 6" in message
    # With what divides it, the round is over.
    generation = {**GROUPS["generation"], "sync_every": 7}
    longer = {**GROUPS, "train": {"steps": 8}, "save": {}, "generation": generation}
    assert len(ledger_of(trained(inputs, tmp_path / "other", **longer, run=start))) == 1


def test_no_sequence_is_longer_than_it_may_be_and_what_that_changes_is_counted(inputs, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    sizes, limit = (2, 6, 9, 12), 12  # eight tokens follow the first, six and three the next, and none the last
    prompts = ["x" * size for size in sizes]
    assert tuple(len(tokenizer(text)["input_ids"]) for text in prompts) == sizes
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    data = {"train": [{"path": str(path)}], "validation": {"same": {"path": str(path)}}, "max_length": limit, "on_bad_row": "skip"}
    tree = {"data": data, "train": {"steps": 2, "global_batch_size": 3}, "generation": {**GROUPS["generation"], "sync_every": 1, "stop": []}}
    run_dir = trained(inputs, tmp_path / "run", **tree, save={})
    counted = {name: value for name, value in metrics_of(run_dir)[1].items() if name.startswith("data/")}
    assert counted["data/dropped_rows"] == counted["data/validation-same_dropped_rows"] == 1
    assert counted["data/shortened_rows"] == counted["data/validation-same_shortened_rows"] == 2
    rows = [row for step in ledger_of(run_dir) for row in step]
    lengths = {(len(row["prompt_ids"]), len(row[f"{side}_ids"]), row[f"{side}_finished"]) for row in rows for side in ("first", "second")}
    assert all(new == min(8, limit - size) for size, new, finished in lengths if not finished)
    assert {size for size, _, finished in lengths if not finished} == set(sizes[:3])
