#!/usr/bin/env bash
#SBATCH --job-name=ksa-1b9
#SBATCH --nodes=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Pretrain the model of slurm/models/ksa_1b9.args; submit from the repository's root. Options: slurm/launch.sh.
set -euo pipefail
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
if [[ ! -r $root/slurm/launch.sh ]]; then
  echo "error: $root is not the repository: submit with sbatch from its root" >&2
  exit 2
fi
exec bash "$root/slurm/launch.sh" ksa_1b9 "$@"
