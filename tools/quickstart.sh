#!/usr/bin/env bash
# The main job end to end on the toy set: data, training, export, samples, scores.
#   bash tools/quickstart.sh [FOLDER]      (default: quickstart)
# Finished stages are skipped when it is run again.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
# shellcheck source=tools/environment.sh
source tools/environment.sh
out=${1:-quickstart}
times="set-up $((SECONDS - started)) s"

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

overrides=(run_dir="$out/run" data.train="$out/encoded/train" data.validation="$out/encoded/val")
stage data "$out/shapes" rmoe data build-shapes "$out/shapes" --train 20000 --val 1000 --seed 0
stage precompute "$out/encoded" rmoe data precompute configs/shapes_tiny.yaml "$out/shapes" "$out/encoded" \
    "${overrides[@]}"
if compgen -G "$out/run/checkpoints/step-????????" > /dev/null; then
    stage train "$out/run/finished" rmoe train --resume "$out/run"
else
    stage train "$out/run/finished" rmoe train configs/shapes_tiny.yaml "${overrides[@]}"
fi
touch "$out/run/finished"
stage export "$out/model" rmoe convert to-hf "$out/run" "$out/model"
stage sample "$out/samples/grid.png" rmoe sample "$out/model" --out "$out/samples" \
    --prompts-file configs/shapes_prompts.txt
stage eval "$out/scores/results.json" rmoe eval shapes "$out/model" --data "$out/shapes" --out "$out/scores" \
    --limit 120 --steps 20

cat "$out/scores/results.md"
cat <<EOF

Run folder       $out/run
Exported model   $out/model
Sample grid      $out/samples/grid.png
Scores           $out/scores/results.json and $out/scores/examples.png (toy set, 120 prompts a split)
Time             $times; $((SECONDS - started)) s in all
EOF
