#!/usr/bin/env bash
# Inside a Slurm job: starts a Dask scheduler here and a worker for each task of the job, runs COMMAND with DADVI_SCHEDULER set, and ends them.
# SIGTERM goes on to COMMAND, whose exit code is that of the script.
# usage: with_cluster.sh COMMAND...       environment: INTERFACE, the network to use, such as ib0
set -euo pipefail

network=(${INTERFACE:+--interface "$INTERFACE"})
scratch=$(mktemp -d)                                # each worker's own
file=$PWD/.dask-scheduler-$SLURM_JOB_ID.json        # seen by every node
rm -f "$file"

dask scheduler "${network[@]}" --port 0 --no-dashboard --dashboard-address 127.0.0.1:0 --scheduler-file "$file" &
scheduler=$!
srun dask worker "${network[@]}" --nthreads 1 --no-dashboard --local-directory "$scratch" --death-timeout 120 --scheduler-file "$file" &
workers=$!
trap 'kill "$workers" "$scheduler" 2>/dev/null || true; wait; rm -rf "$file" "$scratch"' EXIT

until [[ -s $file ]]; do
  kill -0 "$scheduler" 2>/dev/null || { echo "error: the scheduler ended; see the log above" >&2; exit 1; }
  sleep 0.2
done
DADVI_SCHEDULER=$(sed -n 's/.*"address": *"\([^"]*\)".*/\1/p' "$file")
export DADVI_SCHEDULER

"$@" &
command=$!
signal=0 code=0
trap 'signal=1; kill -TERM "$command" 2>/dev/null || true' TERM
wait "$command" || code=$?
while ((signal)); do signal=0 code=0; wait "$command" || code=$?; done  # a signal ends `wait`, not the command
exit "$code"
