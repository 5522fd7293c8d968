# Functions that the launchers share: they parse options and the training's arguments, pin the version, and print
# or run commands.
# shellcheck shell=bash
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

# The end of every launcher's --help.
common_usage() {
  cat <<'USAGE'

  --commit REV       the version to run: a commit, tag or branch (default: HEAD, if all is committed)
  --dry-run          prints the commands without running them; the tools need not be installed
  --help             prints this

TRAINING ARGUMENTS are those of python -m richhf_jax.train, at least --gin_file=FILE and
--gin.MODEL_DIR=gs://BUCKET/FOLDER. Give flags other than --gin... and --tfds_data_dir after a --. Gin files are
read from the commit. If none is of partitioning/, the one for the accelerator is added.
USAGE
}

# option[NAME] is the value of a launcher's option, at first its default. Options with the default "no" take no value.
declare -A option=([commit]="" [dry-run]=no)
training=()

# parse_arguments ARGUMENTS...: sets option and training. The launcher defines `usage`.
parse_arguments() {
  local name
  while (($#)); do
    name=${1%%=*}
    name=${name#--}
    case $1 in
      --help | -h) usage; common_usage; exit ;;
      --) training+=("${@:2}"); return ;;
      --gin.*=* | --gin_*=* | --tfds_data_dir=*) training+=("$1") ;;
      --gin_* | --tfds_data_dir | --gin.*)
        (($# > 1)) && [[ $1 != --gin.* ]] || die "$1 needs a value: $1=..."
        training+=("$1=$2")
        shift ;;
      --*)
        [[ -v option[$name] ]] || die "what is '$1'? See --help"
        if [[ ${option[$name]} == @(no|yes) ]]; then
          [[ $1 != *=* ]] || die "--$name takes no value"
          option[$name]=yes
        elif [[ $1 == *=* ]]; then
          option[$name]=${1#*=}
        else
          (($# > 1)) || die "$1 needs a value; see --help"
          option[$name]=$2
          shift
        fi ;;
      *) die "what is '$1'? See --help" ;;
    esac
    shift
  done
}

# need_options NAMES...: dies if one of these options has no value.
need_options() {
  local name
  for name; do
    [[ -n ${option[$name]} ]] || die "give --$name; see --help"
  done
}

# quoted ARGUMENTS...: prints the arguments with quotes for a shell.
quoted() {
  local argument words=()
  for argument; do
    if [[ $argument =~ ^[[:alnum:]_./:=,@%+-]+$ ]]; then
      words+=("$argument")
    else
      # Single quotes work in any POSIX shell; bash's own quoting would write $'...' around some words.
      words+=("'${argument//\'/\'\\\'\'}'")
    fi
  done
  echo "${words[*]}"
}

# run COMMAND...: prints the command, and runs it unless --dry-run was given.
run() {
  quoted "$@"
  [[ ${option[dry-run]} == yes ]] || "$@"
}

# training_value FLAG: prints the flag's last value in the training's arguments, without gin's quotes.
training_value() {
  local argument value=
  for argument in "${training[@]}"; do
    if [[ $argument == "$1="* ]]; then value=${argument#*=}; fi
  done
  value=${value#[\"\']}
  echo "${value%[\"\']}"
}

# pin_version: sets commit, and version, the name of the installation made from it.
pin_version() {
  local changed
  git -C "$root" rev-parse --git-dir >/dev/null 2>&1 || die "$root is no git repository, with no commit to pin"
  if [[ -z ${option[commit]} ]]; then
    changed=$(git -C "$root" status --porcelain)
    [[ -z $changed ]] || die "not committed, so it would not run there: ${changed%%$'\n'*} ...;" \
      "commit it, or leave it out by --commit=HEAD"
  fi
  commit=$(git -C "$root" rev-parse --quiet --verify "${option[commit]:-HEAD}^{commit}") ||
    die "there is no commit ${option[commit]}"
  version=richhf_jax-${commit:0:12}
}

# check_training [DIR]: dies unless the commit has the gin files, and MODEL_DIR and the data outlive the machines.
# DIR is a folder that all machines share.
check_training() {
  local argument file shared=${1:-}
  [[ -n $(training_value --gin_file) ]] || die "give --gin_file=FILE; see --help"
  for argument in "${training[@]}"; do
    [[ $argument != *$'\n'* ]] || die "$argument: an argument can't have several lines"
    [[ $argument == --gin_file=* ]] || continue
    file=${argument#*=}
    git -C "$root" cat-file -e "$commit:gin/$file" 2>/dev/null ||
      git -C "$root" cat-file -e "$commit:$file" 2>/dev/null ||
      die "$file is not in commit ${commit:0:12}, which is all that the machines get; commit it first"
  done
  [[ -n $(training_value --gin.MODEL_DIR) ]] || die "give --gin.MODEL_DIR=gs://BUCKET/FOLDER"
  for argument in --gin.MODEL_DIR --tfds_data_dir --gin.INITIAL_CHECKPOINT_PATH; do
    check_reachable "$argument" "$(training_value "$argument")" "$shared"
  done
}

# check_reachable FLAG PATH SHARED: dies if only one machine has the path.
check_reachable() {
  [[ -z $2 || $2 == None || $2 == gs://?* ]] && return
  [[ -n $3 && $2 == "${3%/}"/* ]] && return
  die "$1=$2 is a folder of one machine: the others don't see it, and it is lost with the machine;" \
    "give gs://BUCKET/FOLDER${3:+ or a folder under --shared=$3}"
}

# add_partitioning NAME: appends partitioning/NAME.gin unless the arguments name a file of partitioning/.
add_partitioning() {
  local argument
  for argument in "${training[@]}"; do
    [[ $argument != --gin_file=*partitioning/* ]] || return 0
  done
  git -C "$root" cat-file -e "$commit:gin/partitioning/$1.gin" 2>/dev/null ||
    die "there is no gin/partitioning/$1.gin: give --gin_file=partitioning/NAME.gin, NAME being one of:" \
      "$(git -C "$root" ls-tree --name-only "$commit:gin/partitioning" | sed 's/\.gin$//' | paste -sd ' ')"
  training+=("--gin_file=partitioning/$1.gin")
}

# tpu_partitioning TYPE: prints the partitioning's name: v5e_16 for v5litepod-16, v6e_8 for v6e-8.
tpu_partitioning() {
  local name=${1/litepod/e}
  echo "${name/-/_}"
}

# tpu_runtime TYPE: prints Google's image for TPU VMs with jax.
tpu_runtime() {
  case $1 in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "no image known for '$1': write it as v4-32, v5litepod-16, v5p-8 or v6e-8" ;;
  esac
}

# gpu_partitioning NODES GPUS_PER_NODE: prints the partitioning's name.
gpu_partitioning() {
  if (($1 > 1)); then echo gpu_cluster; else echo "gpu_$2"; fi
}

# unpack_version FOLDER: writes the commit's files to FOLDER/$version.
unpack_version() {
  run mkdir -p "$1/$version"
  run git -C "$root" archive --output="$1/$version.tar" "$commit"
  run tar -xf "$1/$version.tar" -C "$1/$version"
}
