#!/usr/bin/env bash
#SBATCH --job-name=ksa-1b9
#SBATCH --nodes=6
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Pretrain the model of slurm/models/ksa_1b9.args, or, with --stage 32k, 64k or 128k, that later stage of it from the newest
# checkpoint of the stage before; submit from the repository's root. Further options: slurm/launch.sh.
# 6 nodes of 8 GPUs: a divisor of the 240 sequences of a step.
set -euo pipefail
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
if [[ ! -r $root/slurm/launch.sh ]]; then
  echo "error: $root is not the repository: submit with sbatch from its root" >&2
  exit 2
fi
model=ksa_1b9 options=()
while (($#)); do
  case $1 in
    --stage)
      (($# > 1)) || {
        echo "error: --stage needs a value: 32k, 64k or 128k" >&2
        exit 2
      }
      model+=_$2
      shift 2
      ;;
    --)
      options+=("$@")
      break
      ;;
    *)
      options+=("$1")
      shift
      ;;
  esac
done
exec bash "$root/slurm/launch.sh" "$model" "${options[@]}"
