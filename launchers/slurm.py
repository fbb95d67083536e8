"""Submits training runs to Slurm, and tells of those submitted.

    python launchers/slurm.py --config-name online_dpo cluster=dgx_h100 nodes=16 parallel=tp2 [--dry-run]
    python launchers/slurm.py status RUN_DIR
    python launchers/slurm.py logs RUN_DIR [--rank 3] [-f]

The training config is checked with the job's number of processes before anything is submitted. --dry-run prints the script for sbatch instead.
RUN_DIR/slurm/ has the script (job.sh), the jobs submitted (jobs.json), their logs (job-ID.log) and those of the processes (ID/rank-N.log).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from megapref import compose, config, metrics_file, runlog
from megapref.checks import ROOT
from megapref.cluster import OF_JOB, Job, key_of, load_job
from megapref.plugins import describe, show
from megapref.schema import MISSING, options
from megapref.slurm import Part, script

EXIT_USER_ERROR = 2


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, or 2 after a user's mistake."""
    commands = {"status": status, "logs": logs}
    try:
        if argv and argv[0] in commands:
            commands[argv[0]](argv[1:])
        else:
            submit(argv)
    except ValueError as error:
        print(f"megapref cannot do this:\n{error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def submit(argv: list[str]) -> None:
    """Checks everything, then submits the job, or with --dry-run prints its script."""
    parser = argparse.ArgumentParser("slurm.py", description=__doc__, epilog=_keys(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", metavar="RECIPE", required=True, help="the recipe to run")
    parser.add_argument("--config-dir", metavar="DIR", help="more recipes and groups, your own clusters among them")
    parser.add_argument("--dry-run", action="store_true", help="print the script and stop")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE | GROUP=OPTION", help="of the job (keys below) and of the recipe")
    arguments = parser.parse_intermixed_args(argv)
    words = {is_job: [word for word in arguments.overrides if (key_of(word) in OF_JOB) == is_job] for is_job in (True, False)}
    job = load_job(words[True], arguments.config_dir)
    base, parts = plan_parts(job, arguments.config_name, words[False], arguments.config_dir)
    job = replace(job, name=job.name or base.name)
    python = job.cluster.python or ("python" if job.cluster.container else sys.executable)
    train = ["--config-name", arguments.config_name]
    train += ["--config-dir", os.path.abspath(arguments.config_dir)] if arguments.config_dir else []
    text = script(job, train, parts, python, str(base / "slurm"), os.getcwd(), str(ROOT))
    if arguments.dry_run:
        print(text, end="")
        return
    _check_nobody_runs_in(base)
    for part in parts:
        (Path(part.run_dir) / "slurm").mkdir(parents=True, exist_ok=True)
        (Path(part.run_dir) / "slurm" / "finished").unlink(missing_ok=True)
    (base / "slurm").mkdir(parents=True, exist_ok=True)
    (base / "slurm" / "job.sh").write_text(text)
    ids: list[str] = []
    for _ in range(job.chain):
        ids.append(_sbatch(base / "slurm" / "job.sh", after=ids[-1] if ids else None))
        _record(base, parts, ids[-1])
    print(f"submitted {', '.join(ids)}: {job.nodes} nodes, {job.world_size} processes{f', {len(parts)} runs' if len(parts) > 1 else ''}")
    print(f"  python launchers/slurm.py status {shlex.quote(str(base))}\n  python launchers/slurm.py logs {shlex.quote(parts[0].run_dir)} -f")


def plan_parts(job: Job, config_name: str, overrides: list[str], config_dir: str | None) -> tuple[Path, list[Part]]:
    """Returns the directory of the whole and its runs; ValueError lists what is wrong with their configs, with the job's number of processes."""
    from megapref.methods import check_plugins  # brings torch: not for --help

    parts, errors, base = [], [], Path()
    for number, element in enumerate(job.sweep or [""]):
        own = shlex.split(element)
        words = [*overrides, *own]
        try:
            cfg = config.load(config_name, words, config_dir, job.world_size)
            check_plugins(cfg)
        except ValueError as error:
            errors += [f"sweep element {element}: {line}" if element else line for line in str(error).splitlines()]
            continue
        run_dir = base = Path(os.path.abspath(cfg.run.dir))
        if element and not any(key_of(word) == "run" and word.lstrip("+").startswith("run.dir=") for word in own):
            run_dir = base / f"{number}_{re.sub(r'[^\w.=+-]+', '_', element)}"[:100]
            words.append(f"run.dir={compose.quoted(str(run_dir))}")
        errors += _unfit(job, cfg, run_dir)
        parts.append(Part(str(run_dir), words if cfg.run.resume else [*words, "run.resume=auto"]))
    if not errors and len({part.run_dir for part in parts}) < len(parts):
        errors.append("two elements of the sweep have the same run.dir; leave it out of them")
    if errors:
        raise ValueError("\n".join(errors))
    return base, parts


def _unfit(job: Job, cfg: config.Config, run_dir: Path) -> list[str]:
    errors = []
    if not str(run_dir).isprintable() or "\\" in str(run_dir):
        errors.append(f"run.dir={show(str(run_dir))} has a character that Slurm cannot have in the name of a log; choose another run.dir")
    if job.cluster.container and re.search("[,:]", f"{run_dir}{os.getcwd()}{ROOT}"):
        errors.append("run.dir, current directory and checkout are mounted in the container, where no path may have a comma or colon; rename it")
    if cfg.run.resume is None and runlog.holds_run(run_dir):
        errors.append(f"run.dir={run_dir} already holds a run; use run.resume=auto to go on with it, or another run.dir")
    if cfg.run.resume not in (None, "auto") and (job.cluster.requeue or job.chain > 1):
        errors.append(
            f"run.resume={cfg.run.resume} would be where the job begins again each time it goes on; "
            "give cluster.requeue=false (and chain=1), or go on in that run's directory with run.resume=auto"
        )
    return errors


def _check_nobody_runs_in(base: Path) -> None:
    if not (base / "slurm" / "jobs.json").exists():
        return
    known = {record["logs"] for record in _recorded(str(base))}
    waiting = known & set(_ask("squeue", "--me", "--noheader", "--format=%F").split())
    if waiting:
        raise ValueError(f"run.dir={base}: job {min(waiting)} is waiting or running there; scancel it, or choose another run.dir")


def _sbatch(path: Path, after: str | None) -> str:
    dependency = [f"--dependency=afterany:{after}"] if after else []
    return _ask("sbatch", "--parsable", *dependency, str(path)).split(";")[0]


def _ask(*command: str) -> str:
    """What a program of Slurm's answers; ValueError says why it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(f"there is no {command[0]} on this machine; run this where Slurm is, or print the script with --dry-run") from None
    if done.returncode:
        raise ValueError(f"{command[0]} refused: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def _record(base: Path, parts: list[Part], job_id: str) -> None:
    """Adds the job to jobs.json, of each run and of the whole."""
    is_array = len(parts) > 1
    records = [
        {"job": f"{job_id}_{number}" if is_array else job_id, "run_dir": part.run_dir, "folder": str(base / "slurm"), "logs": job_id}
        for number, part in enumerate(parts)
    ]
    for folder in dict.fromkeys([base, *(Path(part.run_dir) for part in parts)]):
        file = folder / "slurm" / "jobs.json"
        known = json.loads(file.read_text()) if file.exists() else []
        file.write_text(json.dumps(known + [r for r in records if folder in (base, Path(r["run_dir"]))], indent=1) + "\n")


def _recorded(run_dir: str) -> list[dict[str, str]]:
    file = Path(run_dir) / "slurm" / "jobs.json"
    if not file.exists():
        raise ValueError(f"{run_dir}: no job was submitted for it, there is no {file}; give the run.dir of one that launchers/slurm.py submitted")
    return json.loads(file.read_text())


def status(argv: list[str]) -> None:
    """Prints what Slurm and the run directories know of the jobs submitted."""
    parser = argparse.ArgumentParser("slurm.py status", description="State, steps and checkpoints of the jobs submitted for a run directory.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="of a run, or of a sweep")
    for record in _recorded(parser.parse_args(argv).run_dir):
        run_dir = Path(record["run_dir"])
        metrics, marker = run_dir / "metrics.jsonl", run_dir / "stopped.json"
        steps = [r["step"] for r in metrics_file.read_metrics(metrics)[-1:]] if metrics.exists() else []
        saved = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
        progress = f"step {steps[0]}, " if steps else ""
        progress += f"newest checkpoint {saved[-1]}" if saved else "no checkpoint yet"
        stopped = f", stopped as {json.loads(marker.read_text())['reason']}" if marker.exists() else ""
        print(f"{record['job']}  {_state(record['job'])}\n  {run_dir}: {progress}{stopped}")


def _state(job_id: str) -> str:
    """What Slurm remembers of a recent job, or what its accounting says of an older one."""
    try:
        told = dict(re.findall(r"(\w+)=(\S*)", _ask("scontrol", "--oneliner", "show", "job", job_id)))
        where = f"on {told['NodeList']}" if told["JobState"] == "RUNNING" else f"reason {told['Reason']}"
        return f"{told['JobState']}, exit code {told['ExitCode']}, {where}, ran {told['RunTime']}, restarts {told['Restarts']}"
    except ValueError:
        pass
    try:
        state, code, elapsed = _ask("sacct", "-nXP", "-j", job_id, "-o", "State,ExitCode,Elapsed").splitlines()[-1].split("|")
    except (ValueError, IndexError):
        return "not known to Slurm any more"
    return f"{state}, exit code {code}, ran {elapsed}"


def logs(argv: list[str]) -> None:
    """Becomes `tail` of the log of the newest job that has begun, or of one of its processes."""
    parser = argparse.ArgumentParser("slurm.py logs", description="Shows the log of the newest job that has begun, or of one of its processes.")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--rank", type=int, help="of a process; without it the job's own log")
    parser.add_argument("-n", type=int, default=50, metavar="LINES", help="the last so many (50)")
    parser.add_argument("-f", action="store_true", help="go on as it grows")
    given = parser.parse_args(argv)
    path = log_file(given.run_dir, given.rank)
    sys.stdout.flush()
    os.execvp("tail", ["tail", "-n", str(given.n), *(["-F"] if given.f else []), str(path)])


def log_file(run_dir: str, rank: int | None) -> Path:
    """Returns the log of the newest job that has begun; ValueError says which there are."""
    records = _recorded(run_dir)
    runs = list(dict.fromkeys(record["run_dir"] for record in records))
    if len(runs) > 1:
        raise ValueError(f"{run_dir} holds a sweep; give one of its runs:\n" + "\n".join(runs))
    for record in reversed(records):
        of_job, of_ranks = Path(record["folder"]) / f"job-{record['job']}.log", Path(record["run_dir"]) / "slurm" / record["logs"]
        path = of_job if rank is None else of_ranks / f"rank-{rank}.log"
        if path.exists():
            return path
        ranks = sorted(int(p.stem.removeprefix("rank-")) for p in of_ranks.glob("rank-*.log"))
        if ranks:
            raise ValueError(f"{run_dir}: job {record['job']} has no process {rank}; there are {ranks[0]} to {ranks[-1]}")
    raise ValueError(f"{run_dir}: no job of it has begun; see `python launchers/slurm.py status {shlex.quote(run_dir)}`")


def _keys() -> str:
    lines = ["Clusters (cluster=NAME, from configs/cluster/ or DIR/cluster/)"]
    lines += [f"  {', '.join(names)}" for names in compose.groups([compose.RECIPES], Job).values()]
    lines += ["", "Keys of the job (KEY=VALUE); all others are the recipe's, see launchers/train.py --help"]
    for option in options(Job):
        default = "" if option.default == MISSING else show(option.default)
        lines.append(f"  {f'{option.key}={default}':<36} {describe(option.hint)}  # {option.comment}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
