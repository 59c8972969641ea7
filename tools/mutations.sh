#!/usr/bin/env bash
# Changes the code a little, one place at a time, and sees whether a test notices (mutmut). Not a part of the suite: hours.
#   bash tools/mutations.sh FOLDER [PART...]      (all parts: see below; a run that was stopped goes on where it was)
# FOLDER gets a clone of the last commit with the mutated code, and survivors.txt: mutants that no test noticed. For each of them
# either a test is missing, or it computes the same: `cd FOLDER/PART && mutmut show NAME` shows it.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ $# -lt 1 || ${1:-} == -* ]]; then
    echo "error: name a folder for the mutants: bash tools/mutations.sh FOLDER [PART...]." >&2
    exit 2
fi
# shellcheck source=tools/environment.sh
source tools/environment.sh
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
folder=$(mkdir -p "$1" && cd "$1" && pwd)
shift

# Part: what is mutated, and the tests that are to notice.
declare -A code=(
    [random]="rmoe_megatron/counter_rng.py"
    [order]="rmoe_megatron/data/order.py"
    [diffusion]="rmoe_megatron/diffusion/*"
    [averages]="rmoe_megatron/training/ema.py"
    [health]="rmoe_megatron/training/health.py"
    [state]="rmoe_megatron/checkpoint/*"
    [recurrence]="rmoe_megatron/model/recurrence/*"
    [routing]="rmoe_megatron/engine/router_metrics.py"
    [queue]="rmoe_megatron/distributed/work_queue.py"
)
declare -A tests=(
    [random]="tests/test_counter_rng.py"
    [order]="tests/data/test_order.py tests/data/test_mixed_order.py"
    [diffusion]="tests/diffusion"
    [averages]="tests/training/test_ema.py"
    [health]="tests/training/test_health.py"
    [state]="tests/training/test_health.py tests/training/test_resume.py tests/checkpoint"
    [recurrence]="tests/model/test_recurrence.py tests/model/test_experts.py"
    [routing]="tests/engine/test_router_metrics.py"
    [queue]="tests/distributed/test_work_queue.py"
)
parts=("$@")
[[ $# -gt 0 ]] || parts=(random order diffusion averages health state recurrence routing queue)
for part in "${parts[@]}"; do
    if [[ -z ${code[$part]:-} ]]; then
        echo "error: there is no part $part; the parts are ${!code[*]}." >&2
        exit 2
    fi
done

lines() { # lines WORD...: each on a line of its own, as a list in setup.cfg
    printf '\n    %s' "$@"
}

pip install --quiet --disable-pip-version-check mutmut==3.8.1
for part in "${parts[@]}"; do
    clone=$folder/$part
    if [[ ! -d $clone ]]; then
        git clone --quiet . "$clone"
        read -ra mutated <<< "${code[$part]}"
        read -ra noticing <<< "${tests[$part]}"
        cat > "$clone/setup.cfg" << END
[mutmut]
source_paths=rmoe_megatron/
only_mutate=$(lines "${mutated[@]}")
pytest_add_cli_args_test_selection=$(lines "${noticing[@]}")
pytest_add_cli_args=
    -p
    no:cacheprovider
also_copy=$(lines configs tools slurm README.md pyproject.toml)
END
    fi
    echo "== $part"
    (cd "$clone" && mutmut run --max-children 2 && mutmut results --all true) > "$folder/$part.log" 2>&1 || {
        tail -n 20 "$folder/$part.log"
        exit 1
    }
    echo "$(grep -c ': killed\|: timeout' "$folder/$part.log") killed, $(grep -c ': survived' "$folder/$part.log") survived," \
        "$(grep -c ': no tests' "$folder/$part.log") without a test"
done
grep -h ': survived' "$folder"/*.log | sort -u > "$folder/survivors.txt" || true
echo "$folder/survivors.txt has $(wc -l < "$folder/survivors.txt") mutants that no test noticed."
