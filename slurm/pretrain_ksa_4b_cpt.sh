#!/usr/bin/env bash
#SBATCH --job-name=ksa-4b-cpt
#SBATCH --nodes=6
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# A dense model, such as Qwen3-4B-base, becomes a KSA model (examples/ksa_from_dense/run.py) in one job that requeues itself until
# every stage is done; submit from the repository's root.
#
#   pretrain_ksa_4b_cpt.sh [--cluster FILE] [--run NAME] [--dry-run] -- --input FOLDER --data-path PREFIX... [FLAG of run.py]...
set -euo pipefail
ROOT=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
fail() {
  echo "error: $1" >&2
  exit 2
}
[[ -r $ROOT/examples/ksa_from_dense/run.py ]] || fail "$ROOT is not the repository: submit with sbatch from its root"
cluster=$ROOT/slurm/cluster.env run=ksa_4b_cpt dry_run=()
while (($#)); do
  case $1 in
    --cluster | --run)
      (($# > 1)) || fail "$1 needs a value"
      [[ $1 == --cluster ]] && cluster=$2 || run=$2
      shift 2
      ;;
    --dry-run)
      dry_run=(--dry-run)
      shift
      ;;
    --)
      shift
      break
      ;;
    *) fail "unknown option $1: flags of examples/ksa_from_dense/run.py go after --" ;;
  esac
done
[[ -r $cluster ]] || fail "there is no readable cluster file $cluster"
# shellcheck source=slurm/cluster.env
source "$cluster"
python=$VENV/bin/python
[[ $CONTAINER_IMAGE || ${#COMMAND_PREFIX[@]} -gt 0 ]] && python=python
folder=$OUTPUT/$run
step=(
  srun --ntasks-per-node="$RANKS_PER_NODE" --cpus-per-task="$CPUS_PER_RANK" --kill-on-bad-exit=1
)
[[ $CONTAINER_IMAGE ]] && step+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$CONTAINER_MOUNTS")
step+=(bash "$ROOT/slurm/rank.sh" "${COMMAND_PREFIX[@]}" "$python")
chain=(
  "${COMMAND_PREFIX[@]}" "$python" "$ROOT/examples/ksa_from_dense/run.py" --work "$folder" --launcher "${step[*]@Q}" "$@"
)
# A flag of pretrain_gpt.py that the caller gave after a second -- stays last.
if ((${#dry_run[@]})); then
  exec "${chain[@]:0:${#chain[@]}-$#}" --dry-run "$@"
fi
[[ ${SLURM_JOB_ID-} ]] || fail "this is no Slurm job: use sbatch, --dry-run, or examples/ksa_from_dense/run.py without Slurm"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

progress() {
  "${chain[@]:0:${#chain[@]}-$#}" --progress "$@" 2>/dev/null | tail -n 1
}
before=$(progress "$@")
stopped=
trap 'stopped=1' TERM
code=0
"${chain[@]}" || code=$?
after=$(progress "$@")
echo "$run: iterations done and to do: $after, exit code $code"
if ((code == 0)) || [[ $stopped ]]; then
  exit "$code"
elif [[ ${after% *} -gt ${before% *} ]]; then
  echo "$run: requeueing"
  scontrol requeue "$SLURM_JOB_ID"
else
  echo "error: $run got no further than $after" >&2
  exit "$code"
fi
