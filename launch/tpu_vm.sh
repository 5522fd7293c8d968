#!/usr/bin/env bash
# Trains on Cloud TPU VMs, through a queued resource.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'USAGE'
Usage: bash launch/tpu_vm.sh --name=NAME --zone=ZONE --type=TYPE [OPTIONS] TRAINING ARGUMENTS...
       bash launch/tpu_vm.sh --name=NAME --zone=ZONE --delete

Asks for TPU VMs, waits for them, installs the version on all workers, trains, and deletes the VMs. When they are
preempted, it starts again with new VMs, and training continues from the newest checkpoint. Needs gcloud, logged
in. It must keep running: start it in tmux on a machine that stays on. After Ctrl-C the VMs stay; --delete deletes
them.

  --name NAME        name of the queued resource
  --zone ZONE        for example us-central2-b
  --type TYPE        v4-32, v5litepod-16, v5p-8, v6e-64, ...
  --spot, --reserved takes preemptible VMs, or those of your reservation (default: VMs on demand)
  --node-count N     number of slices, joined by the data centre's network (default: 1)
  --runtime-version VERSION
                     the VMs' image (default: Google's image for the type)
  --project PROJECT  Google Cloud project (default: that of gcloud's configuration)
  --max-restarts N   number of times to ask for VMs again before giving up (default: 100)
  --keep             keeps the VMs when training is done
  --delete           deletes the VMs, and nothing else
USAGE
}

option+=([name]="" [zone]="" [type]="" [spot]=no [reserved]=no [node-count]=1 [runtime-version]=""
  [project]="" [max-restarts]=100 [keep]=no [delete]=no)
parse_arguments "$@"
need_options name zone

name=${option[name]}
place=("--zone=${option[zone]}")
if [[ -n ${option[project]} ]]; then place+=("--project=${option[project]}"); fi

queued=(gcloud compute tpus queued-resources)
workers=("${place[@]}" --worker=all --node=all --quiet)

# state: prints the queued resource's state; nothing if there is no such resource.
state() {
  "${queued[@]}" describe "$name" "${place[@]}" --format='value(state.state)' 2>/dev/null || true
}

delete() {
  run "${queued[@]}" delete "$name" "${place[@]}" --force --quiet
}

create() {
  local flag tier=() nodes=(--node-id="$name")
  if ((${option[node-count]} > 1)); then
    nodes=(--node-count="${option[node-count]}" --node-prefix="$name")
  fi
  for flag in spot reserved; do
    if [[ ${option[$flag]} == yes ]]; then tier+=("--$flag"); fi
  done
  run "${queued[@]}" create "$name" "${place[@]}" --accelerator-type="${option[type]}" \
    --runtime-version="$runtime" "${nodes[@]}" "${tier[@]}"
}

wait_until_active() {
  local now
  echo "# until it says ACTIVE:"
  quoted "${queued[@]}" describe "$name" "${place[@]}" --format='value(state.state)'
  while [[ ${option[dry-run]} == no ]]; do
    now=$(state)
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED) echo "# it says $now" && return 1 ;;
    esac
    sleep 30
  done
}

install() {
  run "${queued[@]}" scp "$build/$version.tar.gz" "$name:" "${workers[@]}" &&
    run "${queued[@]}" ssh "$name" "${workers[@]}" \
      --command="tar -xzf $version.tar.gz && bash $version/launch/install.sh train,gcs,tpu"
}

train() {
  local command=(bash launch/restartable.sh .venv/bin/python -m richhf_jax.train "${training[@]}")
  run "${queued[@]}" ssh "$name" "${workers[@]}" --command="cd $version && exec $(quoted "${command[@]}")"
}

if [[ ${option[delete]} == yes ]]; then
  delete
  exit
fi

need_options type
pin_version
check_training
add_partitioning "$(tpu_partitioning "${option[type]}")"
runtime=${option[runtime-version]:-$(tpu_runtime "${option[type]}")}
if [[ ${option[dry-run]} == no && -n $(state) ]]; then
  die "a queued resource $name is there already: give another --name, or delete it with --delete"
fi

build=$root/build
run mkdir -p "$build"
run git -C "$root" archive --prefix="$version/" --output="$build/$version.tar.gz" "$commit"
for ((restarts = 0; ; restarts++)); do
  create || die "gcloud refused the request for VMs, see above"
  status=0
  { wait_until_active && install && train; } || status=$?
  ((status)) || break
  sleep 60 # The state of VMs that are being preempted stays ACTIVE for a while.
  now=$(state)
  # Exit code 1 means a mistake, but gcloud also exits with 1 if a VM is gone.
  if [[ $status == 1 && $now == ACTIVE ]] || ((restarts == ${option[max-restarts]})); then
    break
  fi
  echo "# exit code $status, the VMs are ${now:-gone}: asking for new ones"
  delete
done
if [[ ${option[keep]} == no ]]; then
  delete
fi
((status == 0)) || die "training ended with exit code $status after $restarts restarts, see above"
if [[ ${option[dry-run]} == yes ]]; then
  echo "# when preempted: delete, then again from the create on, ${option[max-restarts]} times at most"
fi
