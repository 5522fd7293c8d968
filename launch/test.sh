#!/usr/bin/env bash
# Linter, formatter and the test suite, as continuous integration runs them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

usage() {
  cat <<'USAGE'
Usage: bash launch/test.sh [--python PYTHON] [PYTEST ARGUMENTS...]

Checks the code with ruff, then runs the tests: all, or those that the arguments choose, for example
"tests/network -k decoder".

  --python PYTHON    makes the virtual environment with this Python (3.11 to 3.13)
  --help             prints this

The virtual environment is .venv in the repository, or $VENV.
USAGE
}

arguments=()
while (($#)); do
  case $1 in
    --help | -h) usage; exit ;;
    --python=*) PYTHON=${1#*=} ;;
    --python)
      (($# > 1)) || die "$1 needs a value; see --help"
      PYTHON=$2
      shift ;;
    *) arguments+=("$1") ;;
  esac
  shift
done

# The report's page is tested in a browser.
install_chromium() {
  [[ -x /usr/bin/chromium && -x /usr/bin/chromedriver ]] && return
  if ((EUID)) || ! command -v apt-get >/dev/null; then
    die "the tests need Debian's chromium and chromium-driver: sudo apt-get install chromium chromium-driver"
  fi
  echo "installing chromium"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null
}

install_chromium
setup_venv test
cd "$root"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
# Two processes, since most tests compile, which is single-threaded; a file's tests share fixtures.
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile ${arguments[@]+"${arguments[@]}"}
