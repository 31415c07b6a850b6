#!/usr/bin/env bash
# Submits launch/train.py as a job to a Ray cluster, or runs one on this machine for it.
#
#   launch/submit.sh start [CPUS]       a head on this machine, loopback and token authentication
#   launch/submit.sh method=hiedit distribution.workers=8 ...
#   launch/submit.sh stop
#
# An existing cluster: export RAY_ADDRESS=http://HEAD:8265 (and RAY_AUTH_TOKEN or ~/.ray/auth_token
# with its token), leave `start` and `stop` out. The job prints to this terminal; Ctrl-C leaves it
# running, `ray job stop ID` ends it with a checkpoint. `run_dir` is on the head node.
# Needs: pip install 'hiedit[cli,ray]'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}    # in the shell that starts and in the one that submits
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
RAY=$(command -v ray || echo .venv/bin/ray)

case "${1:-}" in
  start)
    [ -s "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ] || "$RAY" get-auth-token --generate >/dev/null
    exec "$RAY" start --head --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 \
      ${2:+--num-cpus="$2"} --disable-usage-stats
    ;;
  stop)
    exec "$RAY" stop
    ;;
  "" | -h | --help)
    sed -n '2,13p' "$0" | sed 's/^# \{0,1\}//'
    ;;
  *)
    exec "$RAY" job submit --address "${RAY_ADDRESS:-http://127.0.0.1:8265}" \
      --runtime-env launch/runtime_env.yaml --working-dir . \
      -- python launch/train.py distribution=ray "$@"
    ;;
esac
