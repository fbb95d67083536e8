"""Everything a Slurm job is asked for beside the training config, as dataclasses, and `load_job()`, which fills and checks them.

The groups and keys of a command line that are fields of `Job` (`cluster=dgx_h100 nodes=16`) belong here, all others to the recipe.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from megapref.config import Count, Whole, load_settings
from megapref.plugins import show
from megapref.schema import MISSING
from megapref.signals import seconds


@dataclass(frozen=True)
class Container:
    runtime: Literal["pyxis", "apptainer"] = MISSING  # pyxis: srun --container-image (Enroot); apptainer: apptainer exec
    image: str = MISSING  # path, or the name of an image that the runtime takes
    mounts: list[str] = field(default_factory=list)  # PATH, HOST:CONTAINER or HOST:CONTAINER:ro, beside checkout, current and run directory
    flags: list[str] = field(default_factory=list)  # more of the runtime's own, such as --container-writable or --nv


@dataclass(frozen=True)
class Cluster:
    partition: str | None = None  # null: Slurm's default
    account: str | None = None  # who pays
    qos: str | None = None  # quality of service
    constraint: str | None = None  # features that nodes must have
    time_limit: str | None = None  # MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS, in quotes; null: the partition's
    gpus_per_node: Whole = 0  # 0: asks for none
    gpu_type: str | None = None  # where a cluster has several
    processes_per_node: Count | None = None  # null: one per GPU, or one
    cpus_per_process: Count | None = None  # null: Slurm's default
    sbatch: dict[str, str | int | bool] = field(default_factory=dict)  # more of sbatch's options: {reservation: night, exclusive: true}
    launcher: Literal["torchrun", "srun"] = "torchrun"  # one task per node, in which torchrun starts the processes; or one task per process
    srun: list[str] = field(default_factory=list)  # more of srun's flags, such as --cpu-bind=cores
    container: Container | None = None  # null: runs on the node itself
    environment: dict[str, str | int | float] = field(default_factory=dict)  # variables: NCCL, UCX and the like
    modules: list[str] = field(default_factory=list)  # for module load
    setup: list[str] = field(default_factory=list)  # lines of shell before the run, used as they are: source .venv/bin/activate
    python: str | None = None  # that has megapref's packages; null: the one that submits, in a container `python`
    requeue: bool = True  # the job goes on after preemption, a failed node or its time limit, from the last checkpoint
    stop_before: str | None = "90s"  # 90s, 10m, 1h: how long before the time limit the run is signalled to save and stop


@dataclass(frozen=True)
class Job:
    cluster: Cluster = field(default_factory=Cluster)
    nodes: Count = 1  # of the job, or of each element of a sweep
    name: str | None = None  # of the job; null: that of the run directory
    chain: Count = 1  # jobs one after the other, each of which goes on where the one before has stopped
    sweep: list[str] = field(default_factory=list)  # an array of runs, by the overrides of each, as in a shell: [loss=ipo, "loss=dpo run.seed=1"]

    @property
    def processes_per_node(self) -> int:
        return self.cluster.processes_per_node or self.cluster.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node


OF_JOB = {f.name for f in dataclasses.fields(Job)}
TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")
WORD = re.compile(r"[\w.,&|*:()@=\[\]/+][\w.,&|*:()@=\[\]/+-]*")
# What the script sets itself, and by what.
OWN_OPTIONS = {name.replace("_", "-"): f"cluster.{name}" for name in ("partition", "account", "qos", "constraint", "requeue")}
OWN_OPTIONS |= {"time": "cluster.time_limit", "signal": "cluster.stop_before", "no-requeue": "cluster.requeue", "nodes": "nodes", "array": "sweep"}
OWN_OPTIONS |= {"dependency": "chain", "job-name": "name", "output": "run.dir", "error": "run.dir", "open-mode": "cluster.requeue"}
OWN_OPTIONS |= {"ntasks-per-node": "cluster.processes_per_node", "ntasks": "cluster.processes_per_node", "cpus-per-task": "cluster.cpus_per_process"}
OWN_OPTIONS |= {"gpus-per-node": "cluster.gpus_per_node"}


def load_job(overrides: list[str], config_dir: str | None = None) -> Job:
    """Returns the job that the overrides describe, all of which are about fields of `Job`. ValueError lists everything that is wrong."""
    sweeps = [word.removeprefix("sweep=") for word in overrides if word.startswith("sweep=")]
    tree = {"sweep": _elements(sweeps[-1])} if sweeps else {}
    job = load_settings(Job, tree, [word for word in overrides if not word.startswith("sweep=")], config_dir)
    errors = [*_lines(job), *_options(job), *_values(job)]
    if errors:
        raise ValueError("\n".join(errors))
    return job


def key_of(override: str) -> str:
    """Returns the first part of an override's key: `cluster` of `~cluster.container`, `nodes` of `nodes=4`."""
    return re.split(r"[=.@]", override.lstrip("+~"), maxsplit=1)[0]


