#!/bin/bash
# Made by launchers/slurm.py. Each start goes on from the newest checkpoint.
#SBATCH --job-name=long
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@90
#SBATCH --output=/home/me/runs/x/slurm/job-%j.log
#SBATCH --open-mode=append

run_dir=/home/me/runs/x
overrides=()
cd /home/me || exit 1
if [ -e "$run_dir/slurm/finished" ]; then
  echo "an earlier job of the chain has finished this run"
  exit 0
fi
export LOGS=$run_dir/slurm/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
mkdir -p "$LOGS" || exit 1
rm -f "$run_dir/stopped.json"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST: $run_dir; logs of the processes in $LOGS"
export OMP_NUM_THREADS=1
export OMP_WAIT_POLICY=PASSIVE
ulimit -c 0
train=(python3 /opt/megapref/launchers/train.py --config-name dpo "${overrides[@]}")

trap : TERM USR1 # the processes save and stop, and this script goes on to its end
srun --kill-on-bad-exit=1 --label --distribution=block \
  bash -c 'trap "" USR1 TERM; python=$1; shift; exec "$python" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"' agent python3 \
  --nnodes="$SLURM_JOB_NUM_NODES" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --nproc-per-node=1 --signals-to-handle=SIGINT --no-python \
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
