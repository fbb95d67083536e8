"""Every way to have a reference trains the same, at every layout; one that moves; the cache of its log-probabilities."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from distributed_run import run_distributed
from tiny_runs import make_inputs, metrics_of, options, run_training

SAME = ("loss", "grad_norm", "logps/ref_chosen", "rewards/margins", "validation-same_loss")
LAYOUTS = {"one process": (1, {}), "dp2": (2, {}), "tp2": (2, {"tensor": 2}), "pp2": (2, {"pipeline": 2})}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), "qwen2_tied")


def train(inputs, run_dir: Path, layout: str = "one process", **groups) -> list[dict]:
    world, parallel = LAYOUTS[layout]
    assert set(run_distributed(run_training, world, options(inputs, run_dir, "offline", parallel=parallel, **groups))) == {""}
    return metrics_of(run_dir)


def compare(metrics: list[dict], expected: list[dict]) -> None:
    for record, other in zip(metrics, expected, strict=True):
        assert record.keys() == other.keys()
        for name in [name for name in SAME if name in other]:
            assert record[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), (record["step"], name)


@pytest.fixture(scope="module")
def resident(inputs, tmp_path_factory):
    return train(inputs, tmp_path_factory.mktemp("resident") / "run")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_swapped_trains_as_resident(inputs, resident, tmp_path, layout):
    compare(train(inputs, tmp_path / "run", layout, reference={"mode": "swapped"}), resident)


@pytest.fixture(scope="module")
def cache(inputs, resident, tmp_path_factory):
    """A cache that one process filled, and what it is for."""
    folder = tmp_path_factory.mktemp("cache")
    compare(train(inputs, folder / "run", reference={"mode": "cached", "cache": str(folder / "cache")}), resident)
    (model,) = (folder / "cache").iterdir()
    return model


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copied(cache: Path, to: Path) -> Path:
    return Path(shutil.copytree(cache, to / cache.name))


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
def test_a_cache_serves_another_layout(inputs, resident, cache, tmp_path, layout):
    before = contents(cache)
    compare(train(inputs, tmp_path / "run", layout, reference={"mode": "cached", "cache": str(cache.parent)}), resident)
    assert contents(cache) == before
    assert json.loads(before["meta.json"])["model"] == inputs["model"]


@pytest.mark.parametrize("layout", ["one process", "dp2"])
def test_what_a_cache_lacks_is_scored(inputs, resident, cache, tmp_path, layout):
    """One row is taken out, then the file is damaged: the rest is kept, and in the end the cache is whole again."""
    part = copied(cache, tmp_path)
    (shard,) = part.glob("part-*.parquet")
    table = pq.read_table(shard)
    from megapref.data.reference_cache import write_shard

    rows = dict(zip(table["key"].to_pylist(), table["logps"].to_pylist(), strict=True))
    missing = sorted(rows)[0]
    write_shard(part, {key: row for key, row in rows.items() if key != missing})
    shard.write_bytes(shard.read_bytes()[:-9])
    compare(train(inputs, tmp_path / "run", layout, reference={"mode": "cached", "cache": str(tmp_path)}), resident)
    shards = sorted(part.glob("part-*.parquet"), key=lambda path: pq.read_metadata(path).num_rows)
    assert [pq.read_metadata(path).num_rows for path in shards] == [1, len(rows) - 1] and shard not in shards
    assert pq.read_table(shards[0])["logps"].to_pylist()[0] == pytest.approx(rows[missing], abs=1e-5)


def test_a_cache_that_disagrees_is_refused(inputs, cache, tmp_path):
    from megapref.data.reference_cache import write_shard

    part = copied(cache, tmp_path)
    (shard,) = part.glob("part-*.parquet")
    table = pq.read_table(shard)
    shard.unlink()
    write_shard(part, {key: [value - 0.01 for value in row] for key, row in zip(table["key"].to_pylist(), table["logps"].to_pylist(), strict=True)})
    world, parallel = LAYOUTS["dp2"]
    tree = options(inputs, tmp_path / "run", "offline", parallel=parallel, reference={"mode": "cached", "cache": str(tmp_path)})
    for message in run_distributed(run_training, world, tree):
        assert f"reference.cache: {part} has the log-probability -" in message and "allows a difference of 0.001" in message
        assert "Remove the folder, and it is filled again" in message


def test_a_cache_that_cannot_be_written(inputs, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    tree = options(inputs, tmp_path / "run", "offline", reference={"mode": "cached", "cache": str(tmp_path / "cache")})
    (message,) = run_distributed(run_training, 1, tree)
    assert "cannot be written (" in message and "choose another folder" in message


@pytest.mark.parametrize(("mode", "layout"), [("resident", "one process"), ("swapped", "tp2"), ("resident", "pp2")])
def test_a_reference_that_becomes_the_policy_at_every_step(inputs, tmp_path, mode, layout):
    """TR-DPO with alpha 1: every step begins where policy and reference are the same."""
    records = train(inputs, tmp_path / "run", layout, reference={"mode": mode, "sync_steps": 1, "mixup_alpha": 1.0})
    assert [record["loss"] for record in records[1:]] == pytest.approx([0.693147] * 3, abs=1e-6)
    assert len({record["logps/chosen"] for record in records[1:]}) == 3


@pytest.mark.parametrize(("mode", "layout"), [("resident", "one process"), ("swapped", "dp2")])
def test_a_moving_reference_resumes(inputs, tmp_path, mode, layout):
    """Bit for bit, from a checkpoint right after a synchronisation and from one between two."""
    groups = {"reference": {"mode": mode, "sync_steps": 2, "mixup_alpha": 0.6}, "train": {"steps": 5}, "save": {"every": 1, "keep": 5}}
    whole = train(inputs, tmp_path / "run", layout, **groups)
    for step in (2, 3):
        run_dir = Path(shutil.copytree(tmp_path / "run", tmp_path / str(step)))
        for later in range(step + 1, 6):
            shutil.rmtree(run_dir / "checkpoints" / f"step_{later:06d}")
        resumed = train(inputs, run_dir, layout, **groups, run={"resume": "auto"})
        for record, expected in zip(resumed, whole, strict=True):
            assert all(record[name] == expected[name] for name in SAME if name in expected), record["step"]


def test_a_moving_reference_moves_by_its_share(inputs, tmp_path):
    """ref <- (1 - a) ref + a policy, weight by weight."""
    groups = {"train": {"steps": 1}, "reference": {"sync_steps": 1, "mixup_alpha": 0.25}}
    (worst,) = run_distributed(moved_reference, 1, options(inputs, tmp_path / "run", "offline", **groups), 0.25)
    assert worst < 1e-6


def moved_reference(tree: dict, alpha: float) -> float:
    """Trains one step; the largest distance of the reference's weights from the mix of the first weights and the policy's."""
    from megapref.config import Config
    from megapref.mcore import setup
    from megapref.runlog import RunLog
    from megapref.schema import build
    from megapref.train import build as build_run
    from megapref.train import train as train_run

    cfg = build(Config, tree, [])
    setup.start(cfg.parallel, 0)
    run = build_run(cfg, None)
    policy = run.state.chunks[0].module
    first = [weight.detach().clone() for weight in policy.parameters()]
    train_run(cfg, run, RunLog(None, total_steps=1))
    held = run.state.moving_reference.chunks[0].parameters()
    mixes = [(1 - alpha) * old + alpha * new for old, new in zip(first, policy.parameters(), strict=True)]
    assert any((old - new).abs().max() > 1e-4 for old, new in zip(first, policy.parameters(), strict=True))
    return max((weight - mix).abs().max().item() for weight, mix in zip(held, mixes, strict=True))
