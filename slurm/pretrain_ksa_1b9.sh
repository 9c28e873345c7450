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
# Pretrain the model of slurm/models/ksa_1b9.args, or, with 32k, 64k or 128k as the first word, that later stage of it from the
# newest checkpoint of the stage before; submit from the repository's root. Options: slurm/launch.sh.
# 6 nodes of 8 GPUs: a divisor of the 240 sequences of a step.
set -euo pipefail
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
if [[ ! -r $root/slurm/launch.sh ]]; then
  echo "error: $root is not the repository: submit with sbatch from its root" >&2
  exit 2
fi
model=ksa_1b9
case ${1-} in
  32k | 64k | 128k)
    model+=_$1
    shift
    ;;
esac
exec bash "$root/slurm/launch.sh" "$model" "$@"
