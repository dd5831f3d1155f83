#!/usr/bin/env bash
# Measure on a GPU what is left to measure there: bash benchmarks/gpu.sh [folder], 10 minutes at most.
#
# (a) tests/gpu; (b) benchmarks.cuda; (c) Fashion-MNIST as published, 500 epochs of batch 1024, by both
# recipes, tested under both protocols; (d) photographs at ten times the steps that two cores take.
# Each part leaves its log and figures in the folder (output/gpu) as it ends. The same command goes on
# with the parts that are not done, a training from its last.pt. It ends with 0 once all are done.
#
# PYTHON, LIMIT (seconds), FASHION and PHOTOS (data folders) and METRICS can be set; TRIAL is added to
# the flags of all trainings, to try the script without a GPU: TRIAL="--max_steps 2 --device cpu".
set -u
cd "$(dirname "$0")/.." || exit 2
OUT=${1:-output/gpu} LIMIT=${LIMIT:-600} METRICS=${METRICS:-l1 ssim psnr} TRIAL=${TRIAL:-}
PY=${PYTHON:-python} FASHION=${FASHION:-data/fashion-mnist} PHOTOS=${PHOTOS:-data/photos}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2

part() { # name, command: run it unless it is done or the time is over
  [ -e "$OUT/$1.done" ] && return
  local seconds=$((LIMIT - SECONDS - 20)) # main.py needs some to write its last.pt
  ((seconds > 0)) || { echo "$1: no time was left"; return 1; }
  timeout --signal=TERM --kill-after=15 "$seconds" "${@:2}" >>"$OUT/$1.log" 2>&1
  local code=$?
  case $code in
    0) touch "$OUT/$1.done" && echo "$1: done after $SECONDS s" ;;
    124 | 137 | 143) echo "$1: stopped after $SECONDS s; the same command goes on" && return 1 ;;
    *) echo "$1: failed with $code: $(tail -n 1 "$OUT/$1.log")" && return 1 ;;
  esac
}

measured() { # name, name of the data, flags of main.py: train, then measure under both protocols
  local name=$1 results="$OUT/results/$1/best/$2"
  part "$name" "$PY" main.py --output_folder "$OUT" --exp_name "$name" "${@:3}" $TRIAL || return
  part "$name-test" "$PY" test.py --output_folder "$OUT" --model_name "$name/best.pt" --save_codes || return
  for protocol in clean reference; do
    part "$name-$protocol" "$PY" evaluation.py --protocol "$protocol" --metrics $METRICS \
      --gt_path "$results/original" --g_path "$results/rec" --output "$OUT/$name-$protocol" || return
  done
  rm -rf "$results/original" "$results/rec" # 20,000 small files
}

fashion() { # all four at once: alone, none of them keeps a GPU busy
  for recipe in paper best; do
    for sizes in "512 64" "256 4"; do
      read -r k d <<<"$sizes"
      measured "$recipe-$k-$d" fashion-mnist --dataset fashion-mnist --data_folder "$FASHION" \
        --recipe "$recipe" --num_embedding "$k" --embedding_dim "$d" --validate_every 1325 &
    done
  done
  wait
}

part tests "$PY" -m pytest -q tests/gpu
part benchmarks "$PY" -m benchmarks.cuda --docs "$OUT"
fashion
measured photos "$(basename "$PHOTOS")" --dataset folder --data_folder "$PHOTOS" --image_size 64 --flip \
  --recipe best --latent_norm running --latent_channels 28 --lr 1e-3 --batch_size 16 --max_steps 55000

left=0
for name in tests benchmarks {paper,best}-{512-64,256-4}-{clean,reference} photos-{clean,reference}; do
  [ -e "$OUT/$name.done" ] || { echo "left: $name"; left=1; }
done
exit $left
