#!/usr/bin/env bash
# Trains on the GPUs of a SLURM cluster, on one or several nodes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'USAGE'
Usage: bash launch/slurm.sh --nodes=N --gpus-per-node=N --shared=FOLDER [OPTIONS] TRAINING ARGUMENTS...

Installs the version in a folder that all nodes share, writes a batch script there and submits it. The job has one
process for each GPU. Two minutes before the time limit, and when preempted, training saves a checkpoint and the
job queues again. It also queues again after a node fails. Training continues from the newest checkpoint. Run this
on a machine with sbatch.

  --nodes N          number of machines (default: 1)
  --gpus-per-node N  number of GPUs of each (default: 8)
  --shared FOLDER    a folder that all nodes share; MODEL_DIR and data may be in it instead of gs://
  --time LIMIT       time limit of the job between two restarts, as for sbatch (default: the partition's)
  --partition, --account, --qos, --constraint
                     passed to sbatch
  --cpus-per-gpu N   cores for reading images (default: 8)
  --name NAME        name of the job and its log (default: richhf_jax)
  --python PYTHON    makes the virtual environment with this Python (3.11 to 3.13)
USAGE
}

option+=([nodes]=1 [gpus-per-node]=8 [shared]="" [time]="" [partition]="" [account]="" [qos]=""
  [constraint]="" [cpus-per-gpu]=8 [name]=richhf_jax [python]="")
parse_arguments "$@"
need_options shared
[[ ${option[shared]} =~ ^/[^[:space:]]+$ ]] ||
  die "--shared=${option[shared]}: give an absolute path without spaces"
pin_version
check_training "${option[shared]}"
add_partitioning "$(gpu_partitioning "${option[nodes]}" "${option[gpus-per-node]}")"

# batch_script: prints the batch script. SLURM tells all processes to stop, and they end one after the other: the end
# of the first must not end the others, which may still be saving (--kill-on-bad-exit=0). Each process sees all GPUs
# of its node (--gpu-bind=none); jax picks the one with its number.
batch_script() {
  local name
  echo "#!/usr/bin/env bash"
  for name in time partition account qos constraint; do
    if [[ -n ${option[$name]} ]]; then echo "#SBATCH --$name=${option[$name]}"; fi
  done
  cat <<BATCH
#SBATCH --job-name=${option[name]}
#SBATCH --output=$folder/${option[name]}-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=${option[nodes]}
#SBATCH --gpus-per-node=${option[gpus-per-node]}
#SBATCH --ntasks-per-node=${option[gpus-per-node]}
#SBATCH --cpus-per-task=${option[cpus-per-gpu]}
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail
cd $(quoted "$folder/$version")
status=0
$(quoted srun --kill-on-bad-exit=0 --gpu-bind=none --cpus-per-task="${option[cpus-per-gpu]}" \
    bash launch/restartable.sh .venv/bin/python -m richhf_jax.train "${training[@]}") || status=\$?
# Told to stop: the checkpoint is saved.
if ((status == 143)); then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$status"
BATCH
}

folder=${option[shared]%/}/richhf_jax
script=$folder/${option[name]}.sbatch
unpack_version "$folder"
run env ${option[python]:+PYTHON="${option[python]}"} bash "$folder/$version/launch/install.sh" train,gcs,cuda
echo "cat >$(quoted "$script") <<'END_OF_BATCH_SCRIPT'"
batch_script
echo END_OF_BATCH_SCRIPT
if [[ ${option[dry-run]} == no ]]; then
  batch_script >"$script"
fi
run sbatch "$script"
