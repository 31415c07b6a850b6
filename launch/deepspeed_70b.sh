#!/usr/bin/env bash
# HiEdit on Llama-3-70B over the GPUs of this node, or of the nodes in a hostfile.
#
#   launch/deepspeed_70b.sh                                    8 GPUs of 80 GB
#   OFFLOAD=1 GPUS=4 launch/deepspeed_70b.sh                   weights in the hosts' memory
#   HOSTFILE=hostfile launch/deepspeed_70b.sh stream.length=2000
#   DATASET=zsre DATA=zsre/train.json launch/deepspeed_70b.sh resume=runs/...
#
# It first prints what `hiedit plan` says, and stops if the model does not fit. Further arguments
# are keys of launch/train_sharded.py. Needs: pip install 'hiedit[cli,deepspeed]'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ "${1:-}" == -h || "${1:-}" == --help ]] && { sed -n '2,11p' "$0" | sed 's/^# \{0,1\}//'; exit 0; }

MODEL=${MODEL:-llama-3-70b}
METHOD=${METHOD:-hiedit}
DATASET=${DATASET:-zsre}
GPUS=${GPUS:-8}
MEMORY=${MEMORY:-80}
settings=zero3
plan=()
if [ -n "${OFFLOAD:-}" ]; then settings=zero3-offload; plan+=(--offload); fi

python -m hiedit.cli plan --model "$MODEL" --method "$METHOD" --devices "$GPUS" \
  --memory "$MEMORY" "${plan[@]}"

where=(--num_accelerators "$GPUS")
if [ -n "${HOSTFILE:-}" ]; then where=(--hostfile "$HOSTFILE"); fi
case " $* " in
  *" resume="*) exec deepspeed "${where[@]}" launch/train_sharded.py "$@" ;;
esac
exec deepspeed "${where[@]}" launch/train_sharded.py model="$MODEL" method="$METHOD" \
  dataset="$DATASET" ${DATA:+dataset.path="$DATA"} distribution.deepspeed="$settings" "$@"
