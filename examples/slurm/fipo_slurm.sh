#!/usr/bin/env bash
# What all batch scripts share. One sources it and calls `fipo_train CONFIG key=value ...`: Ray on all nodes of the job,
# with a token of the job's own, then tools/train.py, which goes on with what an earlier attempt has left. At the signal
# before the time limit (#SBATCH --signal=B:USR1@N) the run ends with a checkpoint and the job is queued again.
#
# From the environment, all optional (docs/cluster.md):
#   PYTHON             interpreter of the environment, default .venv/bin/python
#   FIPO_INTERFACE     network interface of Ray and the trainer on every node, e.g. ib0; default: that of Slurm's address
#   FIPO_JOBS          folder that all nodes share, for logs and token, default runs/slurm
#   FIPO_START_S       seconds for the nodes to come up, default 300
#   FIPO_MAX_REQUEUES  times that a job queues itself again, default 100

_fipo_script=examples/slurm/fipo_slurm.sh # from the checkout, where every part of it runs
_fipo_stopped=75                          # exit status of a run that was asked to stop and can go on
_fipo_no_start=138                        # of one that SIGUSR1 has ended: it had not begun to listen for it

_fipo_fail() {
    echo "fipo_slurm: $*" >&2
    exit 1
}

# ---------------------------------------------------------------- the batch script: on the first node

fipo_train() {
    local config=${1:?fipo_train: no configuration} arguments=("${@:2}") num_nodes status=0
    _fipo_python=${PYTHON:-.venv/bin/python}
    [[ -x $_fipo_python ]] || _fipo_fail "PYTHON=$_fipo_python: no such interpreter; run make install"
    _fipo_attempt=${SLURM_RESTART_COUNT:-0}
    export FIPO_JOB=${FIPO_JOBS:-runs/slurm}/$SLURM_JOB_ID-$_fipo_attempt
    _fipo_asked='' _fipo_signalled=0 _fipo_driver='' _fipo_nodes=''
    mkdir -p "$FIPO_JOB"
    trap _fipo_on_usr1 USR1
    # Slurm sends it to the run as well, which ends by itself. Nobody joins any more, and Slurm's patience may end first.
    trap '_fipo_signalled=1; rm -f "$FIPO_JOB/token"' TERM
    trap _fipo_end_nodes EXIT

    num_nodes=$(_fipo_count_nodes)
    if ((num_nodes > 1)); then
        _fipo_start_nodes "$num_nodes"
        arguments+=("cluster.ray_address=$(<"$FIPO_JOB/address")")
    fi
    if [[ -z $_fipo_asked ]]; then
        "$_fipo_python" tools/train.py "$config" "${arguments[@]}" --resume auto &
        _fipo_driver=$!
        _fipo_wait "$_fipo_driver" || status=$?
        _fipo_driver=''
    else
        status=$_fipo_no_start
    fi
    _fipo_end_nodes
    # Queued again, it would be asked to end as early, and so on for ever.
    if [[ -n $_fipo_asked ]] && ((status == _fipo_no_start)); then
        _fipo_fail "the signal came before the run had started; give more --time, or fewer seconds in --signal"
    fi
    ((status == _fipo_stopped)) || exit "$status"
    _fipo_requeue
}

_fipo_on_usr1() {
    _fipo_asked=1 _fipo_signalled=1
    echo "fipo_slurm: the time limit is near, the run ends after the step under way"
    if [[ -n $_fipo_driver ]]; then kill -USR1 "$_fipo_driver" 2>/dev/null || true; fi
}

# Exit status of a child; a signal to this shell ends bash's wait, not the child.
_fipo_wait() {
    local status
    while true; do
        _fipo_signalled=0 status=0
        wait "$1" || status=$?
        if ((status <= 128 || !_fipo_signalled)); then return "$status"; fi
    done
}

_fipo_requeue() {
    if ((_fipo_attempt >= ${FIPO_MAX_REQUEUES:-100})); then
        _fipo_fail "queued again $_fipo_attempt times (FIPO_MAX_REQUEUES), and the run is not complete; sbatch goes on"
    fi
    trap - EXIT
    echo "fipo_slurm: the job is queued again"
    scontrol requeue "$SLURM_JOB_ID" || _fipo_fail "can't be queued again; sbatch goes on with the run"
    sleep 60 # until Slurm ends this attempt
}

