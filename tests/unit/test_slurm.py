"""Config to sbatch text: golden texts, everything of the user's quoted, what is wrong named before anything is submitted."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megapref import compose
from megapref.checks import ROOT
from megapref.cluster import Job, key_of, load_job
from megapref.schema import options
from megapref.slurm import Part, script

GOLDEN = Path(__file__).parent / "sbatch"
NASTY = """a'b"c $(touch pwned) `touch pwned`; touch pwned & #x"""
EVIL = [NASTY, "$HOME", "-rf /", "*", "a b", "'; touch pwned #"]


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """launchers/slurm.py, called in a directory of its own; no programs of Slurm's."""
    monkeypatch.syspath_prepend(str(ROOT / "launchers"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    import slurm

    yield slurm
    sys.modules.pop("slurm", None)


def text_of(job: Job, parts: list[Part], arguments=("--config-name", "dpo")) -> str:
    return script(job, list(arguments), parts, "python3", "/home/me/runs/x/slurm", "/home/me", "/opt/megapref")


@pytest.mark.parametrize(
    ("name", "words", "runs"),
    [
        ("torchrun_pyxis", ["cluster=dgx_h100", "nodes=16", "name=big", "cluster.account=chem"], [["parallel=tp2", "run.resume=auto"]]),
        ("srun_apptainer_array", ["cluster=apptainer", "nodes=2", "name=two", "cluster.requeue=false"], [["loss=ipo"], ["loss=dpo", "run.seed=1"]]),
        ("chain", ["cluster=local", "nodes=2", "name=long", "chain=3", "cluster.time_limit='1-00:00:00'", "cluster.setup=[ulimit -c 0]"], [[]]),
    ],
)
def test_golden_text(name, words, runs):
    parts = [Part(f"/home/me/runs/x{f'/{i}' if len(runs) > 1 else ''}", run) for i, run in enumerate(runs)]
    assert text_of(load_job(words), parts) == (GOLDEN / f"{name}.sh").read_text()


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir()))
def test_golden_text_is_shell(name):
    subprocess.run(["bash", "-n", str(GOLDEN / name)], check=True)


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize("launcher_of", ["torchrun", "srun"])
def test_what_a_user_gives_reaches_training_as_it_is_and_runs_nothing(tmp_path, evil, launcher_of):
    """The whole script runs in bash, with programs of Slurm's that note what they are called with."""
    (tmp_path / "bin").mkdir()
    for program, does in {
        "srun": 'printf "%s\\0" "$@" >"$NOTED"; env >"$NOTED.env"',
        "scontrol": "echo n1",
        "module": 'printf "%s\\0" "$@" >"$NOTED.module"',
    }.items():
        (tmp_path / "bin" / program).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / "bin" / program).chmod(0o755)
    run_dir, overrides = tmp_path / "runs" / evil.replace("/", "_"), [f"loss.params.x={evil}", evil, "run.resume=auto"]
    words = ["cluster=local", f"cluster.launcher={launcher_of}", f"name={compose.quoted(evil)}", f"cluster.environment={{X: {compose.quoted(evil)}}}"]
    words += [f"cluster.{name}=[{compose.quoted(evil)}]" for name in ("modules", "srun")]
    words += [f"cluster.container={{runtime: pyxis, image: {compose.quoted(evil)}, flags: [{compose.quoted(evil)}]}}"]
    (tmp_path / "cwd").mkdir()
    text = script(
        load_job(words), ["--config-name", evil], [Part(str(run_dir), overrides)], evil, str(run_dir / "slurm"), str(tmp_path / "cwd"), "/opt"
    )
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "NOTED": f"{tmp_path}/noted", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    done = subprocess.run(["bash", "-c", text], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    called = (tmp_path / "noted").read_text().split("\0")[:-1]
    assert called[-7:] == [evil, "/opt/launchers/train.py", "--config-name", evil, *overrides]
    assert called.count(f"--container-image={evil}") == 1 and called.count(evil) == (6 if launcher_of == "torchrun" else 5)
    assert f"X={evil}\n" in (tmp_path / "noted.env").read_text()
    assert (tmp_path / "noted.module").read_text().split("\0")[:-1] == ["load", evil]
    assert (run_dir / "slurm" / "7").is_dir() and (run_dir / "slurm" / "finished").exists()
    assert not list(tmp_path.rglob("pwned"))
    names = [line for line in text.splitlines() if line.startswith("#SBATCH --job-name=")]
    assert shlex.split(names[0].removeprefix("#SBATCH ")) == [f"--job-name={evil}"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster=dgx_h10"], "cluster=dgx_h10: no such option of cluster; did you mean dgx_h100?"),
        (["cluster.partitoin=a"], "cluster.partitoin: unknown key; did you mean cluster.partition?"),
        (["nodes=0"], "nodes=0 must be int >= 1"),
        (["cluster.partition='a b'"], 'cluster.partition="a b" is no name that Slurm has'),
        (["cluster.account='-x'"], 'cluster.account="-x" is no name'),
        (['name="a\nb"'], "has a line break"),
        (['cluster.setup=["a\nb"]'], "cluster.setup[0]="),
        (["cluster.time_limit=4h"], 'cluster.time_limit="4h" is no time of Slurm\'s; write "90"'),
        (["cluster.stop_before=90"], "cluster.stop_before=90 must be str or null"),
        (["cluster.stop_before=soon"], 'cluster.stop_before="soon" must be a length of time'),
        (["cluster.environment={A-B: 1}"], "cluster.environment.A-B is no name of a variable"),
        (["cluster.sbatch={partition: a}"], "cluster.sbatch.partition is set by cluster.partition; use that"),
        (["cluster.sbatch={mem_per_cpu: 1}"], "cluster.sbatch.mem_per_cpu is no long name"),
        (["cluster.container={image: a.sif}"], "cluster.container.runtime: missing; give cluster.container.runtime=..."),
        (["cluster.container={runtime: docker, image: a}"], "one of pyxis, apptainer"),
        (["cluster.container={runtime: pyxis, image: a, mounts: ['data:/data']}"], 'mounts: "data:/data" must be PATH'),
        (["sweep=optimizer.lr=1e-6,3e-6"], "must be a list of overrides; write sweep=[optimizer.lr=1e-6,optimizer.lr=3e-6]"),
        (["sweep=[loss=ipo,loss=ipo]"], "has an element twice"),
    ],
)
def test_wrong_settings_are_named(words, said):
    with pytest.raises(ValueError) as error:
        load_job(words)
    assert said in str(error.value)


