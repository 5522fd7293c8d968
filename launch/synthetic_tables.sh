#!/usr/bin/env bash
# Trains RAHF and its baselines on the synthetic data, and puts them side by side in the paper's four tables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/parts.sh"

usage() {
  cat <<'USAGE'
Usage: bash launch/synthetic_tables.sh [--out DIR] [--python PYTHON] [--gin.NAME=VALUE ...]

Builds the synthetic data sets, trains and evaluates RAHF's two variants, CLIP (off the shelf, its gradient,
finetuned) and ResNet (scores, heatmaps), and writes the paper's four tables: DIR/tables.txt, DIR/tables.md
and DIR/tables.html. It ends with a check of what the tables should show. If it is stopped, the same command
continues; parts that are finished are left out.

  --out DIR          folder of all results (default: runs/synthetic_tables in the repository)
  --python PYTHON    makes the virtual environment with this Python (3.11 to 3.13)
  --gin.NAME=VALUE   overrides a setting of every training and evaluation, for example --gin.TRAIN_STEPS=20
  --help             prints this

What it takes on 2 quiet CPU cores, about:

  data sets                                           0:20 min
  RAHF, multi-head: pretraining, finetuning           2:20 min
  RAHF, augmented prompt: the same                    3:50 min
  CLIP: contrastive training                          6:30 min
  CLIP: finetuning                                    0:50 min
  ResNet: scores                                      1:00 min
  ResNet: heatmaps                                    2:30 min
  seven evaluations, and the tables                   1:30 min

There is no PickScore here: it is CLIP finetuned on people's choices between images, and the synthetic data
have none. The virtual environment is .venv in the repository, or $VENV.
USAGE
}

out=$root/runs/synthetic_tables
parse_out_options "$@"
# Parts of other settings would not be left out, or be continued, without a word.
settings=$out/settings.txt
given=$(printf '%s\n' ${overrides[@]+"${overrides[@]}"})
if [[ -e $settings ]]; then
  [[ $(<"$settings") == "$given" ]] ||
    die "$out was begun with other settings (${settings##*/}: $(tr '\n' ' ' <"$settings")); name another --out"
fi
prepare
mkdir -p "$out"
echo "$given" >"$settings"
usage | sed -n '/^What it takes/,/^$/p;/^  .* min$/p' | uniq

finished=$out/finished
names=() results=()

# trained NAME TITLE GIN_FILE [ARGUMENTS...]: adds a training to what will run.
trained() { run_gin "$2" richhf_jax.train "experiments/$3.gin" "$out/$1" "${@:4}"; }

# evaluated ROW NAME GIN_FILE [ARGUMENTS...]: adds an evaluation, and a row of the tables.
evaluated() {
  run_gin "$1: evaluation of $2" richhf_jax.eval "experiments/$3.gin" "$out/$2" "${@:4}"
  names+=("$1") results+=("$out/$2")
}

# from NAME: the setting that starts from a training's parameters.
from() { echo "--gin.INITIAL_CHECKPOINT_PATH=\"$out/$1\""; }

begin=$SECONDS
part "data sets" richhf_jax.datasets --data_dir="$out/data"
trained rahf_pretrain "RAHF, multi-head: pretraining" quickstart_pretrain
trained rahf "RAHF, multi-head: finetuning" quickstart "$(from rahf_pretrain)"
evaluated "RAHF, multi-head" rahf quickstart "$(from rahf_pretrain)"
trained rahf_augmented_prompt_pretrain "RAHF, augmented prompt: pretraining" quickstart_augmented_prompt_pretrain
trained rahf_augmented_prompt "RAHF, augmented prompt: finetuning" quickstart_augmented_prompt \
  "$(from rahf_augmented_prompt_pretrain)"
evaluated "RAHF, augmented prompt" rahf_augmented_prompt quickstart_augmented_prompt \
  "$(from rahf_augmented_prompt_pretrain)"
baselines=synthetic_baselines
trained clip "CLIP: contrastive training" $baselines/clip_contrastive
evaluated "CLIP" clip_score $baselines/clip_score "$(from clip)"
evaluated "CLIP gradient" clip_gradient $baselines/clip_gradient "$(from clip)"
trained clip_finetuned "CLIP: finetuning" $baselines/clip_finetuned "$(from clip)"
evaluated "CLIP, finetuned" clip_finetuned $baselines/clip_finetuned "$(from clip)"
trained resnet_scores "ResNet: scores" $baselines/resnet_scores
evaluated "ResNet" resnet_scores $baselines/resnet_scores
trained resnet_heatmaps "ResNet: heatmaps" $baselines/resnet_heatmaps
evaluated "ResNet" resnet_heatmaps $baselines/resnet_heatmaps
run_parts richhf_jax.training_log,richhf_jax.split_predictions,tasks

finished=
for format in terminal:txt markdown:md html:html; do
  part "tables, ${format%:*}" richhf_jax.tables "${results[@]}" --baselines --format="${format%:*}" \
    --out="$out/tables.${format#*:}" --names "${names[@]}"
done
run_parts richhf_jax.pages.table_formats
echo
cat "$out/tables.txt"
part "what the tables should show" launch.check_tables "${results[@]}" --names "${names[@]}"
run_parts richhf_jax.tables
echo
echo "done in $(minutes $((SECONDS - begin))), package installation left out"
echo "open $out/tables.html"
