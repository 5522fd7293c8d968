#!/usr/bin/env bash
# Trains on a GKE cluster's TPUs, through XPK (https://github.com/AI-Hypercomputer/xpk).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'USAGE'
Usage: bash launch/xpk.sh --cluster=NAME --tpu-type=TYPE --image=REPOSITORY [OPTIONS] TRAINING ARGUMENTS...

Builds and pushes a Docker image of the version, and gives it to the cluster as a workload. When workers are
preempted or lost, all start again and continue from the newest checkpoint. Needs docker, xpk and gcloud, logged
in.

  --cluster NAME     a cluster made by "xpk cluster create"
  --tpu-type TYPE    v4-32, v5litepod-16, v5p-8, v6e-64, ...
  --image REPOSITORY the image's address, such as europe-docker.pkg.dev/PROJECT/REPOSITORY/richhf_jax; its tag is
                     the commit
  --num-slices N     number of slices, joined by the data centre's network (default: 1)
  --max-restarts N   number of restarts before giving up; restarts after a mistake count, too (default: 20)
  --name NAME        name of the workload (default: richhf-jax)
  --root             runs as root in the container, for nodes where only root may use the TPU devices
  --project, --zone  the cluster's (default: those of gcloud's configuration)
USAGE
}

option+=([cluster]="" [tpu-type]="" [image]="" [num-slices]=1 [max-restarts]=20
  [name]=richhf-jax [project]="" [zone]="" [root]=no)
parse_arguments "$@"
need_options cluster tpu-type image
pin_version
check_training
add_partitioning "$(tpu_partitioning "${option[tpu-type]}")"

build=$root/build
image=${option[image]}:${commit:0:12}
unpack_version "$build"
user=1000
if [[ ${option[root]} == yes ]]; then user=0; fi
run docker build --file "$build/$version/launch/docker/Dockerfile.tpu" --build-arg COMMIT="$commit" \
  --build-arg USER="$user" --tag "$image" "$build/$version"
run docker push "$image"

# XPK sends SIGTERM to the subshell that runs the command: exec, so that the command itself gets it. The grace period
# is for saving a checkpoint; on spot machines, GKE gives at most 25 s. XPK by itself restarts after exit codes 42
# and 127 to 255; a worker that loses another one during a step exits with 1.
command=(bash launch/restartable.sh python -m richhf_jax.train "${training[@]}")
places=()
for place in project zone; do
  if [[ -n ${option[$place]} ]]; then places+=("--$place=${option[$place]}"); fi
done
run xpk workload create --cluster="${option[cluster]}" "${places[@]}" --workload="${option[name]}" \
  --tpu-type="${option[tpu-type]}" --num-slices="${option[num-slices]}" --docker-image="$image" \
  --max-restarts="${option[max-restarts]}" --restart-on-exit-codes=1 --termination-grace-period-seconds=300 \
  --command="exec $(quoted "${command[@]}")"
