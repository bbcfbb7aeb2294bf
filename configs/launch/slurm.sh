#!/usr/bin/env bash
# Trains on the GPUs of several nodes under SLURM, one process for each GPU:
#
#   sbatch --nodes=2 configs/launch/slurm.sh --config=configs/gsm8k.py --config.mesh=fsdp=16 --config.run=runs/gsm8k
#
# What follows the script's name is train.sft's. The folder of the run must be one that all nodes see. Two minutes
# before the time is up, and when the job is pre-empted, the run saves itself, and the job is put into the queue again.
#SBATCH --job-name=lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node do not share it
status=0
# shellcheck disable=SC2016 # each process has a number of its own
srun bash -c 'exec python -m train.sft --process="$SLURM_PROCID" "$@"' train \
  --coordinator="$first:$port" --processes="$SLURM_NTASKS" "$@" || status=$?
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