def _elements(text: str) -> list[str]:
    """The elements of `[a=1,b=[2,3],"c=4 d=5"]`; Hydra's grammar admits no `=` in a list."""
    if not re.fullmatch(r"\[.*\]", text, re.DOTALL):
        raise ValueError(f"sweep={text} must be a list of overrides; write sweep=[optimizer.lr=1e-6,optimizer.lr=3e-6]")
    parts = re.findall(r"""(?:"[^"]*"|'[^']*'|\[[^\]]*\]|\{[^}]*\}|[^,"'\[{])+""", text[1:-1])
    return [part.strip()[1:-1] if re.fullmatch(r"""\s*("[^"]*"|'[^']*')\s*""", part) else part.strip() for part in parts]


def _lines(job: Job) -> Iterator[str]:
    """Nothing may end the line that it stands on."""
    for key, value in _texts(dataclasses.asdict(job)):
        if not value.isprintable():
            yield f"{key}={show(value)} has a line break or another character that cannot be printed; leave it out"


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, dict | list):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _texts(value, f"{key}[{name}]" if isinstance(tree, list) else f"{key}.{name}".lstrip("."))
            yield from _texts(name, f"a name in {key}") if isinstance(name, str) else ()


def _options(job: Job) -> Iterator[str]:
    cluster = job.cluster
    for name in ("partition", "account", "qos", "constraint", "gpu_type"):
        value = getattr(cluster, name)
        if value is not None and not WORD.fullmatch(value):
            yield f"cluster.{name}={show(value)} is no name that Slurm has; use letters, digits and . , & | * : ( ) [ ] @ = / + - _"
    for name in cluster.sbatch:
        if not re.fullmatch(r"[a-z][a-z-]*", name):
            yield f"cluster.sbatch.{name} is no long name of an option; write it without dashes in front, such as reservation"
        elif name in OWN_OPTIONS:
            yield f"cluster.sbatch.{name} is set by {OWN_OPTIONS[name]}; use that"
    for name in cluster.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield f"cluster.environment.{name} is no name of a variable; use letters, digits and _"


def _values(job: Job) -> Iterator[str]:
    cluster = job.cluster
    if cluster.time_limit is not None and not TIME.fullmatch(cluster.time_limit):
        yield f'cluster.time_limit={show(cluster.time_limit)} is no time of Slurm\'s; write "90" (minutes), "4:00:00" or "2-00:00:00", in quotes'
    before = cluster.stop_before
    if before is not None and not 0 < (seconds(before) or 0) < 65536:
        yield f"cluster.stop_before={show(before)} must be a length of time below 18 hours; write 90s, 10m or 1h"
    for mount in cluster.container.mounts if cluster.container else ():
        if not re.fullmatch(r"/[^:,]*(:/[^:,]*(:\w+)?)?", mount):
            yield f"cluster.container.mounts: {show(mount)} must be PATH, HOST:CONTAINER or HOST:CONTAINER:ro with absolute paths without commas"
    if len(set(job.sweep)) < len(job.sweep):
        yield f"sweep={show(job.sweep)} has an element twice; leave one out"
