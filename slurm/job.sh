# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# What the batch scripts share: they source this file and call
#
#   begin_job NAME "$@"      # the script's name for messages, and its arguments: %a in them is the number of the task of an array
#   ...                      # arguments=(run --config "${given[@]}")
#   run_job end              # starts the program with ${arguments[@]} on all ranks, and ends with its exit code
#
# shellcheck disable=SC2034,SC2154  # variables of the script that sources this one

fail() {
  echo "$job_script: $*" >&2
  exit 2
}

# Sets `given`, and finds the program and the launcher. The folder of the job is the one that it was submitted from.
begin_job() {
  job_script=$1
  shift
  job_scripts=$(cd "$job_scripts" && pwd)
  given=("${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}")
  # The same for every start of a job that is put into the queue again.
  job_name=${SLURM_JOB_ID:-local}
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job_name=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}; fi
  cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
  # shellcheck source=slurm/env.sh
  source "$job_scripts/env.sh"

  program=${ANNULUS:-}
  local candidate
  for candidate in build/cuda-release/app/annulus build/cpu-release/app/annulus "$(command -v annulus || true)"; do
    if [[ -z $program && -n $candidate && -x $candidate ]]; then program=$candidate; fi
  done
  [[ -n $program ]] || fail "no annulus in $PWD/build or PATH; submit from the root of a built tree, or set ANNULUS"
  command -v "$program" >/dev/null || fail "ANNULUS is '$program', which cannot be executed"

  launcher=${LAUNCHER:-}
  if [[ -z $launcher ]]; then
    if [[ -n ${SLURM_MPI_TYPE:-} ]] || srun --mpi=list 2>&1 | grep -qw pmix; then launcher=srun; else launcher=mpirun; fi
  fi
}

# Physical cores among the CPUs that this job may use on this node.
allowed_cores() {
  local range cpu
  for range in $(sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status | tr ',' ' '); do
    for ((cpu = ${range%-*}; cpu <= ${range#*-}; ++cpu)); do
      cat "/sys/devices/system/cpu/cpu$cpu/topology/thread_siblings_list" 2>/dev/null || echo "$cpu"
    done
  done | sort -u | wc -l
}

# Sets `command`: the launcher with all that it needs, a rank on each GPU and a rank's cores for each rank.
choose_launch() {
  # Ranks of one node: the same on every node, or empty.
  local ranks_per_node=
  if [[ ${SLURM_TASKS_PER_NODE:-1} =~ ^([0-9]+)(\(x[0-9]+\))?$ ]]; then ranks_per_node=${BASH_REMATCH[1]}; fi

  # Unset unless asked for; a node's share then.
  local cpus=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / ${ranks_per_node:-1}))}
  if ((cpus < 1)); then cpus=1; fi

  # Every rank must see all GPUs that the job has on its node, and takes the one of its node-local number: the memory of a GPU that a rank
  # does not see cannot be mapped (transport p2p). That is what a step gets unless it is asked to deal GPUs out to tasks, as flags of sbatch
  # do through these variables; the daemons that mpirun starts by srun then get one GPU for all ranks of their node. --gpu-bind=none would
  # do less: it removes CUDA_VISIBLE_DEVICES, and where Slurm does not guard devices a rank then sees GPUs of other jobs.
  if [[ -n ${SLURM_GPUS_PER_TASK:-} || ${SLURM_TRES_PER_TASK:-} == *gpu* ]] && [[ -n $ranks_per_node && -n ${SLURM_GPUS_ON_NODE:-} ]]; then
    export SLURM_GPUS_PER_NODE=$SLURM_GPUS_ON_NODE
  fi
  unset SLURM_GPU_BIND SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_TRES_BIND SLURM_TRES_PER_TASK

  local cores placement
  case "$launcher" in
    srun)
      # srun does not take cpus-per-task from sbatch. Blocks of neighbouring cores keep rank and GPU of the same number on one socket.
      command=(srun --mpi="${SLURM_MPI_TYPE:-pmix}" --cpus-per-task="$cpus" --distribution="${SLURM_DISTRIBUTION:-block:block}"
        --kill-on-bad-exit=1)
      ;;
    mpirun)
      # Open MPI counts cores, Slurm may count hardware threads.
      if [[ -n $ranks_per_node ]]; then
        cores=$(($(allowed_cores) / ranks_per_node))
        if ((cpus > cores)); then cpus=$cores; fi
        if ((cpus > 0)); then
          placement=(--map-by "ppr:$ranks_per_node:node:PE=$cpus" --bind-to core)
        else
          placement=(--map-by "ppr:$ranks_per_node:node" --bind-to none)
        fi
      else
        placement=(--map-by "slot:PE=$cpus" --bind-to core)
      fi
      # In a container a job's user may be called root, and mpirun refuses it.
      if [[ $(id -u) == 0 ]]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
      command=(mpirun -n "${SLURM_NTASKS:-1}" "${placement[@]}")
      ;;
    *) fail "LAUNCHER is '$launcher'; allowed are srun and mpirun" ;;
  esac
}

