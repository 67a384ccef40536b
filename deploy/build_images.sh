#!/usr/bin/env bash
# Build the images of the Dockerfile with docker, podman or buildah, and print the size of each.
#
#   deploy/build_images.sh                       # api worker-cpu worker-gpu trainer bench
#   deploy/build_images.sh api worker-cpu        # only these
#
# BASE               the base image (default: the Dockerfile's)
# TOOL               docker, podman or buildah (default: the first one that is installed)
# TAG                tag of the images judge-<target> (default: latest)
# TRAINER_TORCH      cuda or cpu (default: the Dockerfile's)
# TORCH_CPU_INDEX    pip index with the CPU build of torch (default: the Dockerfile's; empty: pip's own settings)
# BUILD_FLAGS        more flags for the build command, e.g. "--isolation chroot --volume /wheels:/wheels:ro"
set -euo pipefail
cd "$(dirname "$0")/.."

tool=${TOOL:-}
for candidate in docker podman buildah; do
  [ -n "$tool" ] || ! command -v "$candidate" > /dev/null || tool=$candidate
done
[ -n "$tool" ] || { echo "install docker, podman or buildah first" >&2; exit 2; }

arguments=()
for name in BASE TRAINER_TORCH TORCH_CPU_INDEX; do
  [ -z "${!name+set}" ] || arguments+=(--build-arg "$name=${!name}")
done
# The OCI format has no health checks, so podman and buildah would drop them.
[ "$tool" = docker ] || arguments+=(--format docker --layers)

[ $# -gt 0 ] || set -- api worker-cpu worker-gpu trainer bench
for target in "$@"; do
  image=judge-$target:${TAG:-latest}
  echo "== $image" >&2
  # shellcheck disable=SC2086  # BUILD_FLAGS must be split into words
  "$tool" build "${arguments[@]}" ${BUILD_FLAGS:-} --target "$target" --tag "$image" .
done

for target in "$@"; do
  "$tool" images | awk -v name="judge-$target" '$1 ~ name "$" { print name ":" $2, $(NF - 1) $NF }' | head -1
done
