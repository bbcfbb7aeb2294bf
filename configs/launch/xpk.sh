#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, started by XPK (https://pypi.org/project/xpk):
#
#   CLUSTER=mine PROJECT=p ZONE=us-east5-b IMAGE=an/image configs/launch/xpk.sh gsm8k v5litepod-16 \
#     --config=configs/gsm8k.py --config.mesh=fsdp=16 --config.run=/runs/gsm8k
#
# What follows the workload's name and the kind of TPU is train.sft's. The image has this repository in its working
# folder with `.[train]` and `jax[tpu]` installed. The folder of the run must be one that all hosts see, such as a
# bucket's that `xpk storage attach` mounts. XPK tells JAX which hosts there are; a workload that is pre-empted saves
# itself, and is started again up to RESTARTS times.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: configs/launch/xpk.sh WORKLOAD TPU_TYPE [FLAG OF train.sft]..." >&2
  exit 1
fi
workload=$1 tpu=$2
shift 2
exec xpk workload create \
  --cluster="${CLUSTER:?the name of a cluster made with xpk cluster create}" \
  --project="${PROJECT:?}" \
  --zone="${ZONE:?}" \
  --workload="$workload" \
  --tpu-type="$tpu" \
  --num-slices="${SLICES:-1}" \
  --max-restarts="${RESTARTS:-20}" \
  --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=120 \
  --docker-image="${IMAGE:?an image with this repository}" \
  --command="exec python -m train.sft$(printf ' %q' "$@")"