# Waits for the launcher and passes signals on to it: sbatch --signal=B:... sends them to this shell alone. Sets `code` and `ended`.
wait_for() {
  local child=$1 met=yes status
  code=127
  ended=no
  trap 'met=yes; kill -USR1 "$child" 2>/dev/null || true' USR1
  trap 'met=yes; ended=yes; kill -TERM "$child" 2>/dev/null || true' TERM
  while [[ $met == yes ]]; do
    # A signal ends `wait` early, and the next one has the launcher's code; 127: the one before had it already.
    met=no
    status=0
    wait "$child" || status=$?
    if ((status != 127)); then code=$status; fi
  done
  trap - USR1 TERM
}

# Puts this job into the queue again, to go on where it stopped; not if it was asked to end.
requeue() {
  local again=${SLURM_RESTART_COUNT:-0}
  if [[ $ended == yes ]]; then
    echo "$job_script: stopped with work left; the same command goes on" >&2
  elif ((again >= ANNULUS_RESTARTS)); then
    echo "$job_script: stopped with work left after $again restarts, which are all that ANNULUS_RESTARTS allows; the same command goes on" >&2
  elif scontrol requeue "$SLURM_JOB_ID"; then
    echo "$job_script: stopped with work left; job $job_name is in the queue again (restart $((again + 1)))" >&2
    # Slurm ends this script by itself.
    sleep 60
  else
    echo "$job_script: stopped with work left, and the job cannot be requeued; submit the same command again to go on" >&2
  fi
}

# Passes standard input on, and fails if there was none. What ends the job must not end this before the program.
pass_report() {
  trap '' USR1 TERM
  local first
  IFS= read -r -d '' -n 1 first || return 1
  printf '%s' "$first"
  cat
}

# Starts `command` with the program and waits for it. Sets `code`, `ended`, and whether any rank `spoke`: srun ends with 0 where none was
# started ("task 0 launch failed", Slurm 22.05), and a rank that succeeds has always printed something.
start_program() {
  local report passing child
  exec {report}> >(pass_report)
  passing=$!
  "${command[@]}" "$program" "${arguments[@]}" >&"$report" {report}>&- &
  child=$!
  exec {report}>&-
  wait_for "$child"
  spoke=yes
  wait "$passing" || spoke=no
}

# Starts the program. $1 says what a job does that has stopped with work left: end, or requeue to go on by itself.
run_job() {
  choose_launch
  # On standard error, which Slurm puts into the same file: standard output is the program's, also with --json.
  {
    printf '%s: job %s on %s, ranks: %s\n+' "$job_script" "$job_name" "${SLURM_JOB_NODELIST:-$(hostname)}" "${SLURM_NTASKS:-1}"
    printf ' %q' "${command[@]}" "$program" "${arguments[@]}"
    echo
  } >&2
  start_program
  # A step that was killed can leave files on a node (Slurm's pmix.<job>.<step>, seen with 22.05), on which the step of the same number falls
  # when its job has been requeued. The next step has another number.
  local again
  for again in 1 2; do
    if ((code != 0)) || [[ $spoke == yes || $ended == yes ]]; then break; fi
    echo "$job_script: $launcher ended with 0 but no rank has said anything: none was started; once more ($again)" >&2
    start_program
  done
  if ((code == 0)) && [[ $spoke == no ]]; then
    echo "$job_script: $launcher ended with 0 but no rank has said anything: none was started" >&2
    code=3
  fi
  if ((code == 4)) && [[ $1 == requeue && -n ${SLURM_JOB_ID:-} ]]; then requeue; fi
  exit "$code"
}
