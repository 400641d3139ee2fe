#!/usr/bin/env bash
# One torchrun a node, under SLURM. Submit it with the script and its arguments:
#   sbatch launch/slurm.sh launch/train.py experiment=forward_bypass
#   WATCH=1 sbatch launch/slurm.sh train.py --its --own arguments
# RANKS_PER_NODE: ranks a node (2). docs/launching.md says more.
#SBATCH --job-name=ddpcall
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

if [[ $# -eq 0 ]]; then
  echo "launch/slurm.sh: no script. Write: sbatch launch/slurm.sh launch/train.py experiment=forward_bypass" >&2
  exit 2
fi
script=("$@")
if [[ ${WATCH:-0} == 1 ]]; then
  script=(-m ddpcall watch "$@")
fi

# SLURM requeues what it preempts by itself. The time limit is told 120 s ahead, by USR1 to this shell.
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" \
  --nproc-per-node "${RANKS_PER_NODE:-2}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))" \
  --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
  "${script[@]}" &
steps=$!

# A trap runs when `wait` is interrupted, so wait again until the ranks have ended.
code=0
while true; do
  wait "$steps" && code=0 || code=$?
  kill -0 "$steps" 2>/dev/null || break
done
exit "$code"
