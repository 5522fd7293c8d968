#!/usr/bin/env bash
# Runs RAHF end to end on a small synthetic data set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/parts.sh"

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
parse_out_options "$@"
prepare

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
