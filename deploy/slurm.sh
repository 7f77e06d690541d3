#!/usr/bin/env bash
# Trains on the nodes of a Slurm allocation: sbatch deploy/slurm.sh nq-dro --run-dir /shared/runs/a
# Submit from the checkout, with its .venv set up and the checkout, the run directory and the cache
# on storage that every node sees. Two minutes before the time is over the run writes a checkpoint
# and ends with code 75; the job is then queued again and goes on from there.
#SBATCH --job-name=rlrag
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [ "$#" -eq 0 ]; then
  echo "error: name a recipe: sbatch deploy/slurm.sh RECIPE --run-dir DIR [flags]" >&2
  exit 2
fi
source .venv/bin/activate

head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
address="$(getent ahostsv4 "$head" | awk 'NR == 1 {print $1}'):6379"
# Whoever reaches Ray's ports can run code as you, unless a token is asked for. It lies in the home
# directory, which the nodes share.
export RAY_AUTH_MODE=token
ray get-auth-token --generate >/dev/null

# The script runs on the first node, which is the head, and so can tell the run there to stop.
pid_file="$(mktemp)"
srun ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
  env "RAY_ADDRESS=$address" bash -c 'echo $$ >"$0"; exec python -m jobs.train "$@"' "$pid_file" "$@" &
cluster=$!
early=
stop() {
  if [ -s "$pid_file" ]; then
    kill -TERM "$(cat "$pid_file")" || true  # it may just have ended by itself
  else  # Ray is still starting: there is no run that could write a checkpoint
    early=75
    kill -TERM "$cluster" || true
  fi
}
trap stop TERM

code=0
wait "$cluster" || code=$?
while kill -0 "$cluster" 2>/dev/null; do  # the signal ended the wait, not the run
  code=0
  wait "$cluster" || code=$?
done
code="${early:-$code}"
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
