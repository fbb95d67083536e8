#!/bin/bash
# Made by launchers/slurm.py. Each start goes on from the newest checkpoint.
#SBATCH --job-name=big
#SBATCH --partition=batch
#SBATCH --account=chem
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=112
#SBATCH --gpus-per-node=8
#SBATCH --time=4:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@600
#SBATCH --output=/home/me/runs/x/slurm/job-%j.log
#SBATCH --open-mode=append
#SBATCH --exclusive

run_dir=/home/me/runs/x
overrides=(parallel=tp2 run.resume=auto)
cd /home/me || exit 1
export LOGS=$run_dir/slurm/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
mkdir -p "$LOGS" || exit 1
rm -f "$run_dir/stopped.json"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST: $run_dir; logs of the processes in $LOGS"
export OMP_NUM_THREADS=14
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NCCL_IB_HCA==mlx5_0,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_9,mlx5_10,mlx5_11
export UCX_TLS=rc,cuda_copy,cuda_ipc
train=(python3 /opt/megapref/launchers/train.py --config-name dpo "${overrides[@]}")

trap : TERM USR1 # the processes save and stop, and this script goes on to its end
srun --kill-on-bad-exit=1 --label --distribution=block --cpus-per-task=112 --mpi=none \
  '--container-image=nvcr.io#nvidia/pytorch:25.09-py3' --container-mounts=/opt/megapref:/opt/megapref,/home/me:/home/me --container-workdir=/home/me \
  bash -c 'trap "" USR1 TERM; python=$1; shift; exec "$python" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"' agent python3 \
  --nnodes="$SLURM_JOB_NUM_NODES" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --nproc-per-node=8 --signals-to-handle=SIGINT --no-python \
  bash -c 'exec >>"$LOGS/rank-${RANK:-$SLURM_PROCID}.log" 2>&1; trap "" USR1; exec "$@"' rank "${train[@]}"
code=$?
if [ $code = 0 ]; then
  touch "$run_dir/slurm/finished"
elif [ -e "$run_dir/stopped.json" ]; then
  code=85
  cat "$run_dir/stopped.json"
  if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
else
  echo "exit code $code; the ends of the logs that tell of an error:"
  grep -lE 'Traceback|megapref cannot run' "$LOGS"/rank-*.log | head -n 4 | while read -r log; do
    echo "== $log"
    tail -n 25 "$log"
  done
fi
exit $code
