#!/usr/bin/env bash
# A Bayesian logistic regression on the flights that left New York in 2013, from a table to a summary: which arrive more than 15 minutes late?
# Works in demo/, and can be run again.
# usage: bash scripts/demo.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup demo

fit_options=(--workers 2)

fields="late x=hour,distance:standardize:float32 month:category carrier:category origin:category dest:category"

# Print a command as it could be typed, then run it.
run() {
  local word line='$'
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,-]+$ ]] || word="'$word'"
    line+=" $word"
  done
  printf '\n%s\n' "$line" >&2
  "$@"
}

run python scripts/demo/flights.py demo/flights.parquet
run dadvi ingest demo/flights.parquet demo/flights.zarr --missing drop --overwrite --fields "$fields"

code=0
run dadvi fit scripts/demo/model.py:flights demo/flights.zarr --out demo/run --overwrite "${fit_options[@]}" || code=$?
case $code in
  0) ;;
  3) echo "Exit code 3: the fit was stopped before its certificate reached the tolerance. The result is saved; the line above says how far" \
       "its means are predicted to be from the optimum." >&2 ;;
  *)
    echo "error: dadvi fit ended with exit code $code" >&2
    exit "$code"
    ;;
esac

run dadvi summary demo/run

cat >&2 <<END

The posterior lies in demo/run/posterior.zarr, beside the run's trace and settings. To go on with it:

  source .venv/bin/activate
  python -c 'import dadvi; posterior = dadvi.load_posterior("demo/run/posterior.zarr"); print(posterior.sample(1000)["by_carrier"].mean(0))'
END
