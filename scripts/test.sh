#!/usr/bin/env bash
# Lint, types and tests, in .venv, which is made if need be. Stops at the first that fails, with its exit code.
# With --slurm or --ssh it first installs Slurm or sshd, by apt-get and as root, without which the tests of their recipes are skipped.
# usage: bash scripts/test.sh [--slurm] [--ssh] [arguments for pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
packages=()
while [[ ${1:-} == --slurm || ${1:-} == --ssh ]]; do
  case $1 in
    --slurm) command -v slurmctld >/dev/null || packages+=(slurm-wlm munge) ;;
    --ssh) command -v sshd >/dev/null || packages+=(openssh-server) ;;
  esac
  shift
done
((${#packages[@]} == 0)) || { apt-get update && apt-get install --yes --no-install-recommends "${packages[@]}"; }
setup dev

ruff check
ruff format --check
mypy
# Three processes on two cores, as many tests wait: for workers, for clocks. A file's tests stay together, for its fixtures, and in
# order, which is that of the directories: what takes longest begins first.
exec pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