def test_every_shipped_cluster_loads_and_a_users_own_comes_first(tmp_path):
    assert [load_job([f"cluster={name}"]).nodes for name in compose.groups([compose.RECIPES], Job)["cluster"]]
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "local.yaml").write_text("gpus_per_node: 3\nprocesses_per_node: 2\n")
    job = load_job(["cluster=local", "nodes=4", "cluster.qos=high"], str(tmp_path))
    assert (job.world_size, job.cluster.gpus_per_node, job.cluster.qos) == (8, 3, "high")


def test_sweep_elements_and_keys():
    assert load_job(["sweep=[optimizer.lr=1e-6,optimizer.lr=3e-6]"]).sweep == ["optimizer.lr=1e-6", "optimizer.lr=3e-6"]
    words = """sweep=[data.train=[{path: a}, {path: b}],"loss=ipo run.seed=1", 'x="a, b"']"""
    assert load_job([words]).sweep == ["data.train=[{path: a}, {path: b}]", "loss=ipo run.seed=1", 'x="a, b"']
    keys = {"nodes=4": "nodes", "~cluster.container": "cluster", "++cluster.qos=a": "cluster", "optimizer.lr=1": "optimizer"}
    assert {word: key_of(word) for word in keys} == keys


def test_dry_run_prints_the_script_and_leaves_nothing(launcher, capsys, tmp_path):
    words = ["--config-name", "dpo", "cluster=dgx_h100", "nodes=2", "--dry-run", "optimizer.lr=1e-6", "train.global_batch_size=64"]
    assert launcher.main(words) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --nodes=2\n" in text and "--job-name=dpo" in text
    assert "overrides=(optimizer.lr=1e-6 train.global_batch_size=64 run.resume=auto)" in text
    assert not list(tmp_path.iterdir())


