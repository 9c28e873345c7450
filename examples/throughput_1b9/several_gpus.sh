#!/usr/bin/env bash
# Everything that is measured on several GPUs of one host, in order of value; each JSON file in OUT is written after
# every set of ranks. About five minutes on four H100.
#
#   examples/throughput_1b9/several_gpus.sh OUT GPUS [RUN FLAGS...]
#
# GPUS is 2, 4 or 8; RUN FLAGS go to each run.py, such as --tiny --lengths 64 --iterations 1 for a trial without GPUs.
# Variables: PYTHON; COMMIT where the code is no git checkout; KIND of layers (local), as --kinds of run.py; NCCL_LIMIT,
# seconds for a layout of nccl_check.py.
set -u
out=$1 gpus=$2
shift 2
here=$(dirname "$0")
python=${PYTHON:-python3}
commit=${COMMIT:-$(git -C "$here" rev-parse HEAD 2>/dev/null)}
run_flags=("$@")
trainer=(--kernels-unchecked)
began=$SECONDS
mkdir -p "$out"

measure() {
  "$python" "$here/run.py" --out "$out/results_ranks.json" --kinds "${KIND:-local}" ${commit:+--commit "$commit"} \
    "$@" "${run_flags[@]}" -- "${trainer[@]}"
  local code=$?
  echo "-- $((SECONDS - began)) s so far"
  return $code
}

case $gpus in
  2) layouts=(cp2 cp2-a2a one) ;;
  4) layouts=(cp4 cp4-a2a tp2-cp2 cp2 one) ;;
  8) layouts=(cp8 cp8-a2a cp4 cp2 one) ;;
  *) echo "error: GPUS is $gpus: use 2, 4 or 8" >&2; exit 2 ;;
esac
measure --layouts "${layouts[@]}" --full-layouts "cp$gpus" --lengths 131072 --limit 75
if [[ $gpus == 8 ]]; then
  measure --shape 8b --layouts tp2-cp4 tp4-cp2 --lengths 131072 --limit 75
fi

"$python" "$here/../../tests/training/nccl_check.py" --processes "$gpus" --out "$out/nccl_$gpus.json" \
  --limit "${NCCL_LIMIT:-50}"
echo "-- $((SECONDS - began)) s so far"

# A million tokens: 16-bit gradients (one micro-batch adds nothing up) and few of the output layer's rows at a time. Four
# GPUs of 80 GB hold it with context parallelism alone by a few GB; with TP 2, parameters and gradients take half.
if [[ $gpus != 2 ]]; then
  trainer+=(--grad-reduce-in-bf16)
  million=(--models ksa --lengths 1048576 --loss-rows 1024 --limit 150)
  measure --layouts "cp$gpus" "${million[@]}" || measure --layouts "tp2-cp$((gpus / 2))" "${million[@]}"
fi
