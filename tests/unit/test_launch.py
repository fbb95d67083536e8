import re

import pytest

from megapref.launch import Process, detect, first_host, rank_at_a_guess

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
AGENT = {"TORCHELASTIC_RUN_ID": "none"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "dgx[07-08]",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "5"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "5"}
DAEMONS = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
TORCHRUN_PROCESS = Process("torchrun", 3, 4, 1, "a", 29500)
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n[1-2]"}


@pytest.mark.parametrize(
    ("environment", "process"),
    [
        ({}, Process()),
        (BATCH_SCRIPT, Process()),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, Process()),
        (TORCHRUN, TORCHRUN_PROCESS),
        (SRUN, Process("srun", 5, 8, 1, "dgx07", 20000 + 7 * 1234 + 2)),
        (SRUN | {"MASTER_ADDR": "b", "MASTER_PORT": "7"}, Process("srun", 5, 8, 1, "b", 7)),
        (MPICH, Process("mpirun", 5, 8, 5)),
        (OPEN_MPI, Process("mpirun", 5, 8, 5)),
        (MPICH | OPEN_MPI, Process("mpirun", 5, 8, 5)),
        # one started by the other
        (TORCHRUN | AGENT | SRUN, TORCHRUN_PROCESS),
        (TORCHRUN | AGENT | SRUN | MPICH, TORCHRUN_PROCESS),
        (TORCHRUN | SRUN | {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, TORCHRUN_PROCESS),
        (SRUN | MPICH, Process("srun", 5, 8, 1, "dgx07", 28640)),
        (SRUN | DAEMONS | MPICH, Process("mpirun", 5, 8, 5)),
        (SRUN | DAEMONS | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"} | OPEN_MPI, Process("mpirun", 5, 8, 5)),
    ],
)
def test_process(environment, process):
    assert detect(environment) == process


def without(environment: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key != name}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (without(TORCHRUN, "MASTER_ADDR"), ["RANK=3", "but not MASTER_ADDR;", "torchrun"]),
        (without(TORCHRUN, "RANK"), ["WORLD_SIZE=4", "but not RANK;"]),
        ({"WORLD_SIZE": "4"}, ["WORLD_SIZE=4", "but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT;"]),
        (TORCHRUN | {"RANK": "4"}, ["RANK=4", "WORLD_SIZE=4"]),
        (TORCHRUN | {"RANK": "first"}, ["RANK=first", "no number"]),
        (TORCHRUN | {"MASTER_PORT": "http"}, ["MASTER_PORT=http"]),
        (without(SRUN, "SLURM_LOCALID"), ["SLURM_PROCID=5", "but not SLURM_LOCALID;", "srun"]),
        (without(MPICH, "PMI_SIZE"), ["PMI_RANK=5", "but not PMI_SIZE;", "mpirun"]),
        (TORCHRUN | SRUN, ["RANK=3", "WORLD_SIZE=4", "SLURM_PROCID=5", "SLURM_STEP_NUM_TASKS=8"]),
        (TORCHRUN | MPICH, ["RANK=3", "PMI_RANK=5"]),
        (SRUN | MPICH | {"PMI_SIZE": "6"}, ["SLURM_STEP_NUM_TASKS=8", "PMI_SIZE=6"]),
        (SRUN | DAEMONS | MPICH | {"PMI_SIZE": "1", "PMI_RANK": "0"}, ["SLURM_STEP_NUM_TASKS=2", "PMI_SIZE=1"]),
        (MPICH | OPEN_MPI | {"PMI_RANK": "1"}, ["PMI_RANK=1", "OMPI_COMM_WORLD_RANK=5"]),
    ],
)
def test_what_is_missing_or_contradicts_is_named(environment, said):
    with pytest.raises(ValueError) as error:
        detect(environment)
    assert all(part in str(error.value) for part in said), error.value
    assert re.search("; (start|set)", str(error.value))


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n0", "n0"),
        ("n0,n5", "n0"),
        ("n[3,7-9],x1", "n3"),
        ("n[007-016]", "n007"),
        ("rack[1-2]n[4-5]-ib", "rack1n4-ib"),
        ("127.0.1.[10-11]", "127.0.1.10"),
        ("gpu-a-1,gpu-b-[2-3]", "gpu-a-1"),
    ],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


def test_one_process_speaks_of_an_environment_that_is_refused():
    assert [rank_at_a_guess({"RANK": "0", "SLURM_PROCID": rank}) for rank in "01"] == [0, 1]
