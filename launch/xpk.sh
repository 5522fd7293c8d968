#!/usr/bin/env bash
# Training on a GKE cluster's TPUs, through XPK (https://github.com/AI-Hypercomputer/xpk).
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
  --image REPOSITORY where the image goes, such as europe-docker.pkg.dev/PROJECT/REPOSITORY/richhf_jax; the
                     commit is its tag
  --num-slices N     slices, joined by the data centre's network (default: 1)
  --max-restarts N   restarts before it is given up; a mistake uses them up, too (default: 20)
  --name NAME        of the workload (default: richhf-jax)
  --root             runs as root in its container, for nodes whose TPU devices are root's alone
  --project, --zone  default: gcloud's own
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

# XPK runs the command in a subshell that it sends SIGTERM to: exec, so that this is the process that gets it.
# The grace period is for saving a checkpoint; of spot machines, GKE leaves at most 25 s. XPK by itself starts
# again after exit codes 42 and 127 to 255; 1 is also that of a worker that misses another one amid a step.
command=(bash launch/restartable.sh python -m richhf_jax.train "${training[@]}")
places=()
for place in project zone; do
  if [[ -n ${option[$place]} ]]; then places+=("--$place=${option[$place]}"); fi
done
run xpk workload create --cluster="${option[cluster]}" "${places[@]}" --workload="${option[name]}" \
  --tpu-type="${option[tpu-type]}" --num-slices="${option[num-slices]}" --docker-image="$image" \
  --max-restarts="${option[max-restarts]}" --restart-on-exit-codes=1 --termination-grace-period-seconds=300 \
  --command="exec $(quoted "${command[@]}")"
