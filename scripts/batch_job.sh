#!/usr/bin/env bash
# A complete batch job: a table becomes a data set, a model is fitted to it, and the summary lies beside the posterior.
# Submit it to a batch system as it is, or run it by hand. Where the work is done is said by the environment: DADVI_SCHEDULER, DADVI_WORKERS or DADVI_SERIAL=1, and any other
# option of the fit likewise. Run again, as when the system queues it again, it goes on: a data set on a disk is kept, and a run that has begun is resumed.
# To begin anew remove DIRECTORY, and DATA.zarr if it is elsewhere.
# usage: bash scripts/batch_job.sh TABLE "FIELDS" MODEL.py:NAME DIRECTORY [DATA.zarr]       DATA.zarr: DIRECTORY/data.zarr unless told, or a URL
# Exit codes are those of dadvi fit: 0 converged, 3 stopped before that (with a result) or interrupted (without), others as the README says.
set -euo pipefail

if (($# < 4)); then
  sed -n 's/^# usage: /usage: /p' "$0" >&2
  exit 2
fi
table=$1 fields=$2 model=$3 directory=$4 data=${5:-$4/data.zarr}
run=$directory/run result=$directory/result.json

mkdir -p "$directory"
if [[ -e $run/settings.json ]]; then
  fit=(dadvi resume "$run")
else
  fit=(dadvi fit "$model" "$data" --out "$run")
  [[ -e $data/zarr.json ]] || dadvi ingest "$table" "$data" --missing drop --overwrite --fields "$fields"
fi

"${fit[@]}" --json >"$result" &
running=$!
signal=0 code=0
trap 'signal=1; kill -TERM "$running" 2>/dev/null || true' TERM INT
wait "$running" || code=$?
while ((signal)); do signal=0 code=0; wait "$running" || code=$?; done  # a signal ends `wait`, not the fit
trap - TERM INT
if ((code != 0 && code != 3)) || [[ ! -s $result ]]; then
  rm "$result"
  exit "$code"
fi

dadvi summary "$run" --json >"$directory/summary.json"
dadvi summary "$run"
exit "$code"
