#!/usr/bin/env bash
# One rank of a Slurm step: torch.distributed's variables from Slurm's, then the command.
set -euo pipefail
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
exec "$@"
