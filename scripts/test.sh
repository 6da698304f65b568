#!/usr/bin/env bash
# Lint, types and tests, in .venv, which is made if need be. Stops at the first that fails, with its exit code.
# With --slurm it first installs Slurm, by apt-get and as root, without which the tests of the Slurm recipes are skipped.
# usage: bash scripts/test.sh [--slurm] [arguments for pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
if [[ ${1:-} == --slurm ]]; then
  shift
  command -v slurmctld >/dev/null || { apt-get update && apt-get install --yes --no-install-recommends slurm-wlm munge; }
fi
setup dev

ruff check
ruff format --check
mypy
exec pytest "$@"
