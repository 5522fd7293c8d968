#!/usr/bin/env bash
# Runs RAHF end to end on a small synthetic data set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

usage() {
  cat <<'USAGE'
Usage: bash launch/quickstart.sh [--out DIR] [--python PYTHON] [--gin.NAME=VALUE ...]

Builds the synthetic data sets, pretrains on captions, finetunes on rich feedback, evaluates on the
test split, writes DIR/report.html, scores an image and exports the model. If it is stopped, the same command
continues.

  --out DIR          folder of all results (default: runs/quickstart in the repository)
  --python PYTHON    makes the virtual environment with this Python (3.11 to 3.13)
  --gin.NAME=VALUE   overrides a setting of training and evaluation, for example --gin.TRAIN_STEPS=100
  --help             prints this

The virtual environment is .venv in the repository, or $VENV.
USAGE
}

out=$root/runs/quickstart
overrides=()
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

setup_venv train
cd "$root"
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}
# On a CPU, XLA asks the system for its temporary memory, some 270 MB, at every step. Huge pages save most of the
# page faults, and a fifth of the time. A glibc older than 2.35 ignores this.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
# Pretraining and finetuning run the same compiled step.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/compiled}
# At Ctrl-C, training saves a checkpoint and exits with 0; the next part must not start. The parts are in the
# background, because bash minds a signal only between foreground commands.
child=
stop() {
  [[ -z $child ]] || { kill -TERM "$child" && wait "$child"; } 2>/dev/null || true
  echo "stopped; the same command continues"
  exit 130
}
trap stop INT TERM

minutes() { printf '%d:%02d min' $(($1 / 60)) $(($1 % 60)); }

parts=()

# part TITLE MODULE ARGUMENTS...: adds a Python module to what will run.
part() { parts+=(${parts[@]+--then} "$@"); }

# run_parts IMPORTS: runs them in turn; the modules named are imported once for all.
run_parts() {
  set -m # In a group of their own, so that Ctrl-C reaches them once, through the trap.
  "$venv/bin/python" -m launch.in_turn "$1" "${parts[@]}" &
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

begin=$SECONDS
part "1/6 data sets" richhf_jax.datasets --data_dir="$out/data"
run_gin "2/6 pretraining on captions" richhf_jax.train experiments/quickstart_pretrain.gin "$out/pretrain"
initial=--gin.INITIAL_CHECKPOINT_PATH="\"$out/pretrain\"" # Evaluation shows its loss curves, too.
run_gin "3/6 finetuning" richhf_jax.train experiments/quickstart.gin "$out/finetune" "$initial"
run_gin "4/6 evaluation" richhf_jax.eval experiments/quickstart.gin "$out/finetune" "$initial"
run_parts richhf_jax.training_log,richhf_jax.split_predictions,tasks
# Results of an earlier run, of another model, can't be continued.
rm -rf "$out/predictions" "$out/exported"
part "5/6 prediction" richhf_jax.predict --checkpoint="$out/finetune" --out="$out/predictions" --overlay \
  docs/example.png --prompt="two large blue crosses and a green star"
part "6/6 export" richhf_jax.export --checkpoint="$out/finetune" --to=stablehlo --out="$out/exported"
run_parts richhf_jax.predict.pipeline,richhf_jax.export.program

# The newest report, because shorter runs may have left others.
report=$(find "$out/finetune/inference_eval" -name report.html -exec ls -t {} + | head -n 1)
cp "$report" "$out/report.html"
echo
echo "done in $(minutes $((SECONDS - begin))), package installation left out"
echo "open $out/report.html"
