# Sourced by the other scripts, from the repository's root: makes .venv and installs this checkout in it.
# shellcheck shell=bash

# setup EXTRA installs dadvi with that extra of pyproject.toml, in the versions of constraints.txt, and puts .venv/bin first in PATH.
# The second run takes no time: a stamp in .venv holds what was installed. While .venv is being made, .venv.partial exists beside it,
# so that what a run left unfinished is made anew. A .venv that was there before is used, and never removed.
setup() {
  local extra=$1 stamp=.venv/.installed-$1 python=${PYTHON:-python3} wanted
  if [[ -e .venv.partial ]]; then
    echo "An earlier run did not finish making .venv: making it anew." >&2
    rm -rf .venv .venv.partial
  fi
  if [[ ! -e .venv ]]; then
    if ! command -v "$python" >/dev/null; then
      echo "error: there is no '$python'; install Python 3.11 or later, or name it: PYTHON=/path/to/python3 bash $0" >&2
      return 2
    fi
    require_python "$python" || return 2
    echo "Making .venv with $("$python" --version) ..." >&2
    mkdir .venv.partial
    if ! "$python" -m venv .venv; then
      echo "error: '$python -m venv' failed; on Debian and Ubuntu it needs the package python3-venv" >&2
      return 2
    fi
  fi
  require_python .venv/bin/python || return 2
  wanted=$(pwd; cat pyproject.toml constraints.txt)
  if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    echo "Installing dadvi[$extra] in .venv; the first time this takes minutes, most of them for torch ..." >&2
    rm -f "$stamp"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extra]" || return
    printf '%s\n' "$wanted" >"$stamp"
  fi
  rm -rf .venv.partial
  export PATH="$PWD/.venv/bin:$PATH"
}

require_python() {
  if ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $1 is $("$1" --version 2>&1), and dadvi needs Python 3.11 or later." \
      "Name another one, PYTHON=/path/to/python3 bash $0, and remove .venv if it is there" >&2
    return 2
  fi
}
