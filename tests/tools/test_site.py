"""slurm/site.sh and job.sh without SLURM: containers, and a login node that lacks what jobs have; srun is a stand-in."""

import subprocess
from pathlib import Path
from typing import cast

import pytest

from rmoe_megatron.training.history import EventName, record

ROOT = Path(__file__).parents[2]


def call(folder: Path, command: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Source job.sh and run a command of it where srun, apptainer and sbatch print how they are called."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name in ("srun", "apptainer", "sbatch"):
        program = tools / name
        program.write_text(f"#!/usr/bin/env bash\nprintf '%s\\n' {name} \"$@\"\n")
        program.chmod(0o755)
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'source "$RMOE_ROOT/slurm/job.sh"; {command}'],
        env={"PATH": f"{tools}:/usr/bin:/bin", "HOME": "/home/x", "RMOE_ROOT": str(ROOT), **settings},
        cwd=folder, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


TRAIN = "in_tasks --ntasks=4 -- rmoe train 'a b.yaml'"


def test_pyxis(tmp_path: Path) -> None:
    done = call(
        tmp_path,
        TRAIN,
        SITE_CONTAINER_RUNTIME="pyxis",
        SITE_CONTAINER_IMAGE="/i/r.sqsh",
        SITE_CONTAINER_MOUNTS="/data,/runs",
    )
    assert done.stdout.splitlines() == [
        "srun", "--ntasks=4", "--container-image=/i/r.sqsh", "--container-mounts=/data:/data,/runs:/runs",
        "--no-container-mount-home", f"--container-workdir={tmp_path}", "rmoe", "train", "a b.yaml",
    ]  # fmt: skip


def test_apptainer_in_jobs_and_on_the_login_node(tmp_path: Path) -> None:
    site = {
        "SITE_CONTAINER_RUNTIME": "apptainer",
        "SITE_CONTAINER_IMAGE": "/i/r.sif",
        "SITE_CONTAINER_MOUNTS": "/data",
    }
    assert call(tmp_path, TRAIN, **site).stdout.splitlines() == [
        "srun", "--ntasks=4", "apptainer", "exec", "--nv", "--bind", "/data", "--pwd", str(tmp_path), "/i/r.sif",
        "rmoe", "train", "a b.yaml",
    ]  # fmt: skip
    done = call(tmp_path, "rmoe_on_login_node train c.yaml --check", **site)
    assert done.stdout.splitlines() == [
        "apptainer",
        "exec",
        "--bind",
        "/data",
        "/i/r.sif",
        "rmoe",
        "train",
        "c.yaml",
        "--check",
    ]


def test_the_check_counts_memory_against_the_gpu_of_the_site(tmp_path: Path) -> None:
    check = 'nodes=2 tasks_per_node=4; check_training c.yaml || true; cat "$HOME/calls"'
    rmoe = 'rmoe_on_login_node() { echo "$@" >> "$HOME/calls"; echo "# memory of a rank"; echo "# run folder: /r"; }; '
    for model, expected in (
        ("h100", "train c.yaml --check --ranks 8 --gpu h100"),
        ("", "train c.yaml --check --ranks 8"),
    ):
        (tmp_path / "calls").unlink(missing_ok=True)
        done = call(tmp_path, rmoe + check, HOME=str(tmp_path), SITE_GPU_MODEL=model)
        assert done.stdout.splitlines()[-1] == expected, done.stderr
        assert "memory of a rank" in done.stderr.splitlines()


