"""Which process of how many this is, as torchrun, srun or mpirun tell it by environment variables.

`detect` is a pure function of the environment. `connect` writes the variables that torch.distributed reads; under mpirun the processes first
agree, through mpi4py, on the address where they meet.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

# The variables of each launcher: rank, number of processes, rank on this machine, what else has to be there.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")  # Intel MPI, too
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")


@dataclass(frozen=True)
class Process:
    """One of the processes of a run. Where nobody has said where they meet, `master_addr` is None, and `connect` agrees on it."""

    launcher: Literal["torchrun", "srun", "mpirun", "none"] = "none"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the processes of this machine: the number of its GPU
    master_addr: str | None = None
    master_port: int | None = None


def detect(environment: Mapping[str, str]) -> Process:
    """Returns which process this is. ValueError names the variables where some are missing, or where two launchers contradict each other.

    torchrun wins inside srun or mpirun, which have started its agents; srun wins over the MPI variables it sets itself (--mpi=pmi2); mpirun
    wins inside a Slurm job, where srun has started its daemons, one per node.
    """
    torchrun, srun, mpirun = _torchrun(environment), _srun(environment), _mpirun(environment)
    if torchrun:
        is_agents = "TORCHELASTIC_RUN_ID" in environment  # else the variables were set by hand, maybe for a whole shell
        for other, names in ((srun, SRUN), (mpirun, MPICH + OPEN_MPI)):
            if other and not is_agents and (other.rank, other.world_size) != (torchrun.rank, torchrun.world_size):
                raise _contradiction(environment, TORCHRUN, names)
        return torchrun
    if srun and mpirun and srun.world_size != mpirun.world_size:
        daemons = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")) and srun.world_size < mpirun.world_size
        if not daemons and srun.world_size > 1:
            raise _contradiction(environment, SRUN, MPICH + OPEN_MPI)
        return mpirun
    return srun or mpirun or Process()


def rank_at_a_guess(environment: Mapping[str, str]) -> int:
    """Returns the first rank that any variable names, for an environment that `detect` refuses: one process should say so, not all."""
    values = [environment[names[0]] for names in (MPICH, OPEN_MPI, SRUN, TORCHRUN) if names[0] in environment]
    return next((int(value) for value in values if value.isdigit()), 0)


def connect(process: Process) -> None:
    """Sets the variables from which torch.distributed starts. Collective under mpirun. ValueError where mpi4py is missing or sees another world."""
    if process.launcher == "mpirun":
        process = _agree_through_mpi(process)
    if process.launcher != "none":
        values = (process.rank, process.world_size, process.local_rank, process.master_addr, process.master_port)
        os.environ.update(zip(TORCHRUN, map(str, values), strict=True))


def leave(process: Process) -> None:
    """Ends MPI, where it was started, at an end that all processes have come to. Of one that ends otherwise, mpirun stops the others."""
    if process.launcher == "mpirun":
        from mpi4py import MPI

        MPI.Finalize()


def first_host(nodelist: str) -> str:
    """Returns the first host of a Slurm node list: `n[3,7-9],x1` is n3."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodelist)[0])


def _torchrun(environment: Mapping[str, str]) -> Process | None:
    if not environment.keys() & set(TORCHRUN[:3]):
        return None
    rank, size, local_rank = _numbers(environment, TORCHRUN, "start the run with torchrun, or unset them")
    return Process("torchrun", rank, size, local_rank, environment["MASTER_ADDR"], _port(environment))


def _srun(environment: Mapping[str, str]) -> Process | None:
    if SRUN[1] not in environment:  # a batch script has the others, too, but is one process
        return None
    rank, size, local_rank = _numbers(environment, SRUN, "start the run with srun in a Slurm job")
    job, step = (environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    address = environment.get("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    port = _port(environment) if "MASTER_PORT" in environment else 20000 + (7 * int(job) + int(step)) % 10000
    return Process("srun", rank, size, local_rank, address, port)


def _mpirun(environment: Mapping[str, str]) -> Process | None:
    found = [names for names in (MPICH, OPEN_MPI) if names[0] in environment or names[1] in environment]
    processes = [Process("mpirun", *_numbers(environment, names, "start the run with mpirun")) for names in found]
    if len(set(processes)) > 1:
        raise _contradiction(environment, MPICH, OPEN_MPI)
    return processes[0] if processes else None


def _numbers(environment: Mapping[str, str], names: tuple[str, ...], remedy: str) -> tuple[int, int, int]:
    """The first three variables as numbers, all of `names` being there."""
    missing = [name for name in names if not environment.get(name)]
    there = ", ".join(f"{name}={environment[name]}" for name in names if environment.get(name))
    if missing:
        raise ValueError(f"the environment has {there}, but not {', '.join(missing)}; {remedy}")
    wrong = [f"{name}={environment[name]}" for name in names[:3] if not environment[name].isdigit()]
    if wrong:
        raise ValueError(f"the environment has {', '.join(wrong)}, which is no number; {remedy}")
    rank, size, local_rank = (int(environment[name]) for name in names[:3])
    if rank >= size:
        raise ValueError(f"the environment has {names[0]}={rank}, which must be less than {names[1]}={size}; {remedy}")
    return rank, size, local_rank


def _port(environment: Mapping[str, str]) -> int:
    port = environment["MASTER_PORT"]
    if not port.isdigit():
        raise ValueError(f"the environment has MASTER_PORT={port}, which is no number; set a free port, or leave it to the launcher")
    return int(port)


def _contradiction(environment: Mapping[str, str], *launchers: tuple[str, ...]) -> ValueError:
    sides = [", ".join(f"{name}={environment[name]}" for name in names if name in environment and "LOCAL" not in name) for names in launchers]
    return ValueError(f"two launchers contradict each other: {' against '.join(sides)}; start the run with one of them, and unset the other's")


def _agree_through_mpi(process: Process) -> Process:
    """The process as MPI knows it, meeting the others at a free port of the first one's machine."""
    try:
        import mpi4py
    except ImportError:
        raise ValueError("mpirun needs the mpi4py package, built for the MPI that mpirun is from; pip install mpi4py") from None
    mpi4py.rc.initialize = mpi4py.rc.finalize = False  # a process that dies would wait for the others in MPI's end
    from mpi4py import MPI

    MPI.Init()
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (process.rank, process.world_size):
        raise ValueError(
            f"mpirun says rank {process.rank} of {process.world_size}, mpi4py rank {world.rank} of {world.size}: it was built for another MPI "
            f"({MPI.Get_library_version().splitlines()[0]}); install the mpi4py that fits your mpirun"
        )
    machine = world.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank)
    meeting = None
    if world.rank == 0:
        on_one_machine = machine.size == world.size
        address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if on_one_machine else socket.gethostname())
        meeting = (address, int(os.environ.get("MASTER_PORT") or _free_port()))
    address, port = world.bcast(meeting)
    process = replace(process, local_rank=machine.rank, master_addr=address, master_port=port)
    machine.Free()
    return process


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
