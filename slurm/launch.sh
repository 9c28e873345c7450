#!/usr/bin/env bash
# Train a model of slurm/models in a Slurm job, one task for each rank; called by the job scripts.
#
#   launch.sh MODEL [--cluster FILE] [--layout FILE] [--override FILE]... [--run NAME] [--dry-run] [-- FLAG...]
#
# The job saves on SIGTERM, which Slurm sends before the time limit, and requeues itself until --train-iters is reached. It does
# so after a failure too, unless no checkpoint was saved since the start: a failure that repeats ends the job.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/slurm/flags.sh"

fail() {
  echo "error: $1" >&2
  exit 2
}

(($#)) || fail "launch.sh needs a model, one of: $(cd "$ROOT/slurm/models" && echo *.args)"
model=$1
shift
[[ -r $ROOT/slurm/models/$model.args ]] || fail "there is no model $model: use one of $(cd "$ROOT/slurm/models" && echo *.args)"
cluster=$ROOT/slurm/cluster.env layout=$ROOT/slurm/layouts/$model.args run=$model overrides=() dry_run='' extra=()
while (($#)); do
  case $1 in
    --cluster | --layout | --override | --run)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        --cluster) cluster=$2 ;;
        --layout) layout=$2 ;;
        --override) overrides+=("$2") ;;
        --run) run=$2 ;;
      esac
      shift 2
      ;;
    --dry-run)
      dry_run=1
      shift
      ;;
    --)
      shift
      extra=("$@")
      break
      ;;
    *) fail "unknown option $1: flags of the trainer go after --" ;;
  esac
done
[[ -r $cluster ]] || fail "there is no readable cluster file $cluster"
# shellcheck source=slurm/cluster.env
source "$cluster"

folder=$OUTPUT/$run
FLAGS=()
# A later stage takes the weights of the stage before.
declare -A before_stage=([ksa_1b9_32k]=ksa_1b9 [ksa_1b9_64k]=ksa_1b9_32k [ksa_1b9_128k]=ksa_1b9_64k)
read_flags "$ROOT/slurm/models/$model.args" "$layout"
FLAGS+=(
  --tokenizer-model "$TOKENIZER_MODEL" --data-args-path "$DATA_ARGS_PATH" --data-cache-path "$folder/data-cache"
  --save "$folder/checkpoints" --load "$folder/checkpoints" --save-interval 500 --ckpt-format torch_dist
  --exit-signal-handler --tensorboard-dir "$folder/tensorboard" --log-interval 10 --log-throughput
)
[[ ${before_stage[$model]-} ]] && FLAGS+=(--pretrained-checkpoint "$OUTPUT/${before_stage[$model]}/checkpoints")
read_flags "${overrides[@]}"
FLAGS+=("${extra[@]}")
iterations=$(flag_value --train-iters)
[[ $iterations =~ ^[1-9][0-9]*$ ]] || fail "--train-iters is '$iterations': a job is finished after a number of iterations"

python=$VENV/bin/python
[[ $CONTAINER_IMAGE || ${#COMMAND_PREFIX[@]} -gt 0 ]] && python=python
logs=$folder/logs/${SLURM_JOB_ID:-dry-run}-${SLURM_RESTART_COUNT:-0}
step=(
  srun --ntasks-per-node="$RANKS_PER_NODE" --cpus-per-task="$CPUS_PER_RANK" --kill-on-bad-exit=1
  --output="$logs/rank-%4t.log" --error="$logs/rank-%4t.log"
)
[[ $CONTAINER_IMAGE ]] && step+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$CONTAINER_MOUNTS")
step+=(bash "$ROOT/slurm/rank.sh" "${COMMAND_PREFIX[@]}" "$python" "$ROOT/pretrain_gpt.py" "${FLAGS[@]}")
if [[ $dry_run ]]; then
  printf '%q ' "${step[@]}"
  echo
  exit
fi

[[ ${SLURM_JOB_ID-} ]] || fail "this is no Slurm job: use sbatch, --dry-run, or torchrun as slurm/README.md shows"
[[ $python == python || -x $python ]] || fail "there is no $python: set VENV or a container in $cluster"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

saved() {
  cat "$folder/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0
}

mkdir -p "$logs"
before=$(saved)
echo "$run: $SLURM_JOB_NUM_NODES x $RANKS_PER_NODE ranks from iteration $before, rendezvous $MASTER_ADDR:$MASTER_PORT, logs $logs"
# Before the time limit Slurm signals the ranks only. Where it signals this shell too, it stops the job itself: cancelled,
# preempted, requeued, a node lost. The shell waits until the ranks have saved and leaves it at that.
stopped=
trap 'stopped=1' TERM
code=0
"${step[@]}" || code=$?
after=$(saved)
if [[ $stopped ]]; then
  echo "$run: stopped by Slurm, saved at iteration $after of $iterations"
  exit "$code"
elif ((code == 0 && after >= iterations)); then
  echo "$run: finished at iteration $after"
  exit
fi
((code == 0)) || echo "error: $run ended with exit code $code; srun's message names the rank, its log is in $logs" >&2
if ((after > before)); then
  echo "$run: saved at iteration $after of $iterations, requeueing"
  scontrol requeue "$SLURM_JOB_ID"
else
  echo "error: $run got no further than iteration $after of $iterations; logs $logs" >&2
  exit $((code ? code : 1))
fi