def test_enroot_gets_the_variables_of_the_task(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in {
        "srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_PROCID=3 OTHER=1 "$@"',
        "enroot": "printf '%s\\n' enroot \"$@\"",
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'source "$RMOE_ROOT/slurm/job.sh"; {TRAIN}'],
        env={
            "PATH": f"{tools}:/usr/bin:/bin", "HOME": "/home/x", "RMOE_ROOT": str(ROOT), "SITE_CONTAINER_RUNTIME": "enroot",
            "SITE_CONTAINER_IMAGE": "/i/r.sqsh", "SITE_CONTAINER_MOUNTS": "/data,/runs:/r", "SITE_CONTAINER_OPTIONS": "--rw",
            "SITE_NETWORK_INTERFACE": "ib0",
        },
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert said[:7] == ["enroot", "start", "--rw", "--mount", "/data:/data", "--mount", "/runs:/r"], (
        done.stderr
    )
    end = said.index("/i/r.sqsh")
    passed = set(said[7:end]) - {"--env"}
    assert {
        "SLURM_PROCID",
        "HF_HOME",
        "OMP_NUM_THREADS",
        "NCCL_SOCKET_IFNAME",
        "GLOO_SOCKET_IFNAME",
        "NVIDIA_VISIBLE_DEVICES",
    } <= passed
    assert not passed & {"OTHER", "PATH", "HOME"}
    assert said[end + 1 :] == [
        "sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", str(tmp_path), "rmoe", "train", "a b.yaml",
    ]  # fmt: skip


def test_modules_are_loaded_before_anything_runs(tmp_path: Path) -> None:
    module = 'module() { echo "module $*"; [[ $3 != missing ]]; }; export -f module; rmoe() { :; };'
    done = call(tmp_path, f"{module} {TRAIN}", SITE_MODULES="cuda/13.0 'a b'", SITE_VENV=str(tmp_path))
    assert done.stdout.splitlines() == [
        "module load cuda/13.0 a b",
        "srun",
        "--ntasks=4",
        "rmoe",
        "train",
        "a b.yaml",
    ]
    done = call(tmp_path, f"{module} {TRAIN}", SITE_MODULES="cuda missing")
    assert done.returncode == 2
    assert "`module load cuda missing` does not work on" in done.stderr
    done = call(tmp_path, TRAIN, SITE_MODULES="cuda", MODULESHOME="/nowhere")
    assert done.returncode == 2
    assert "there is no `module` on" in done.stderr


def test_a_dry_run_prints_what_is_submitted_and_submits_nothing(tmp_path: Path) -> None:
    script = ROOT / "slurm" / "pretrain_t2i.sh"
    command = f"submit_training {script} configs/t2i_2b.yaml --dry-run --qos=low --comment='two words' seed=1 'a=b c'"
    site = {
        "SITE_VENV": str(tmp_path), "SITE_ACCOUNT": "vision", "SITE_CONSTRAINT": "h100&ib", "SITE_RESERVATION": "team",
        "SITE_EXCLUDE": "n7", "SITE_GPU_TYPE": "h100",
    }  # fmt: skip
    done = call(tmp_path, command, **site)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "logs").exists()
    lines = done.stdout.splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    expected = {
        "--job-name=pretrain_t2i", "--nodes=4", "--account=vision", "--qos=low", "--constraint=h100&ib", "--reservation=team",
        "--exclude=n7", "--gpus-per-node=h100:8", '--comment="two words"', "--requeue", "--open-mode=append",
        f"--output={tmp_path}/logs/%x-%j.log", "--mincpus=8", "--signal=B:USR1@600", "--time=1-00:00:00",
    }  # fmt: skip
    assert set(options) == expected
    assert len(options) == len(expected)
    assert f"set -- {ROOT}/configs/t2i_2b.yaml seed=1 a=b\\ c" in lines
    assert "export SITE_ACCOUNT=vision" in lines
    # SLURM runs a copy of this name; what it calls then is what the script itself would call.
    job = tmp_path / "slurm_script"
    job.write_text(done.stdout)
    job.chmod(0o755)
    run = subprocess.run(["bash", "-n", str(job)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def test_an_unknown_runtime_and_a_job_without_rmoe_are_mistakes(tmp_path: Path) -> None:
    done = call(tmp_path, TRAIN, SITE_CONTAINER_RUNTIME="podman")
    assert (done.returncode, done.stderr) == (
        2, "error: SITE_CONTAINER_RUNTIME=podman is neither pyxis nor enroot nor apptainer nor empty.\n",
    )  # fmt: skip
    done = call(tmp_path, TRAIN, SITE_VENV=str(tmp_path))
    assert done.returncode == 2
    assert "there is no rmoe in this job" in done.stderr


def test_a_login_node_without_rmoe_says_that_nothing_was_checked(tmp_path: Path) -> None:
    (tmp_path / "script.sh").write_text("#SBATCH --nodes=3\n")
    done = call(
        tmp_path, 'submit_training script.sh configs/t2i_2b.yaml --qos=low "seed=1"',
        SITE_VENV=str(tmp_path), SITE_ACCOUNT="vision", SITE_PARTITION="h100", SITE_MEMORY_PER_NODE="0", SITE_CPUS_PER_TASK="12", SITE_RUN_ROOT="/runs",
        SITE_SBATCH_OPTIONS="--constraint=ib --exclude=n7",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("not checked: there is no rmoe on this node")
    (copy,) = (tmp_path / "logs").glob("t2i_2b-??????.yaml")
    assert copy.read_bytes() == (ROOT / "configs" / "t2i_2b.yaml").read_bytes()
    assert done.stdout.splitlines() == [
        "sbatch", f"--output={tmp_path}/logs/%x-%j.log", "--open-mode=append", "--account=vision", "--partition=h100",
        "--mem=0", "--constraint=ib", "--exclude=n7", "--mincpus=96", "--gpus-per-node=8", "--nodes=3",
        "--signal=B:USR1@600", "--requeue", "--qos=low", "script.sh", str(copy), "seed=1",
        "run_dir=/runs/t2i_2b",
    ]  # fmt: skip


@pytest.mark.parametrize("mounts", ["/data", "/data,{folder}", "/data,{folder}:/elsewhere"])
def test_a_container_that_does_not_see_the_copy_of_a_configuration_reads_the_file(
    tmp_path: Path, mounts: str
) -> None:
    (tmp_path / "c.yaml").write_text("seed: 3\n")
    done = call(
        tmp_path, f"keep_configuration {tmp_path}/c.yaml && echo $kept", SITE_CONTAINER_RUNTIME="pyxis",
        SITE_CONTAINER_MOUNTS=mounts.format(folder=tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    is_seen = mounts == "/data,{folder}"
    assert (done.stdout.strip() != f"{tmp_path}/c.yaml") is is_seen
    assert Path(done.stdout.strip()).read_text() == "seed: 3\n"
    assert ("the container does not see SITE_LOGS" in done.stderr) is not is_seen


def test_a_command_that_this_version_has_not_is_said(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "activate").write_text("")
    rmoe = tmp_path / "bin" / "rmoe"
    rmoe.write_text('#!/usr/bin/env bash\n[[ "$*" == "eval geneval --help" ]]\n')
    rmoe.chmod(0o755)
    assert call(tmp_path, "require_command eval geneval", SITE_VENV=str(tmp_path)).returncode == 0
    done = call(tmp_path, "require_command eval poetry", SITE_VENV=str(tmp_path))
    assert (done.returncode, done.stderr) == (
        2, "error: `rmoe eval poetry` is not part of this version; nothing is submitted.\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lr=1e-3  steps=2\r", ["lr=1e-3", "steps=2"]),
        ("  lr=1e-4   # smaller", ["lr=1e-4"]),
        ("# nothing", []),
        ("name=run#1 'a b=c' d=\"e f\" g\\ h", ["name=run#1", "a b=c", "d=e f", "g h"]),
        (
            'prompts=["a red circle", "it\'s # 2"] x={a: 1}',
            ['prompts=["a red circle", "it\'s # 2"]', "x={a: 1}"],
        ),
        ("prompts='[\"a, b\", c]'", ['prompts=["a, b", c]']),
        ("empty='' end", ["empty=", "end"]),
        ("$HOME * `id` $(id)", ["$HOME", "*", "`id`", "$(id)"]),
    ],
)
def test_a_line_of_a_sweep_is_split_as_a_shell_does(tmp_path: Path, line: str, words: list[str]) -> None:
    done = call(tmp_path, 'split_line "$LINE"; printf "%s\\n" "${words_of_line[@]}"', LINE=line)
    assert done.stdout.splitlines() == (words or [""]), done.stderr


def test_a_quote_that_is_not_closed_is_a_mistake(tmp_path: Path) -> None:
    done = call(tmp_path, 'split_line "$LINE"', LINE="a='b c")
    assert (done.returncode, done.stderr) == (2, "error: a quote ' is not closed in: a='b c\n")


@pytest.mark.parametrize(
    ("array", "parts"),
    [
        ("0-3", ["0 0/4", "1 1/4", "2 2/4", "3 3/4"]),
        ("0-14:7%2", ["0 0/3", "7 1/3", "14 2/3"]),
        ("5,3", ["3 0/2", "5 1/2"]),
        ("8", ["8 0/1"]),
        ("010-12,11", ["10 0/3", "11 1/3", "12 2/3"]),
    ],
)
def test_parts_follow_from_the_numbers_of_an_array(tmp_path: Path, array: str, parts: list[str]) -> None:
    command = """array=$ARRAY; array_numbers; for number in "${numbers[@]}"; do
        find_part "$number" "${numbers[0]}" "${numbers[-1]}" "${#numbers[@]}"; echo "$number $part"; done"""
    assert call(tmp_path, command, ARRAY=array).stdout.splitlines() == parts


@pytest.mark.parametrize(
    ("array", "words"),
    [
        ("0,1,4", "do not lie at equal distances"),
        ("0,3,4", "do not lie at equal distances"),
        ("a", "no list of numbers"),
        ("1-", "no list of numbers"),
        ("0-3%0", "no list of numbers"),
        ("3-1", "counts down"),
        ("0-4:", "no list of numbers"),
    ],
)
def test_an_array_without_parts_is_not_submitted(tmp_path: Path, array: str, words: str) -> None:
    command = 'check_precompute() { :; }; precompute_job "$RMOE_ROOT/slurm/precompute_latents.sh" --array=$ARRAY c.yaml in out'
    done = call(tmp_path, command, ARRAY=array)
    assert done.returncode == 2
    assert words in done.stderr
    assert "sbatch" not in done.stdout


def test_a_training_is_no_array(tmp_path: Path) -> None:
    command = 'submit_training "$RMOE_ROOT/slurm/pretrain_t2i.sh" configs/t2i_2b.yaml --array=0-3'
    done = call(tmp_path, command, SITE_VENV=str(tmp_path))
    assert done.returncode == 2
    assert "pretrain_t2i.sh is one job, not an array" in done.stderr
    assert "sbatch" not in done.stdout


@pytest.mark.parametrize(
    ("configuration", "is_ours"),
    [
        ("# written by job 77\n", True),
        ("# written by job 7\n", False),
        ("# written by process 77 on host\n", False),
        ("seed: 1\n", True),  # younger than the job
        (None, False),
    ],
)
def test_a_start_resumes_what_one_of_the_same_job_has_written(
    tmp_path: Path, configuration: str | None, is_ours: bool
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 2\n")  # of other days
    write = "rm run/config.yaml" if configuration is None else f"printf '{configuration}' > run/config.yaml"
    decide = "was_started_by_this_job && echo ours || echo not"
    command = (
        f"run_dir=run; mark_start; {decide}; sleep 0.05; {write}; SLURM_RESTART_COUNT=1 mark_start; {decide}"
    )
    done = call(tmp_path, command, SLURM_JOB_ID="77")
    assert done.stdout.splitlines() == ["not", "ours" if is_ours else "not"]


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "slurm").glob("*.sh")))
def test_scripts_can_be_called(script: str) -> None:
    is_sourced = script in ("site.sh", "job.sh")
    path = ROOT / "slurm" / script
    assert bool(path.stat().st_mode & 0o100) != is_sourced
    assert script in (ROOT / "slurm" / "README.md").read_text()


@pytest.mark.parametrize(
    ("event", "restart", "code"),
    [
        ("finished", 2, 0),
        ("interrupted", 2, 75),
        ("failed", 2, 1),
        ("resumed", 2, None),
        ("finished", 1, None),
    ],
)
def test_srun_is_ended_when_the_run_of_this_start_says_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str, restart: int, code: int | None
) -> None:
    """The line is that of the package; a minute's sleep is none here, and after fifty the test gives up."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    record(tmp_path, cast(EventName, event), step=3, why='"a reason"')
    done = call(
        tmp_path,
        f"slept=0; sleep() {{ ((++slept < 50)) || exit 9; }}; run_dir={tmp_path}; command sleep 60 > /dev/null 2>&1 & "
        f"trap 'kill $! 2> /dev/null || true' EXIT; end_srun_after_run $! {tmp_path}/ended; wait $! || echo $? $(cat {tmp_path}/ended)",
        SLURM_JOB_ID="7",
        SLURM_RESTART_COUNT="2",
    )
    if code is None:
        assert (done.returncode, done.stdout) == (9, "")
    else:
        assert (done.returncode, done.stdout.strip()) == (0, f"137 {code}"), done.stderr
