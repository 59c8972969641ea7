#!/usr/bin/env bash
# Trains, exports and scores: jobs that wait for each other; if one fails, those after it are cancelled.
#   slurm/pipeline.sh [--SBATCH_OPTION=VALUE]... [--evaluate="BENCHMARK OPTIONS"]... CONFIG [KEY=VALUE]...
# BENCHMARK is geneval (the default), dpg, imagenet or shapes; options of sbatch are for the training. The model is exported to
# RUN/model, its scores lie in RUN/scores/BENCHMARK.
set -euo pipefail
RMOE_ROOT=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=slurm/job.sh
source "$RMOE_ROOT/slurm/job.sh"

evaluations=() options_of_training=()
while [[ ${1:-} == --*=* || ${1:-} == --exclusive ]]; do
    case $1 in
        --evaluate=*) evaluations+=("${1#*=}") ;;
        *) options_of_training+=("$1") ;;
    esac
    shift
done
[[ $# -gt 0 && $1 != *=* && $1 != -* ]] ||
    fail "a configuration is needed: slurm/pipeline.sh [OPTIONS] CONFIG [KEY=VALUE]...; nothing is submitted."
[[ ${#evaluations[@]} -gt 0 ]] || evaluations=(geneval)
for evaluation in "${evaluations[@]}"; do
    split_line "$evaluation"
    benchmark=${words_of_line[0]:-}
    [[ -f $RMOE_ROOT/slurm/eval_$benchmark.sh ]] || fail "there is no benchmark $benchmark; nothing is submitted."
    require_command eval "$benchmark"
done

submit_training "$RMOE_ROOT/slurm/pretrain_t2i.sh" "$1" "${options_of_training[@]}" "$@"
[[ -n $run_dir ]] || fail "where the run will lie is not known on this node (see above); only the training is submitted."

submit_after() { # submit_after JOB SCRIPT ARGUMENTS...: a job that waits for another's success and does not outlive its failure
    local answer
    answer=$("$RMOE_ROOT/slurm/$2" --dependency="afterok:$1" --kill-on-invalid-dep=yes "${@:3}")
    echo "$answer"
    submitted=${answer##* }
}
submit_after "$submitted" convert_to_hf.sh "$run_dir" "$run_dir/model"
converted=$submitted
for evaluation in "${evaluations[@]}"; do
    split_line "$evaluation"
    benchmark=${words_of_line[0]}
    submit_after "$converted" "eval_$benchmark.sh" "$run_dir/model" --out "$run_dir/scores/$benchmark" "${words_of_line[@]:1}"
done
