#!/usr/bin/env bash
#SBATCH --job-name=tags
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Select data with TAGS on one node; submit from the repository's root. A requeued job continues where the last one stopped.
#
#   sbatch slurm/preprocess_tags.sh [--cluster FILE] [--dry-run] -- FLAG... (of tools/preprocess_tags.py)
#
# --tokenizer-model is cluster.env's and --workers the node's where FLAG does not say otherwise.
set -euo pipefail
ROOT=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}

fail() {
  echo "error: $1" >&2
  exit 2
}

cluster=$ROOT/slurm/cluster.env dry_run=''
while (($#)); do
  case $1 in
    --cluster)
      (($# > 1)) || fail "--cluster needs a value"
      cluster=$2
      shift 2
      ;;
    --dry-run)
      dry_run=1
      shift
      ;;
    --)
      shift
      break
      ;;
    *) fail "unknown option $1: flags of tools/preprocess_tags.py go after --" ;;
  esac
done
[[ -r $cluster ]] || fail "there is no readable cluster file $cluster: submit with sbatch from the repository's root"
# shellcheck source=slurm/cluster.env
source "$cluster"

python=$VENV/bin/python
[[ $CONTAINER_IMAGE || ${#COMMAND_PREFIX[@]} -gt 0 ]] && python=python
step=(srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}")
[[ $CONTAINER_IMAGE ]] && step+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$CONTAINER_MOUNTS")
step+=(
  "${COMMAND_PREFIX[@]}" "$python" "$ROOT/tools/preprocess_tags.py" --tokenizer-model "$TOKENIZER_MODEL"
  --workers "${SLURM_CPUS_ON_NODE:-1}" "$@"
)
if [[ $dry_run ]]; then
  printf '%q ' "${step[@]}"
  echo
  exit
fi
[[ ${SLURM_JOB_ID-} ]] || fail "this is no Slurm job: use sbatch, --dry-run, or tools/preprocess_tags.py itself"
exec "${step[@]}"
