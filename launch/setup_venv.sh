# Functions that the scripts share: they make one virtual environment for all, .venv in the repository.
# shellcheck shell=bash

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv

die() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

# usable_python COMMAND MODULE: whether all packages have wheels for this Python (TensorFlow has none for 3.14),
# and it has the module.
usable_python() {
  "$1" -c "import sys, $2; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" 2>/dev/null
}

# find_python: prints the command of a usable Python.
find_python() {
  local candidate candidates=(python3 python3.13 python3.12 python3.11)
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if usable_python "$candidate" ensurepip; then
      echo "$candidate"
      return
    fi
  done
  if [[ -n ${PYTHON:-} ]]; then
    die "$PYTHON is no Python 3.11, 3.12 or 3.13 with the venv module"
  fi
  die "no Python 3.11, 3.12 or 3.13 with the venv module found (on Debian or Ubuntu: apt install" \
    "python3-venv); if it is not on the PATH, name it with --python"
}

# check_compiler PYTHON: dies if pip can't install editdistance, which seqio needs and which has no wheel for 3.13.
check_compiler() {
  "$1" -c "
import importlib.util, os, shutil, sys, sysconfig
compiler = os.environ.get('CXX') or sysconfig.get_config_var('CXX') or 'c++'
header = os.path.join(sysconfig.get_path('include'), 'Python.h')
compiles = shutil.which(compiler.split()[0]) and os.path.exists(header)
sys.exit(sys.version_info >= (3, 13) and not importlib.util.find_spec('editdistance') and not compiles)" ||
    die "on Python 3.13 a package must be compiled, for which a C++ compiler or Python's headers are missing:" \
      "apt-get install g++ python3.13-dev (on Debian or Ubuntu), or take Python 3.11 or 3.12"
}

# setup_venv EXTRA: makes the environment if needed, and installs the project with an extra, unless that was done
# since the last change of setup.py.
setup_venv() {
  local extra=$1 stamp=$venv/.installed-$1 python wanted
  wanted=$(cksum <"$root/setup.py")
  if ! usable_python "$venv/bin/python" pip; then
    python=$(find_python)
    check_compiler "$python"
    echo "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
  fi
  if [[ $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
    check_compiler "$venv/bin/python"
    echo "installing the project and its '$extra' packages into $venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "${root}[$extra]"
    echo "$wanted" >"$stamp"
  fi
}
