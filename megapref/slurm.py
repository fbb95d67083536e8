"""The text of a Slurm job, as a pure function of what is asked for. Every value of the user's is quoted; only `cluster.setup` is shell."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import dirname

from megapref.cluster import Cluster, Job
from megapref.signals import EXIT_CODE, seconds

# What each process is started with: a log of its own, in which resumed runs go on.
RANK = 'exec >>"$LOGS/rank-${RANK:-$SLURM_PROCID}.log" 2>&1; trap "" USR1; exec "$@"'
# Slurm signals all processes of a step. The training processes heed it; torchrun waits for them.
AGENT = 'trap "" USR1 TERM; python=$1; shift; exec "$python" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"'

PREPARE = """\
export LOGS=$run_dir/slurm/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
mkdir -p "$LOGS" || exit 1
rm -f "$run_dir/stopped.json"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST: $run_dir; logs of the processes in $LOGS\""""

SKIP_IF_FINISHED = """\
if [ -e "$run_dir/slurm/finished" ]; then
  echo "an earlier job of the chain has finished this run"
  exit 0
fi"""

END = """\
code=$?
if [ $code = 0 ]; then
  touch "$run_dir/slurm/finished"
elif [ -e "$run_dir/stopped.json" ]; then
  code={stopped}
  cat "$run_dir/stopped.json"{requeue}
else
  echo "exit code $code; the ends of the logs that tell of an error:"
  grep -lE 'Traceback|megapref cannot run' "$LOGS"/rank-*.log | head -n 4 | while read -r log; do
    echo "== $log"
    tail -n 25 "$log"
  done
fi
exit $code
"""

# Slurm would count a job that ends by itself as over. Who has cancelled it wants that.
REQUEUE = """
  if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi"""


@dataclass(frozen=True)
class Part:
    """One run of the job: all of it, or an element of its array."""

    run_dir: str  # absolute
    overrides: list[str]


def script(job: Job, arguments: list[str], parts: list[Part], python: str, folder: str, cwd: str, checkout: str) -> str:
    """Returns what sbatch is to run: `launchers/train.py` of the checkout with `arguments` and each part's overrides, in the directory `cwd`.

    `python` is a command, `folder` where the job's own log goes. All paths are absolute.
    """
    quoted = shlex.quote
    cluster = job.cluster
    train = [python, f"{checkout}/launchers/train.py", *arguments]
    requeue = REQUEUE if cluster.requeue and job.chain == 1 else ""
    lines = [
        "#!/bin/bash",
        "# Made by launchers/slurm.py. Each start goes on from the newest checkpoint.",
        *(f"#SBATCH {option}" for option in _directives(job, parts, folder)),
        "",
        *_parts(parts),
        f"cd {quoted(cwd)} || exit 1",
        *([SKIP_IF_FINISHED] if job.chain > 1 else []),
        PREPARE,
        *(f"export {name}={quoted(str(value))}" for name, value in cluster.environment.items()),
        *(f"module load {quoted(name)} || exit 1" for name in cluster.modules),
        *cluster.setup,
        f"train=({shlex.join(train)} \"${{overrides[@]}}\")",
        "",
        "trap : TERM USR1 # the processes save and stop, and this script goes on to its end",
        " \\\n  ".join(_srun(job, parts, python, folder, cwd, checkout)),
        END.format(stopped=EXIT_CODE, requeue=requeue),
    ]
    return "\n".join(lines)


def _directives(job: Job, parts: list[Part], folder: str) -> Iterator[str]:
    cluster = job.cluster
    on_node = job.processes_per_node if cluster.launcher == "torchrun" else 1  # processes of a task
    gpus = f"{cluster.gpu_type}:{cluster.gpus_per_node}" if cluster.gpu_type else cluster.gpus_per_node
    log = f"{folder}/job-".replace("%", "%%") + ("%A_%a.log" if len(parts) > 1 else "%j.log")
    options: dict[str, str | int | bool | None] = {
        "job-name": job.name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "nodes": job.nodes,
        "ntasks-per-node": job.processes_per_node // on_node,
        "cpus-per-task": cluster.cpus_per_process and cluster.cpus_per_process * on_node,
        "gpus-per-node": gpus or None,
        "time": cluster.time_limit,
        "requeue" if cluster.requeue else "no-requeue": True,
        "signal": cluster.stop_before and f"USR1@{seconds(cluster.stop_before)}",
        "array": f"0-{len(parts) - 1}" if len(parts) > 1 else None,
        "output": log,
        "open-mode": "append",
        **cluster.sbatch,
    }
    for name, value in options.items():
        if value is not None and value is not False:
            yield f"--{name}" if value is True else f"--{name}={shlex.quote(str(value))}"


def _parts(parts: list[Part]) -> Iterator[str]:
    def assignments(part: Part) -> list[str]:
        return [f"run_dir={shlex.quote(part.run_dir)}", f"overrides=({shlex.join(part.overrides)})"]

    if len(parts) == 1:
        yield from assignments(parts[0])
        return
    yield "case $SLURM_ARRAY_TASK_ID in"
    for number, part in enumerate(parts):
        first, second = assignments(part)
        yield f"{number})\n  {first}\n  {second}\n  ;;"
    yield "esac"


def _srun(job: Job, parts: list[Part], python: str, folder: str, cwd: str, checkout: str) -> Iterator[str]:
    """The parts of the command line, each of which is to stand on a line."""
    cluster = job.cluster
    cpus = cluster.cpus_per_process and cluster.cpus_per_process * (job.processes_per_node if cluster.launcher == "torchrun" else 1)
    flags = ["--kill-on-bad-exit=1", "--label", "--distribution=block", *([f"--cpus-per-task={cpus}"] if cpus else []), *cluster.srun]
    yield shlex.join(["srun", *flags])
    if cluster.container:
        yield from _container(cluster, [checkout, cwd, dirname(folder), *(part.run_dir for part in parts)], cwd)
    if cluster.launcher == "torchrun":
        yield shlex.join(["bash", "-c", AGENT, "agent", python])
        where = '--nnodes="$SLURM_JOB_NUM_NODES" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"'
        yield f"{where} --nproc-per-node={job.processes_per_node} --signals-to-handle=SIGINT --no-python"
    yield f'{shlex.join(["bash", "-c", RANK, "rank"])} "${{train[@]}}"'


def _container(cluster: Cluster, own: list[str], cwd: str) -> Iterator[str]:
    container = cluster.container
    paths = [path for path in dict.fromkeys(own) if not any(path.startswith(f"{other}/") for other in own)]
    mounts = ",".join([*(f"{path}:{path}" for path in paths), *(m if ":" in m else f"{m}:{m}" for m in container.mounts)])
    if container.runtime == "pyxis":
        flags = [f"--container-image={container.image}", f"--container-mounts={mounts}", f"--container-workdir={cwd}", *container.flags]
        yield shlex.join(flags)
        return
    gpus = ["--nv"] if cluster.gpus_per_node and "--nv" not in container.flags else []
    yield shlex.join(["apptainer", "exec", "--bind", mounts, "--pwd", cwd, *gpus, *container.flags, container.image])
