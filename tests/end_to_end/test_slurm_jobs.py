"""launchers/slurm.py with a real Slurm of two nodes: both styles of tasks, and every way in which a job ends early and goes on.

Jobs wait for most of their time, so they are submitted together; each test looks at one of them.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed_run import run_distributed
from slurm_cluster import NODES, cluster
from tiny_runs import make_inputs, numbers, options, run_training, write_recipe

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
pytestmark = pytest.mark.slow


class Slurm:
    """Submits runs of a tiny model to the cluster whose environment it has, and waits for what becomes of them."""

    def __init__(self, environment: dict[str, str], inputs: dict[str, str], folder: Path) -> None:
        paths = f"{ROOT}:{ROOT / 'tests'}"
        self.environment = environment | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self.inputs, self.folder = inputs, folder

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, name: str, loss: str, *words: str, **params) -> Path:
        run_dir = self.folder / name
        loss_options = {"function": f"tiny_runs:{loss}", "params": {"beta": 0.5, **params}}
        tree = options(self.inputs, run_dir, "offline", train={"steps": STEPS}, loss=loss_options)
        recipe = write_recipe(self.folder / f"recipe_{name}", tree)
        with pytest.MonkeyPatch.context() as patch:  # in this process, which has imported torch already
            patch.chdir(ROOT)
            patch.syspath_prepend(str(ROOT / "launchers"))
            for key, value in self.environment.items():
                patch.setenv(key, value)
            assert importlib.import_module("slurm").main([*recipe, "cluster=local", *words]) == 0
        return run_dir

    def submit_patient(self, name: str, *words: str) -> Path:
        """A run that waits in its third step until it is asked to stop."""
        return self.submit(name, "patient_dpo", *words, run_dir=str(self.folder / name), step=3)

    def job(self, run_dir: Path) -> dict[str, str]:
        """What Slurm says of the newest job of a run."""
        job_id = json.loads((run_dir / "slurm" / "jobs.json").read_text())[-1]["job"]
        return dict(field.partition("=")[::2] for field in self.ask("scontrol", "--oneliner", "show", "job", job_id).split(" ") if "=" in field)

    def wait(self, run_dir: Path, is_so, seconds: float = 500) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, f"{self.job(run_dir)}\n{told(run_dir)}"
            time.sleep(0.3)

    def wait_for_step_2(self, run_dir: Path) -> None:
        self.wait(run_dir, lambda: len(numbers(run_dir)) == 3 or self.job(run_dir)["JobState"] == "FAILED")
        assert self.job(run_dir)["JobState"] == "RUNNING", told(run_dir)

    def end(self, run_dir: Path) -> dict[str, str]:
        over = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        self.wait(run_dir, lambda: self.job(run_dir)["JobState"] in over)
        return self.job(run_dir)


def told(run_dir: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted((run_dir / "slurm").rglob("*.log")))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """What one, and what two processes of one machine measure."""
    folder, measured = tmp_path_factory.mktemp("whole"), {}
    for size in (1, 2):
        tree = options(inputs, folder / str(size), "offline", train={"steps": STEPS})
        assert run_distributed(run_training, size, tree) == [""] * size
        measured[size] = numbers(folder / str(size))
    return measured


@pytest.fixture(scope="module")
def slurm(inputs, tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield Slurm(environment, inputs, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def runs(slurm):
    """The directories of the jobs, all submitted: `requeued` and `preempted` on two nodes in the two styles, `limited` and the `sweep` on one."""
    submitted = {
        "limited": slurm.submit_patient("limited", "cluster.time_limit='2'", "cluster.stop_before=30s", f"cluster.sbatch={{nodelist: {NODES[0]}}}"),
        "requeued": slurm.submit_patient("requeued", "nodes=2", "cluster.launcher=torchrun"),
        "preempted": slurm.submit_patient("preempted", "nodes=2", "cluster.launcher=srun"),
    }
    for name in ("requeued", "preempted"):
        slurm.wait_for_step_2(submitted[name])
    slurm.ask("scontrol", "requeue", slurm.job(submitted["requeued"])["JobId"])
    slurm.wait(submitted["requeued"], lambda: slurm.job(submitted["requeued"])["JobState"] == "PENDING")
    high = ["--partition=high", "--exclusive", f"--nodelist={NODES[1]}", "--output=/dev/null", "--wrap=true"]
    slurm.ask("sbatch", *high)
    return submitted


def test_requeued_job_of_two_nodes_with_torchrun_resumes_exactly(slurm, runs, whole):
    job = slurm.end(runs["requeued"])
    assert job["JobState"] == "COMPLETED" and int(job["Restarts"]) >= 1, told(runs["requeued"])
    assert "SIGTERM was received" in told(runs["requeued"]) and (runs["requeued"] / "environment.resume-1.json").exists()
    assert numbers(runs["requeued"]) == whole[2]


def test_preempted_job_of_two_nodes_with_a_task_per_process_resumes_exactly(slurm, runs, whole):
    job = slurm.end(runs["preempted"])
    assert job["JobState"] == "COMPLETED" and int(job["Restarts"]) >= 1, told(runs["preempted"])
    assert (runs["preempted"] / "environment.resume-1.json").exists()
    assert numbers(runs["preempted"]) == whole[2]


def test_signal_before_the_time_limit_saves_and_the_job_goes_on(slurm, runs, whole):
    job = slurm.end(runs["limited"])
    assert job["JobState"] == "COMPLETED" and int(job["Restarts"]) >= 1, told(runs["limited"])
    assert "SIGUSR1 was received" in told(runs["limited"])
    assert numbers(runs["limited"]) == whole[1]


def test_sweep_and_chain(slurm, whole):
    """Each element has a run of its own; the second job of the chain finds nothing left to do."""
    base = slurm.submit("sweep", "plain_dpo", "sweep=[optimizer.lr=2e-3,optimizer.lr=1e-3]", "chain=2")
    first, second = base / "0_optimizer.lr=2e-3", base / "1_optimizer.lr=1e-3"
    for run_dir in (first, second):
        assert slurm.end(run_dir)["JobState"] == "COMPLETED", told(base)
        assert len(list((run_dir / "slurm").glob("*/rank-0.log"))) == 1
    assert told(base).count("an earlier job of the chain has finished this run") == 2
    assert numbers(first) == whole[1] and len(numbers(second)) == len(whole[1]) and numbers(second) != whole[1]


def test_rank_that_fails_fails_the_job_with_its_message(slurm):
    run_dir = slurm.submit("failing", "fails_on_rank_1", "nodes=2", "cluster.launcher=srun")
    assert slurm.end(run_dir)["JobState"] == "FAILED"
    log = slurm.ask(sys.executable, "launchers/slurm.py", "logs", str(run_dir), "-n", "200")
    assert "RuntimeError: rank 1 has had enough" in log
    assert "rank 1 has had enough" in slurm.ask(sys.executable, "launchers/slurm.py", "logs", str(run_dir), "--rank", "1")
    status = slurm.ask(sys.executable, "launchers/slurm.py", "status", str(run_dir))
    assert "FAILED, exit code 1:0" in status and str(run_dir) in status


def test_cancelled_job_is_not_brought_back(slurm):
    run_dir = slurm.submit_patient("cancelled")
    slurm.wait_for_step_2(run_dir)
    slurm.ask("scancel", slurm.job(run_dir)["JobId"])
    job = slurm.end(run_dir)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    slurm.wait(run_dir, lambda: (run_dir / "stopped.json").exists())
    assert os.listdir(run_dir / "checkpoints") == ["step_000003"]
