#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: slurm/submit_scaling.sh [--dry-run] KIND NODES [options of sbatch...] CONFIG [flags of annulus bench...]

Submits a scaling study: one job of scaling.sbatch for each number of nodes. The configuration is that of the first number.

KIND is what all points have in common:
  strong        the whole problem
  weak-tokens   the tokens of a GPU: seq-len grows with the ranks
  weak-flops    the FLOPs of a GPU: seq-len grows until `annulus plan` counts as many for each rank as at the first point; of dense
                attention that is with the square root of the ranks, of a fixed dilated pattern in proportion to them
NODES are numbers, ascending: 1,2,4,8. A rank is a GPU: --ntasks-per-node says how many a node has (4 if it is not given).

  slurm/submit_scaling.sh strong 1,2,4,8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 big.toml --backend cuda
  slurm/submit_scaling.sh --dry-run weak-flops 1,2,4,8 big.toml

Options of sbatch are written --NAME=VALUE, but for --exclusive, --contiguous and --hold. Nodes that other jobs share are not measured:
--exclusive where the site does not see to it. The rows of a point are in scaling-KIND-<ranks>.h5 and .csv, and its report in
slurm-scaling-KIND-<ranks>-<job id>.out. --dry-run prints the commands and submits nothing. Submitting the same study again goes on where its
jobs stopped.
TEXT
}

fail() {
  echo "submit_scaling.sh: $*" >&2
  exit 2
}

dry_run=no
case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
  --dry-run)
    dry_run=yes
    shift
    ;;
esac
if [[ $# -lt 3 ]]; then
  usage >&2
  exit 2
fi
kind=$1
nodes=$2
shift 2
[[ $kind =~ ^(strong|weak-tokens|weak-flops)$ ]] || fail "KIND is '$kind'; allowed are strong, weak-tokens and weak-flops"
[[ $nodes =~ ^[1-9][0-9]*(,[1-9][0-9]*)*$ ]] || fail "NODES are '$nodes'; numbers with commas between them are needed"

options=()
ranks_per_node=4
while [[ ${1:-} == -* ]]; do
  [[ $1 == --*=* || $1 =~ ^--(exclusive|contiguous|hold)$ ]] || fail "an option of sbatch is '$1'; it is written --NAME=VALUE"
  if [[ $1 == --ntasks-per-node=* ]]; then ranks_per_node=${1#*=}; else options+=("$1"); fi
  shift
done
[[ $# -gt 0 ]] || fail "no CONFIG given"
[[ $ranks_per_node =~ ^[1-9][0-9]*$ ]] || fail "--ntasks-per-node is '$ranks_per_node'; a positive integer is needed"
flags=("$@")

job_scripts=$(dirname "$0")
# shellcheck source=slurm/job.sh
source "$job_scripts/job.sh"
begin_job submit_scaling.sh

settings=$("$program" bench --config "${flags[@]}" --print-config)
setting() { sed -n "s/^$1 = //p" <<<"$settings"; }
base_seq_len=$(setting seq-len)
[[ -n $base_seq_len ]] || fail "the configuration takes seq-len from an input file; a study needs generated input"
! grep -Eq '^(output|csv) = ' <<<"$settings" || fail "the configuration names --output or --csv; every point has its own"
! grep -q '^sweep = .*seq-len' <<<"$settings" || [[ $kind == strong ]] || fail "$kind sets seq-len, which the configuration sweeps"

# `plan` takes no flags of bench alone, but the configuration that all of them come to.
plan_config=$(mktemp)
trap 'rm -f "$plan_config"' EXIT
printf '%s\n' "$settings" >"$plan_config"
flops_of_rank() {
  local report
  report=$("$program" plan --config "$plan_config" --seq-len "$1" --ranks "$2" --json 2>/dev/null)
  awk -v ranks="$2" '/^  "flops":/ { gsub(/[^0-9.eE+]/, "", $2); printf "%.17g\n", $2 / ranks }' <<<"$report"
}
at_most() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a <= b) }'; }

# The sequence, in blocks of 256 tokens, whose FLOPs of each of `ranks` ranks are nearest to those of the first point.
seq_len_of_flops() {
  local ranks=$1 block=256 low=0 high=1 middle
  until at_most "$base_flops" "$(flops_of_rank $((block * high)) "$ranks")"; do
    low=$high
    high=$((2 * high))
  done
  while ((high - low > 1)); do
    middle=$(((low + high) / 2))
    if at_most "$base_flops" "$(flops_of_rank $((block * middle)) "$ranks")"; then high=$middle; else low=$middle; fi
  done
  if ((low > 0)) && at_most "$(awk -v a="$(flops_of_rank $((block * low)) "$ranks")" -v b="$base_flops" 'BEGIN { print b - a }')" \
    "$(awk -v a="$(flops_of_rank $((block * high)) "$ranks")" -v b="$base_flops" 'BEGIN { print a - b }')"; then
    high=$low
  fi
  echo $((block * high))
}

base_ranks=$((${nodes%%,*} * ranks_per_node))
if [[ $kind == weak-flops ]]; then base_flops=$(flops_of_rank "$base_seq_len" "$base_ranks"); fi
for node_count in ${nodes//,/ }; do
  ranks=$((node_count * ranks_per_node))
  seq_len=$base_seq_len
  if ((ranks != base_ranks)); then
    case "$kind" in
      weak-tokens) seq_len=$((base_seq_len * ranks / base_ranks)) ;;
      weak-flops) seq_len=$(seq_len_of_flops "$ranks") ;;
    esac
  fi
  point=scaling-$kind-$ranks
  command=(sbatch --job-name="$point" --nodes="$node_count" --ntasks-per-node="$ranks_per_node" ${options[@]+"${options[@]}"}
    "$job_scripts/scaling.sbatch" "${flags[@]}" --output "$point.h5" --csv "$point.csv")
  if [[ $kind != strong ]]; then command+=(--seq-len "$seq_len"); fi
  printf '%q ' "${command[@]}"
  echo
  if [[ $dry_run == no ]]; then "${command[@]}"; fi
done
