#!/usr/bin/env bash
# Submits launch/train.py as a job to a Ray cluster, or runs one on this machine for it.
#
#   launch/submit.sh start [CPUS] [OPTIONS OF `ray start`]   a head on this machine, on 127.0.0.1,
#                                                            with token authentication
#   launch/submit.sh method=hiedit distribution.workers=8 ...
#   launch/submit.sh stop                                    ends that head and nothing else
#
# An existing cluster: export RAY_ADDRESS=http://HEAD:8265 (and RAY_AUTH_TOKEN, or ~/.ray/auth_token
# with its token), leave `start` and `stop` out. The job prints to this terminal; Ctrl-C leaves it
# running, `ray job stop ID` ends it with a checkpoint; this script ends with status 1 if it failed.
# Results go to ./runs on the head node ($HIEDIT_RUNS names another place); paths of models and
# records are best absolute: the job runs in a copy of this repository.
# Needs: pip install 'hiedit[cli,ray]', on every node
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}    # in the shell that starts and in the one that submits
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
export RAY_worker_niceness=${RAY_worker_niceness:-0}      # Ray's 15 starves them beside anything else
export RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1       # the extension is in .gitignore, and belongs to the job
RAY=${RAY:-$(command -v ray || echo "$PWD/.venv/bin/ray")}
HEAD=${HIEDIT_HEAD:-${TMPDIR:-/tmp}/hiedit-head-$UID}    # what is known of a head started here

running() { [ -s "$HEAD/pid" ] && kill -0 "$(cat "$HEAD/pid")" 2>/dev/null; }

say_and_fail() { echo "error: $*" >&2; exit 2; }

start() {
  running && say_and_fail "a head runs already (process $(cat "$HEAD/pid")): $0 stop"
  "$RAY" --version >/dev/null 2>&1 || say_and_fail "no ray at $RAY: pip install 'hiedit[cli,ray]'"
  if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}" ] &&
    [ ! -s "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]; then
    "$RAY" get-auth-token --generate >/dev/null
  fi
  mkdir -p -m 700 "$HEAD"
  local cpus=() port=8265 option
  if [[ ${1:-} =~ ^[0-9]+$ ]]; then cpus=(--num-cpus="$1"); shift; fi
  for option; do [[ $option == --dashboard-port=* ]] && port=${option#*=}; done
  # The job's `python` is the one beside `ray`. --block: one process whose end ends all of them.
  PATH="$(dirname "$RAY"):$PATH" RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 setsid "$RAY" start --head \
    --block --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 --disable-usage-stats \
    "${cpus[@]}" "$@" >"$HEAD/log" 2>&1 </dev/null &
  echo $! >"$HEAD/pid"
  echo "http://127.0.0.1:$port" >"$HEAD/address"
  for _ in $(seq 600); do
    if ! running; then
      sed 's/^/    /' "$HEAD/log" | tail -n 15 >&2
      rm -f "$HEAD/pid"
      say_and_fail "the head did not start (above: the end of $HEAD/log)"
    fi
    if grep -q 'runtime started' "$HEAD/log"; then
      echo "Ray runs at $(cat "$HEAD/address") (process $(cat "$HEAD/pid"), log $HEAD/log)"
      return
    fi
    sleep 0.1
  done
  stop
  say_and_fail "the head was not ready within 60 s: $HEAD/log"
}

stop() {
  if ! running; then echo "no head was started here ($HEAD)"; return; fi
  local pid
  pid=$(cat "$HEAD/pid")
  kill -TERM "$pid"
  for _ in $(seq 300); do
    running || break
    sleep 0.1
  done
  running && kill -KILL "$pid"    # Ray's own watcher then ends what it had started
  rm -f "$HEAD/pid" "$HEAD/address"
  echo "stopped"
}

submit() {
  local arguments=() argument address=${RAY_ADDRESS:-}
  for argument; do    # relative to here, not to the copy that the job runs in
    case $argument in
      run_dir=/* | resume=/*) ;;
      run_dir=* | resume=*) argument="${argument%%=*}=$PWD/${argument#*=}" ;;
    esac
    arguments+=("$argument")
  done
  [ -n "$address" ] || address=$(cat "$HEAD/address" 2>/dev/null || echo http://127.0.0.1:8265)
  if [[ " $* " != *" resume="* ]]; then arguments=(distribution=ray "${arguments[@]}"); fi
  exec "$RAY" job submit --address "$address" --runtime-env launch/runtime_env.yaml \
    --working-dir . -- env HIEDIT_RUNS="${HIEDIT_RUNS:-$PWD/runs}" \
    python launch/train.py "${arguments[@]}"
}

case "${1:-}" in
  start) shift; start "$@" ;;
  stop) stop ;;
  "" | -h | --help) sed -n '2,/^set/p' "$0" | sed '/^set/d; s/^# \{0,1\}//' ;;
  *) submit "$@" ;;
esac
