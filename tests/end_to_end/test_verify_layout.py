"""tools/verify_layout.py as it is called on a cluster, and what it says of runs that differ."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from tiny_runs import make_inputs, options, write_recipe

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import verify_layout  # noqa: E402


def config(**changes):
    from megapref.config import Config
    from megapref.schema import build

    return build(Config, {"run": {"dir": "x"}, "model": {"path": "y"}, "loss": {"function": "losses:dpo"}, **changes}, [])


def test_a_layout_is_compared_with_one_process(tmp_path):
    tree = options(make_inputs(tmp_path / "inputs"), tmp_path / "unused", "online", optimizer={"warmup_steps": 5}, train={"steps": 50})
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [str(ROOT / "tools" / "verify_layout.py"), *write_recipe(tmp_path / "recipes", tree), "parallel.context=2", f"--out={tmp_path / 'out'}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([*start, *words], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "context=2 against the other layout" in done.stdout
    assert "comparisons of samples: 15 of 15 are the same token for token" in done.stdout and ": the same" in done.stdout
    assert [json.loads(line)["step"] for line in (tmp_path / "out/layout/metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]


def write_run(folder: Path, losses: list[float | None]) -> None:
    folder.mkdir(parents=True)
    records = [{"step": step, "time": 0, "loss": loss} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_runs_that_differ_are_told(tmp_path):
    for number, (mine, expected) in enumerate([(0.5 + 1e-6, 0), (0.5 + 1e-4, 1), (None, 1)]):
        write_run(tmp_path / str(number) / "layout", [0.7, mine])
        write_run(tmp_path / str(number) / "other", [0.7, 0.5])
        out = io.StringIO()
        assert verify_layout.report(Console(file=out, width=150), tmp_path / str(number), config(), 1e-5) == expected
        assert ("NOT the same" in out.getvalue()) == bool(expected)
