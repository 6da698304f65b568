#!/usr/bin/env bash
# A complete batch job: a table becomes a data set, a model is fitted to it, and the summary lies beside the posterior.
# Submit it to a batch system as it is, or run it by hand; it can be run again. Where the work is done is said by the environment: DADVI_SCHEDULER,
# DADVI_WORKERS or DADVI_SERIAL=1, and any other option of the fit likewise.
# usage: bash scripts/batch_job.sh TABLE "FIELDS" MODEL.py:NAME DIRECTORY [DATA.zarr]       DATA.zarr: DIRECTORY/data.zarr unless told, or a URL
# Exit codes are those of dadvi fit: 0 converged, 3 stopped before that (with a result), others as the README says.
set -euo pipefail

if (($# < 4)); then
  sed -n 's/^# usage: /usage: /p' "$0" >&2
  exit 2
fi
table=$1 fields=$2 model=$3 directory=$4 data=${5:-$4/data.zarr}

mkdir -p "$directory"
dadvi ingest "$table" "$data" --missing drop --overwrite --fields "$fields"

code=0
dadvi fit "$model" "$data" --out "$directory/run" --overwrite --json >"$directory/result.json" || code=$?
if ((code != 0 && code != 3)); then
  rm "$directory/result.json"
  exit "$code"
fi

dadvi summary "$directory/run" --json >"$directory/summary.json"
dadvi summary "$directory/run"
exit "$code"
