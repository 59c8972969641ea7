#!/usr/bin/env bash
# The main job end to end on the toy set: data, training, export, samples, scores.
#   bash tools/quickstart.sh [--short] [FOLDER]      (default: quickstart, or quickstart-short)
# It is meant to take 12 minutes on 2 cores, so a processor without instructions for bf16 takes as many training steps as fit.
# --short passes every stage quickly with a model that is hardly trained. Finished stages are skipped when it is run again.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
is_short=false out=quickstart
if [[ ${1:-} == --short ]]; then
    is_short=true out=quickstart-short
    shift
fi
if [[ $# -gt 1 || ${1:-} == -* ]]; then
    echo "error: $* is not understood; run tools/quickstart.sh [--short] [FOLDER]." >&2
    exit 2
fi
out=${1:-$out}
# shellcheck source=tools/environment.sh
source tools/environment.sh
times="set-up $((SECONDS - started)) s"

if $is_short; then
    size=(--train 500 --val 48)
    training=(training.steps=20 training.micro_batch_size=16 training.global_batch_size=16 optimizer.warmup_steps=5
        training.validation_samples=48 training.sample_every=20 training.sample_steps=2)
    sampling=(--steps 4 --prompt "two red circles" --prompt "a cross and a diamond")
    scoring=(--limit 12 --images-per-prompt 1 --steps 4)
else
    size=(--train 20000 --val 1000)
    training=()
    sampling=(--prompts-file configs/shapes_prompts.txt)
    scoring=(--limit 120 --steps 10)
fi

stage() { # stage NAME OUTPUT COMMAND...: print the command and run it, unless its output exists
    local name=$1 output=$2 start=$SECONDS
    shift 2
    if [[ -e $output ]]; then
        echo "== $name: $output exists"
        return
    fi
    printf '== %s\n$' "$name"
    printf ' %q' "$@"
    printf '\n'
    "$@"
    times+=", $name $((SECONDS - start)) s"
}

overrides=(run_dir="$out/run" data.train="$out/encoded/train" data.validation="$out/encoded/val" "${training[@]}")
stage data "$out/shapes" rmoe data build-shapes "$out/shapes" "${size[@]}" --seed 0
stage precompute "$out/encoded" rmoe data precompute configs/shapes_tiny.yaml "$out/shapes" "$out/encoded" \
    "${overrides[@]}"
if compgen -G "$out/run/checkpoints/step-????????" > /dev/null; then
    stage train "$out/run/finished" rmoe train --resume "$out/run"
else
    if ! $is_short && ! python -c 'import sys; from rmoe_megatron.distributed.processor import bf16_is_fast; sys.exit(not bf16_is_fast())'; then
        # Libraries warn of what no toy needs, so that what they say is shown only if it fails. Three minutes are for validation
        # and loading beside the steps, and for what follows.
        seconds=$((540 - SECONDS + started))
        steps=$(python tools/quickstart_steps.py configs/shapes_tiny.yaml --seconds "$seconds" 2> "$out/quickstart_steps.log") ||
            { cat "$out/quickstart_steps.log" >&2; exit 1; }
        echo "This processor multiplies bf16 slower than fp32: the model trains $steps steps in fp32, for which there is time, not 2000 in bf16."
        overrides+=(training.steps="$steps")
    fi
    stage train "$out/run/finished" rmoe train configs/shapes_tiny.yaml "${overrides[@]}"
fi
touch "$out/run/finished"
stage export "$out/model" rmoe convert to-hf "$out/run" "$out/model"
stage sample "$out/samples/grid.png" rmoe sample "$out/model" --out "$out/samples" "${sampling[@]}"
stage eval "$out/scores/results.json" rmoe eval shapes "$out/model" --data "$out/shapes" --out "$out/scores" \
    "${scoring[@]}"

cat "$out/scores/results.md"
cat <<EOF

Run folder       $out/run
Exported model   $out/model
Sample grid      $out/samples/grid.png
Scores           $out/scores/results.json and $out/scores/examples.png (toy set)
Time             $times; $((SECONDS - started)) s in all
EOF
if $is_short; then
    echo "The short form shows that every stage works here. Its model has hardly been trained: its pictures and scores say"
    echo "nothing; run tools/quickstart.sh without --short for those of a trained toy."
fi
