#!/usr/bin/env bash
# Lint, types and tests, in .venv, which is made if need be. Stops at the first that fails, with its exit code.
# usage: bash scripts/test.sh [arguments for pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup dev

ruff check
ruff format --check
mypy
exec pytest "$@"
