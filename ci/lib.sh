# Shared by the shell scripts of this folder: where things are, and how they speak. Sourced, not run.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# What is fetched or built once and serves every clone: packages, kernels, initial RAM disks.
cache=${XDG_CACHE_HOME:-$HOME/.cache}/ramwire
me=$(basename "$0")
# Tools of cargo's that ci/setup has compiled.
PATH=$cache/cargo-tools/bin:$PATH

say() { printf '%s: %s\n' "$me" "$*" >&2; }
die() {
    say "$*"
    exit 1
}

# section NAME COMMAND...: runs the command under a heading, tells how long it took, keeps its exit status.
section() {
    local name=$1 began=$SECONDS status=0
    shift
    printf '\n=== %s\n' "$name"
    "$@" || status=$?
    printf '=== %s: %s in %d s\n' "$name" "$([ "$status" = 0 ] && echo ok || echo "FAILED ($status)")" $((SECONDS - began))
    return "$status"
}

# cached_kernel [TREE]: version of the cached kernel (of another one than `kernel`), empty if there is none.
cached_kernel() {
    local image
    image=$(find "$cache/${1:-kernel}/boot" -maxdepth 1 -name 'vmlinuz-*' 2>/dev/null | sort -V | tail -1)
    printf '%s' "${image##*/vmlinuz-}"
}