def test_runs_of_a_sweep_have_directories_of_their_own(launcher, capsys, tmp_path):
    words = ["--config-name=dpo", "cluster=local", "sweep=[optimizer.lr=1e-6,loss=ipo loss.params.beta=0.2,run.dir=own]", "run.dir=s", "--dry-run"]
    assert launcher.main(words) == 0
    found = [line.split("=", 1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  run_dir=")]
    assert found == [f"{tmp_path}/s/0_optimizer.lr=1e-6", f"{tmp_path}/s/1_loss=ipo_loss.params.beta=0.2", f"{tmp_path}/own"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel.tensor=3"], "= 3 does not divide the world of 16 processes"),
        (["optimzer.lr=1"], "optimzer: unknown key"),
        (["loss.params.bta=1"], "loss.params.bta"),
        (["cluster.qos='a b'"], 'cluster.qos="a b" is no name'),
        (["sweep=[optimizer.lr=1e-6,optimizer.lr=-1]"], "sweep element optimizer.lr=-1: optimizer.lr=-1 must be float >= 0"),
        (["sweep=[run.dir=a,run.dir=./a]"], "the same run.dir"),
        (["run.dir=old"], "already holds a run; use run.resume=auto"),
        (["run.dir='a\\b'"], "cannot have in the name of a log"),
        (["run.dir='a:b'"], "no path may have a comma or colon"),
        (["run.resume=old/checkpoints"], "would be where the job begins again"),
        ([], "there is no sbatch on this machine; run this where Slurm is, or print the script with --dry-run"),
    ],
)
def test_a_wrong_run_is_not_submitted(launcher, capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    words = ["--config-name", "dpo", "cluster=dgx_h100", "nodes=2", "train.global_batch_size=64", *words]
    assert launcher.main(words) == 2
    printed = capsys.readouterr()
    assert said in printed.err and "submitted" not in printed.out


def test_submission_status_and_logs(launcher, capsys, tmp_path, monkeypatch):
    """With programs in Slurm's place: ids, dependencies, records, which log is shown."""
    answers = {
        "sbatch": 'echo "$@" >>called; echo 1$(wc -l <called)',
        "scontrol": "echo JobId=11 JobState=RUNNING Reason=None Restarts=2 ExitCode=0:0 RunTime=00:01:00 NodeList=n1",
        "squeue": "echo 12",
    }
    for program, does in answers.items():
        (tmp_path / program).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    words = ["--config-name", "dpo", "cluster=local", "chain=2", "run.dir=run"]
    assert launcher.main(words) == 0
    run = tmp_path / "run"
    first, second = (tmp_path / "called").read_text().splitlines()
    assert (first, second) == (f"--parsable {run}/slurm/job.sh", f"--parsable --dependency=afterany:11 {run}/slurm/job.sh")
    assert [record["job"] for record in json.loads((run / "slurm" / "jobs.json").read_text())] == ["11", "12"]
    assert launcher.main(words) == 2 and "job 12 is waiting or running there" in capsys.readouterr().err
    assert launcher.main(["logs", "run"]) == 2 and "no job of it has begun" in capsys.readouterr().err
    (run / "slurm" / "11").mkdir()
    for name in ("job-11.log", "11/rank-0.log", "11/rank-1.log"):
        (run / "slurm" / name).write_text(name)
    assert launcher.log_file("run", None) == Path(f"{run}/slurm/job-11.log")
    assert launcher.log_file("run", 1) == Path(f"{run}/slurm/11/rank-1.log")
    assert launcher.main(["logs", "run", "--rank", "2"]) == 2 and "there are 0 to 1" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text('{"step": 7}\n')
    assert launcher.main(["status", "run"]) == 0
    assert "11  RUNNING, exit code 0:0, on n1, ran 00:01:00, restarts 2" in (out := capsys.readouterr().out) and "step 7, no checkpoint" in out
    assert launcher.main(["status", "nowhere"]) == 2 and "no job was submitted" in capsys.readouterr().err


def test_help_has_every_key(launcher, capsys):
    with pytest.raises(SystemExit):
        launcher.main(["--help"])
    out = capsys.readouterr().out
    assert "dgx_h100" in out
    for option in options(Job):
        assert f"  {option.key}=" in out and option.comment in out
