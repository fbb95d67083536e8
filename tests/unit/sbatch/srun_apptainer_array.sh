#!/bin/bash
# Made by launchers/slurm.py. Each start goes on from the newest checkpoint.
#SBATCH --job-name=two
#SBATCH --partition=gpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=a100:4
#SBATCH --time=8:00:00
#SBATCH --no-requeue
#SBATCH --signal=USR1@300
#SBATCH --array=0-1
#SBATCH --output=/home/me/runs/x/slurm/job-%A_%a.log
#SBATCH --open-mode=append

case $SLURM_ARRAY_TASK_ID in
0)
  run_dir=/home/me/runs/x/0
  overrides=(loss=ipo)
  ;;
1)
  run_dir=/home/me/runs/x/1
  overrides=(loss=dpo run.seed=1)
  ;;
esac
cd /home/me || exit 1
export LOGS=$run_dir/slurm/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
mkdir -p "$LOGS" || exit 1
rm -f "$run_dir/stopped.json"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST: $run_dir; logs of the processes in $LOGS"
export OMP_NUM_THREADS=8
export NCCL_SOCKET_IFNAME='^lo,docker0'
module load apptainer || exit 1
train=(python3 /opt/megapref/launchers/train.py --config-name dpo "${overrides[@]}")

trap : TERM USR1 # the processes save and stop, and this script goes on to its end
srun --kill-on-bad-exit=1 --label --distribution=block --cpus-per-task=16 \
  apptainer exec --bind /opt/megapref:/opt/megapref,/home/me:/home/me --pwd /home/me --nv megapref.sif \
  bash -c 'exec >>"$LOGS/rank-${RANK:-$SLURM_PROCID}.log" 2>&1; trap "" USR1; exec "$@"' rank "${train[@]}"
code=$?
if [ $code = 0 ]; then
  touch "$run_dir/slurm/finished"
elif [ -e "$run_dir/stopped.json" ]; then
  code=85
  cat "$run_dir/stopped.json"
else
  echo "exit code $code; the ends of the logs that tell of an error:"
  grep -lE 'Traceback|megapref cannot run' "$LOGS"/rank-*.log | head -n 4 | while read -r log; do
    echo "== $log"
    tail -n 25 "$log"
  done
fi
exit $code
