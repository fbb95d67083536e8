"""A real Slurm on this machine for the tests: munged, slurmctld and one slurmd per node, as children of this process, without systemd.

Nodes are addresses of the loopback network and bear them as names, so that nothing has to be added to /etc/hosts. There is a partition `low`
whose jobs are requeued when the partition `high` wants their nodes.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from distributed_run import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
NODES = ("127.0.1.10", "127.0.1.11")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CryptoType=crypto/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=20
OverTimeLimit=1
RebootProgram=/bin/true
SlurmdParameters=config_overrides
PropagateResourceLimits=CORE
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def install() -> None:
    """Installs Debian's Slurm where a program of it is missing; RuntimeError says what to do where that cannot be done."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if not missing:
        return
    by_hand = f"install {' '.join(PACKAGES)} with your package manager"
    if shutil.which("apt-get") is None:
        raise RuntimeError(f"the Slurm tests need {', '.join(missing)}, and there is no apt-get; {by_hand}")
    as_root = [] if os.getuid() == 0 else ["sudo", "-n"]
    if as_root and (shutil.which("sudo") is None or subprocess.run([*as_root, "true"], capture_output=True).returncode):
        raise RuntimeError(f"the Slurm tests need {', '.join(missing)}, and neither root nor sudo is at hand to install them; {by_hand}")
    apt = [*as_root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run([*apt, *command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"apt-get {command[0]} failed; {by_hand}\n{done.stderr[-2000:]}")


@contextlib.contextmanager
def cluster(folder: Path, cpus: int = 4) -> Iterator[dict[str, str]]:
    """Starts the daemons with their state in `folder` and yields the environment for sbatch and its like; stops them and their jobs at the end."""
    install()
    user, host = pwd.getpwuid(os.getuid()).pw_name, socket.gethostname().split(".")[0]
    ports = [free_port() for _ in range(1 + len(NODES))]
    node = "NodeName={name} NodeHostname={host} NodeAddr={name} Port={port} CPUs={cpus} CoresPerSocket={cpus} RealMemory=1000"
    nodes = "\n".join(node.format(name=name, host=host, port=port, cpus=cpus) for name, port in zip(NODES, ports[1:], strict=True))
    for path in ("munge", "state", *(f"spool-{name}" for name in NODES)):
        (folder / path).mkdir(parents=True, mode=0o755)
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, user=user, host=host, ports=ports, nodes=nodes))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # is loaded in any case; this one asks for no systemd
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o400)
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    daemons: list[subprocess.Popen] = []

    def start(*command: str) -> None:
        with (folder / "output.log").open("ab") as output:
            daemons.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output))

    try:
        munge = folder / "munge"
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        start("munged", "--foreground", "--force", *(f"--{option}={munge / file}" for option, file in files.items()))
        _wait(lambda: (munge / "socket").exists(), "munged", folder)
        start("slurmctld", "-D", "-c")
        for name in NODES:
            start("slurmd", "-D", "-N", name)
        idle = ["sinfo", "--noheader", "--Node", "--partition=low", "--states=idle", "--format=%N"]
        _wait(lambda: len(subprocess.run(idle, env=environment, capture_output=True).stdout.split()) == len(NODES), "Slurm", folder)
        yield environment
        subprocess.run(["scancel", f"--user={user}"], env=environment, check=True)
        running = ["squeue", "--noheader", "--states=all", "--format=%T"]
        over = {"CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL"}
        _wait(lambda: set(subprocess.run(running, env=environment, capture_output=True, text=True).stdout.split()) <= over, "the end of jobs", folder)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _wait(is_so, what: str, folder: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            logs = "\n".join(f"== {log.name}\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*.log")))
            raise RuntimeError(f"waited {seconds:g} s for {what}\n{logs}")
        time.sleep(0.1)
