# Functions for scripts that run parts one after the other: their options, and the parts, which Ctrl-C stops.
# shellcheck shell=bash
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

# parse_out_options ARGUMENTS...: sets out, PYTHON and overrides. The script defines `usage` and out's default.
overrides=()
parse_out_options() {
  while (($#)); do
    case $1 in
      --help | -h) usage; exit ;;
      --out=*) out=${1#*=} ;;
      --python=*) PYTHON=${1#*=} ;;
      --out | --python)
        (($# > 1)) || die "$1 needs a value; see --help"
        if [[ $1 == --out ]]; then out=$2; else PYTHON=$2; fi
        shift ;;
      --gin.*=*) overrides+=("$1") ;;
      *) die "what is '$1'? See --help" ;;
    esac
    shift
  done
  [[ $out == /* ]] || out=$PWD/$out
}

# prepare: makes the environment for training, and goes to the repository.
prepare() {
  setup_venv train
  cd "$root" || exit
  export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}
  # On a CPU, XLA asks the system for its temporary memory, some 270 MB, at every step. Huge pages save most of the
  # page faults, and a fifth of the time. A glibc older than 2.35 ignores this.
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
  # Pretraining and finetuning run the same compiled step.
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/compiled}
  trap stop INT TERM
}

# At Ctrl-C, training saves a checkpoint and exits with 0; the next part must not start. The parts are in the
# background, because bash minds a signal only between foreground commands.
child=
stop() {
  [[ -z $child ]] || { kill -TERM "$child" && wait "$child"; } 2>/dev/null || true
  echo "stopped; the same command continues"
  exit 130
}

minutes() { printf '%d:%02d min' $(($1 / 60)) $(($1 % 60)); }

parts=()

# part TITLE MODULE ARGUMENTS...: adds a Python module to what will run.
part() { parts+=(${parts[@]+--then} "$@"); }

# run_parts IMPORTS: runs them in turn; the modules named are imported once for all. Where `finished` names a folder,
# it keeps which parts are, and they are left out.
run_parts() {
  set -m # In a group of their own, so that Ctrl-C reaches them once, through the trap.
  "$venv/bin/python" -m launch.in_turn ${finished:+"--finished=$finished"} "$1" "${parts[@]}" &
  child=$!
  set +m
  wait "$child"
  child='' parts=()
}

# run_gin TITLE MODULE GIN_FILE MODEL_DIR [ARGUMENTS...]: adds a module that gin configures.
run_gin() {
  part "$1" "$2" --gin_file="$3" --gin.MODEL_DIR="\"$4\"" --tfds_data_dir="$out/data" \
    "${@:5}" ${overrides[@]+"${overrides[@]}"}
}