_fipo_count_nodes() {
    local component count=SLURM_JOB_NUM_NODES sum=0
    for ((component = 0; component < ${SLURM_HET_SIZE:-1}; component++)); do
        if [[ -n ${SLURM_HET_SIZE:-} ]]; then count=SLURM_JOB_NUM_NODES_HET_GROUP_$component; fi
        sum=$((sum + ${!count}))
    done
    echo "$sum"
}

# Ray on all nodes; its address is in $FIPO_JOB/address when they are all there.
_fipo_start_nodes() {
    local num_nodes=$1 wait_s=${FIPO_START_S:-300} status=0 waiting
    local options=(--overlap --ntasks-per-node=1 --kill-on-bad-exit=1)
    local cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK_HET_GROUP_0:-}} rollout_cpus
    [[ -n $cpus ]] || _fipo_fail "--cpus-per-task is not set: give the processors of a node, which Ray shares out"
    rollout_cpus=${SLURM_CPUS_PER_TASK_HET_GROUP_1:-$cpus}
    unset RAY_AUTH_TOKEN RAY_ADDRESS RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER # of another Ray, for which they would be taken
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$PWD/$FIPO_JOB/token FIPO_HEAD=$SLURMD_NODENAME
    [[ $FIPO_JOB != /* ]] || RAY_AUTH_TOKEN_PATH=$FIPO_JOB/token
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
    if ((${SLURM_HET_SIZE:-1} > 1)); then
        srun "${options[@]}" --het-group=0 --cpus-per-task="$cpus" bash "$_fipo_script" trainer : \
            "${options[@]}" --het-group=1 --cpus-per-task="$rollout_cpus" bash "$_fipo_script" rollout &
    else
        srun "${options[@]}" --cpus-per-task="$cpus" bash "$_fipo_script" both &
    fi
    _fipo_nodes=$!
    (
        until [[ -s $FIPO_JOB/address ]]; do sleep 1; done
        RAY_ADDRESS=$(<"$FIPO_JOB/address") exec "$_fipo_python" tools/wait_for_ray.py \
            --nodes "$num_nodes" --timeout "$wait_s"
    ) &
    waiting=$!
    while kill -0 "$waiting" 2>/dev/null; do
        if ! kill -0 "$_fipo_nodes" 2>/dev/null; then
            kill "$waiting" 2>/dev/null || true
            _fipo_fail "Ray ended on a node before all $num_nodes were there; see $FIPO_JOB/*.log"
        fi
        if ((SECONDS > 2 * wait_s)); then
            kill "$waiting" 2>/dev/null || true
            _fipo_fail "no Ray head on $FIPO_HEAD after $((2 * wait_s)) s; see $FIPO_JOB/$FIPO_HEAD.log"
        fi
        sleep 1
    done
    wait "$waiting" || status=$?
    ((status == 0)) || _fipo_fail "not all $num_nodes Ray nodes came up; see $FIPO_JOB/*.log"
}

_fipo_end_nodes() {
    local second
    rm -f "$FIPO_JOB/token"
    if [[ -z $_fipo_nodes ]]; then return; fi
    touch "$FIPO_JOB/end" # each node keeps Ray's logs, which a signal through srun leaves no time for
    for ((second = 0; second < 30; second++)); do
        kill -0 "$_fipo_nodes" 2>/dev/null || break
        sleep 1
    done
    kill -TERM "$_fipo_nodes" 2>/dev/null || true
    _fipo_wait "$_fipo_nodes" || true
    _fipo_nodes=''
}

# ---------------------------------------------------------------- each node: Ray until the job ends

_fipo_node() {
    local part=$1 name=$SLURMD_NODENAME scratch address client_port status=0 options resources ray
    exec >"$FIPO_JOB/$name.log" 2>&1
    ray=$(dirname "${PYTHON:-.venv/bin/python}")/ray
    address=$(_fipo_address)
    scratch=$(mktemp -d "/tmp/fipo-$SLURM_JOB_ID-XXXX") # short: a Unix socket's path has 107 characters at most
    mkdir "$scratch/tmp"
    case $part in
        trainer) resources='{"fipo_trainer": 1}' ;;
        rollout) resources='{"fipo_rollout": 1}' ;;
        *) resources='{}' ;;
    esac
    # Ports that are free: several jobs, and in a test several nodes, may share a host.
    options=(--node-ip-address="$address" --temp-dir="$scratch/ray" --num-cpus="$SLURM_CPUS_PER_TASK"
        --resources="$resources" --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0
        --dashboard-agent-grpc-port=0 --runtime-env-agent-port=0 --metrics-export-port=0
        --include-log-monitor=false --disable-usage-stats --block)
    export TMPDIR=$scratch/tmp RAY_prestart_worker_first_driver=0
    if [[ $name == "$FIPO_HEAD" ]]; then
        read -r port client_port < <(_fipo_free_ports "$address")
        "$ray" start --head --port="$port" --ray-client-server-port="$client_port" \
            --include-dashboard=false --no-monitor "${options[@]}" &
        _fipo_ray=$!
        until (: >"/dev/tcp/$address/$port") 2>/dev/null; do
            kill -0 "$_fipo_ray" 2>/dev/null || break
            sleep 0.5
        done
        echo "$address:$port" >"$FIPO_JOB/address.part"
        mv "$FIPO_JOB/address.part" "$FIPO_JOB/address"
    else
        until [[ -s $FIPO_JOB/address ]]; do
            ls "$FIPO_JOB" >/dev/null # a network file system looks again
            sleep 1
        done
        "$ray" start --address="$(<"$FIPO_JOB/address")" "${options[@]}" &
        _fipo_ray=$!
    fi
    trap '_fipo_ending=1' TERM
    _fipo_watch_ray || status=$?
    mkdir -p "$FIPO_JOB/$name"
    cp -r "$scratch"/ray/session_latest/logs/. "$FIPO_JOB/$name/" || true
    find "$FIPO_JOB/$name" -empty -delete
    rm -rf "$scratch"
    exit "$status"
}

# Exit status of Ray, which is 0 when the job has ended it. Its processes have nothing to finish then: it gets 5 s.
_fipo_watch_ray() {
    local status=0 ended_at=''
    _fipo_ending=${_fipo_ending:-}
    while kill -0 "$_fipo_ray" 2>/dev/null; do
        if [[ -e $FIPO_JOB/end ]]; then _fipo_ending=1; fi
        if [[ -n $_fipo_ending && -z $ended_at ]]; then
            ended_at=$SECONDS
            kill -TERM "$_fipo_ray" 2>/dev/null || true
        elif [[ -n $ended_at ]] && ((SECONDS > ended_at + 5)); then
            kill -KILL "$_fipo_ray" 2>/dev/null || true
        fi
        sleep 1
    done
    wait "$_fipo_ray" || status=$?
    if [[ -n $_fipo_ending ]]; then return 0; fi
    return "$status"
}

_fipo_address() {
    local host address
    if [[ -n ${FIPO_INTERFACE:-} ]]; then
        address=$(ip -4 -o addr show dev "$FIPO_INTERFACE" | awk '{sub("/.*", "", $4); print $4; exit}') || true
        [[ -n $address ]] || _fipo_fail "FIPO_INTERFACE=$FIPO_INTERFACE: has no IPv4 address on $SLURMD_NODENAME"
    else
        host=$(scontrol show node "$SLURMD_NODENAME" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
        address=$(getent ahostsv4 "$host" | awk '{print $1; exit}')
        # A machine may know its own name as one of loopback.
        if [[ $address == 127.* && $address != "$host" ]]; then address=$(hostname -I | awk '{print $1}'); fi
        [[ -n $address ]] || _fipo_fail "$host has no IPv4 address; set FIPO_INTERFACE"
    fi
    echo "$address"
}

_fipo_free_ports() {
    "${PYTHON:-.venv/bin/python}" -c '
import socket, sys
sockets = [socket.create_server((sys.argv[1], 0)) for _ in range(2)]
print(*(each.getsockname()[1] for each in sockets))' "$1"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    _fipo_node "$@"
fi
