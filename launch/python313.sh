#!/usr/bin/env bash
# Linter, type checker and tests on Python 3.13, with the newest JAX for it, on any machine.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'USAGE'
Usage: bash launch/python313.sh [--dir DIR] [--commit REV] [PYTEST ARGUMENTS...]

Runs launch/test.sh on Python 3.13, in Debian 13 within a folder. The arguments choose tests, for example
"tests/network -k decoder". Needs root, and debootstrap (apt-get install debootstrap). The first run takes 11 GB
of the disk; later ones use the folder again.

  --dir DIR       the folder (default: /var/tmp/richhf_jax-python313); remove it when it is no longer needed
  --commit REV    the version to test: a commit, tag or branch (default: HEAD, if all is committed)
  --help          prints this
USAGE
}

dir=/var/tmp/richhf_jax-python313
arguments=()
while (($#)); do
  case $1 in
    --help | -h) usage; exit ;;
    --dir=*) dir=${1#*=} ;;
    --commit=*) option[commit]=${1#*=} ;;
    --dir | --commit)
      (($# > 1)) || die "$1 needs a value; see --help"
      case $1 in
        --dir) dir=$2 ;;
        --commit) option[commit]=$2 ;;
      esac
      shift ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
[[ -n $dir ]] || die "--dir needs a value; see --help"

system=$dir/debian13
code=$system/opt/richhf_jax
packages=(ca-certificates g++ git python3-dev python3-venv)

# inside COMMAND...: runs a command in Debian 13, with the machine's network. The mounts end with the command.
inside() {
  # shellcheck disable=SC2016
  unshare --mount --pid --fork --kill-child bash -euc '
    mount -t proc proc "$0/proc"
    mount --rbind /dev "$0/dev"
    exec chroot "$0" env --unset=PYTHON --unset=PYTHONPATH --unset=TMPDIR --unset=VENV --unset=VIRTUAL_ENV \
      HOME=/root LC_ALL=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive "$@"
  ' "$system" "$@"
}

make_system() {
  echo "unpacking Debian 13 into $system"
  mkdir -p "$dir"
  : >"$dir/debootstrap.log"
  rm -rf --one-file-system "$system.part"
  mkdir "$system.part"
  unshare --mount debootstrap --variant=minbase trixie "$system.part" >"$dir/debootstrap.log" 2>&1 ||
    die "debootstrap failed; $dir/debootstrap.log ends with: $(tail -n 1 "$dir/debootstrap.log")"
  mv "$system.part" "$system"
}

install_packages() {
  # Several processes find each other by the name of the machine.
  cp /etc/resolv.conf /etc/hosts "$system/etc/"
  inside apt-get update -qq
  inside apt-get install -y -qq --no-install-recommends "${packages[@]}" >"$dir/apt.log"
  # A proxy of the machine may have a certificate of its own.
  if [[ -f /etc/ssl/certs/ca-certificates.crt ]]; then
    cp /etc/ssl/certs/ca-certificates.crt "$system/etc/ssl/certs/"
  fi
  echo "${packages[@]}" >"$dir/packages"
}

check_out() {
  [[ -d $code ]] || git clone --quiet --no-checkout "$root" "$code"
  git -C "$code" fetch --quiet "$root" "$commit"
  git -C "$code" checkout --quiet --force --detach "$commit"
  git -C "$code" clean --quiet --force -d
}

[[ $(id -u) == 0 ]] || die "only root can make a folder with Debian: sudo bash launch/python313.sh"
pin_version
command -v debootstrap >/dev/null || die "debootstrap is missing: apt-get install debootstrap"
# The log is the first file that this script writes there.
[[ -z $(ls -A "$dir" 2>/dev/null) || -f $dir/debootstrap.log ]] ||
  die "$dir holds files that are not of this script: name an empty or new folder with --dir"
[[ -d $system ]] || make_system
[[ $(cat "$dir/packages" 2>/dev/null) == "${packages[*]}" ]] || install_packages
check_out
inside bash /opt/richhf_jax/launch/test.sh ${arguments[@]+"${arguments[@]}"}
