"""The same run under mpirun and under two torchrun agents, one of which is killed and started again: bit for bit what two processes do alone."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from distributed_run import free_port, run_distributed
from tiny_runs import make_inputs, numbers, options, run_training, write_recipe

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "launchers/train.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
# Without it an agent that comes back waits for ever (torch 2.15).
ELASTIC = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_distributed(run_training, 2, options(inputs, run_dir, "offline", train={"steps": 4})) == ["", ""]
    return numbers(run_dir)


@pytest.mark.slow
def test_mpirun_trains_and_equals_torchrun(inputs, whole, tmp_path):
    recipe = write_recipe(tmp_path, options(inputs, tmp_path / "run", "offline", train={"steps": 4}))
    command = [str(Path(sys.executable).parent / "mpirun"), "-n", "2", sys.executable, TRAIN, *recipe]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 4/4") == 1
    assert numbers(tmp_path / "run") == whole


@pytest.mark.slow
def test_two_agents_one_killed_finish_after_its_restart(inputs, whole, tmp_path):
    run_dir = tmp_path / "run"
    groups = {
        "train": {"steps": 4},
        "save": {"every": 1, "export": False},
        "run": {"dir": str(run_dir), "seed": 3, "resume": "auto"},
        "loss": {"function": "tiny_runs:patient_dpo", "params": {"beta": 0.5, "run_dir": str(run_dir), "step": 3}},
    }
    recipe = write_recipe(tmp_path, options(inputs, run_dir, "offline", **groups))
    port = free_port()

    def agent(is_host: bool, name: str) -> subprocess.Popen:
        conf = f"is_host={is_host},join_timeout=300,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=one", f"--rdzv-conf={conf}"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", *meeting, TRAIN, *recipe]
        with (tmp_path / f"{name}.log").open("w") as log:
            return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT | ELASTIC, stdout=log, stderr=log)

    agents = [agent(True, "first"), agent(False, "second")]
    try:
        wait_for(lambda: len(numbers(run_dir)) == 3, agents, tmp_path)  # steps 0 to 2: both wait in the third
        kill(agents[1])  # with its process, as when a machine fails
        (run_dir / "waited").touch()  # the killed one can't say that it has waited
        agents[1] = agent(False, "again")
        assert [process.wait(400) for process in agents] == [0, 0], logs(tmp_path)
    finally:
        for process in agents:
            if process.poll() is None:
                kill(process)
    assert (run_dir / "environment.resume-1.json").exists()
    assert numbers(run_dir) == whole


def kill(agent: subprocess.Popen) -> None:
    """Kills an agent and what it has started; torchrun gives each process a session of its own."""
    for process in [*psutil.Process(agent.pid).children(recursive=True), psutil.Process(agent.pid)]:
        process.kill()
    agent.wait()


def wait_for(is_so, processes: list[subprocess.Popen], folder: Path) -> None:
    deadline = time.monotonic() + 400
    while not is_so():
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline, logs(folder)
        time.sleep(0.2)


def logs(folder: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*.log")))
