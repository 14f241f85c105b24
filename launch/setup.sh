# shellcheck shell=bash
# Sourced by the other scripts: goes to the repository, makes a virtual environment and installs into it what the
# named requirements files say. Does nothing when that is done already.
#
#   . launch/setup.sh requirements.txt
#
# PYTHON names the interpreter (default: python3.11, .12, .13 or python3, the first that will do), VENV the folder
# (default: .venv).

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
venv=${VENV:-.venv}

if [ ! -x "$venv/bin/pip" ]; then # the last that is made
  for python in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      "$python" -m venv "$venv" || exit 1
      break
    fi
  done
  if [ ! -x "$venv/bin/python" ]; then
    echo "error: no Python 3.11, 3.12 or 3.13 found; name one with PYTHON=/path/to/python" >&2
    exit 2
  fi
fi

for file in "$@"; do
  stamp="$venv/installed-$(cksum <"$file" | tr ' ' -)"
  if [ ! -e "$stamp" ]; then
    echo "installing $file into $venv (a few minutes, once)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file" || exit 1
    touch "$stamp"
  fi
done
case $venv in
/*) PATH="$venv/bin:$PATH" ;;
*) PATH="$PWD/$venv/bin:$PATH" ;;
esac
export PATH
