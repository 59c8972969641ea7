"""What slurm/job.sh does with a job: signals handed on, restarts counted, comments; with a stand-in for rmoe."""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import local_slurm
from tests.support.local_slurm import ROOT, LocalSlurm

# Says where the run lies, notes how it was called, then does what the test asks for.
RMOE = """\
#!/usr/bin/env bash
case "$*" in
    *--check*) echo "# run folder: {folder}/run" ;;
    *) if ((SLURM_PROCID == 0)); then echo "${{SLURM_RESTART_COUNT:-0}} $*" >> {folder}/calls; fi
       {body} ;;
esac
"""


@dataclass
class Site:
    """A checkout of slurm/ on a cluster without GPUs, with what its users say in the environment."""

    slurm: LocalSlurm
    folder: Path

    @property
    def settings(self) -> dict[str, str]:
        return {
            "SITE_GPUS_PER_NODE": "0", "SITE_TASKS_PER_NODE": "2", "SITE_VENV": f"{self.folder}/venv",
            "SITE_LOGS": f"{self.folder}/logs", "SITE_COMMENT_SECONDS": "1", "SITE_MAX_RESTARTS": "2",
        }  # fmt: skip

    def stand_in(self, body: str) -> None:
        """Make a rmoe that does ``body``."""
        program = self.folder / "venv" / "bin" / "rmoe"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(RMOE.format(folder=self.folder, body=body))
        program.chmod(0o755)
        (program.parent / "activate").write_text(f"PATH={program.parent}:$PATH\n")

    def submit(self, script: str, *arguments: str) -> str:
        return self.slurm.submit(str(ROOT / "slurm" / script), *arguments, cwd=self.folder, **self.settings)

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted((self.folder / "logs").glob("*.log")))

    def calls(self) -> list[str]:
        """How rmoe was called; the copy that a job has of its configuration under the name that it was submitted by."""
        text = (self.folder / "calls").read_text()
        return re.sub(rf"{self.folder}/logs/c-\w{{6}}\.yaml", "c.yaml", text).splitlines()


@pytest.fixture
def site(slurm: LocalSlurm, tmp_path: Path) -> Site:
    (tmp_path / "c.yaml").write_text("")
    return Site(slurm, tmp_path)


SAVES_AT_A_SIGNAL = """\
    echo ready
    mkdir -p {folder}/run; echo "# written by job $SLURM_JOB_ID" > {folder}/run/config.yaml
    if ((${{SLURM_RESTART_COUNT:-0}})); then exit 0; fi
    trap 'echo saved; exit 75' USR1
    for ((i = 0; i < 600; i++)); do sleep 0.1; done"""


def test_the_time_limit_is_told_to_the_ranks_and_the_job_starts_anew(site: Site) -> None:
    site.stand_in(SAVES_AT_A_SIGNAL.format(folder=site.folder))
    # SLURM's limits are minutes; --signal=B:USR1@N reaches the batch script alone, which tells srun.
    options = ("--time=1", "--nodes=2")
    job = site.slurm.submit(
        str(ROOT / "slurm" / "pretrain_t2i.sh"), *options, "c.yaml", "seed=3", "run_dir=x", cwd=site.folder,
        **{**site.settings, "SITE_SIGNAL_SECONDS": "50"},
    )  # fmt: skip
    assert site.slurm.wait(job) == "COMPLETED", site.log()
    assert site.calls() == [
        "0 train c.yaml seed=3 run_dir=x",
        f"1 train --resume {site.folder}/run seed=3 run_dir=x",
    ]
    assert site.log().count("saved") == 4  # a line of each of four tasks
    assert f"job {job} starts anew after exit code 75, restart 1 of 2 without a new checkpoint." in site.log()


def test_a_crash_loop_ends(site: Site) -> None:
    site.stand_in("exit 7")
    job = site.submit("pretrain_t2i.sh", "--nodes=1", "c.yaml")
    assert site.slurm.wait(job) == "FAILED"
    assert site.calls() == [f"{number} train c.yaml" for number in (0, 1, 2)]
    assert f"error: job {job} was started again 2 times without a new checkpoint of its own" in site.log()
    assert site.slurm.describe(job)["ExitCode"] == "7:0"


def test_restarts_with_progress_are_not_counted(site: Site) -> None:
    checkpoint = "run/checkpoints/step-0000000${SLURM_RESTART_COUNT:-0}"
    site.stand_in(
        f"((${{SLURM_RESTART_COUNT:-0}} == 4)) && exit 0; mkdir -p {site.folder}/{checkpoint}; exit 1"
    )
    job = site.submit("pretrain_t2i.sh", "--nodes=1", "c.yaml")
    assert site.slurm.wait(job) == "COMPLETED", site.log()
    assert len(site.calls()) == 5


def test_checkpoints_of_another_job_are_no_progress(site: Site) -> None:
    body = """folder={folder}/run/checkpoints/step-0000000${{SLURM_RESTART_COUNT:-0}}; mkdir -p $folder
        echo '{{"step": 1, "job": "999999"}}' > $folder/run_state.json; exit 1"""
    site.stand_in(body.format(folder=site.folder))
    job = site.submit("pretrain_t2i.sh", "--nodes=1", "c.yaml")
    assert site.slurm.wait(job) == "FAILED"
    assert len(site.calls()) == 3  # SITE_MAX_RESTARTS is 2
    assert "2 times without a new checkpoint of its own (the newest is none" in site.log()


@pytest.mark.parametrize(
    "body",
    ["exit 2", "((SLURM_PROCID == 1)) && exit 2; kill -9 $$"],
    ids=["all ranks", "one, and SLURM ends the other"],
)
def test_a_mistake_is_not_repeated(site: Site, body: str) -> None:
    site.stand_in(body)
    job = site.submit("pretrain_t2i.sh", "--nodes=1", "c.yaml")
    assert site.slurm.wait(job) == "FAILED"
    assert len(site.calls()) == 1
    assert site.slurm.describe(job)["ExitCode"] == "2:0"
    assert f"job {job} ends after a mistake, see above; it is not started again." in site.log()


def test_a_cancelled_job_stays_cancelled_and_squeue_shows_where_a_run_is(site: Site) -> None:
    status = f"mkdir -p {site.folder}/run; echo 'step 12/40  loss 0.5  ETA 01:00' > {site.folder}/run/status"
    site.stand_in(f"{status}; trap 'exit 75' TERM; for ((i = 0; i < 600; i++)); do sleep 0.1; done")
    job = site.submit("pretrain_t2i.sh", "--nodes=1", "c.yaml")
    site.slurm.wait(job, "RUNNING")
    for _ in range(300):
        comment = site.slurm.run("squeue", "--noheader", f"--jobs={job}", "--format=%k").stdout.strip()
        if comment.startswith("step"):
            break
        site.slurm.run("sleep", "0.1")
    assert comment == "step 12/40  loss 0.5  ETA 01:00"
    site.slurm.signal(job)
    site.slurm.wait(job, "CANCELLED")
    site.slurm.run("sleep", "8")  # a requeued job would run again after as long
    assert site.slurm.wait(job, "CANCELLED") == "CANCELLED"
    assert len(site.calls()) == 1


def test_sbatch_alone_checks_in_the_job(site: Site) -> None:
    site.stand_in("exit 0")
    script = str(ROOT / "slurm" / "finetune_sd3.sh")
    options = ("--nodes=1-2", "--mincpus=2", "--gpus-per-node=0", f"--output={site.folder}/logs/%j.log")
    (site.folder / "logs").mkdir()
    job = site.slurm.submit("sbatch", *options, script, "c.yaml", cwd=ROOT, **site.settings)
    assert site.slurm.wait(job) == "COMPLETED", site.log()
    assert site.calls() == ["0 train c.yaml"]
    program = site.folder / "venv" / "bin" / "rmoe"
    program.write_text("#!/bin/sh\necho error: it is wrong >&2\nexit 2\n")
    job = site.slurm.submit("sbatch", *options, script, "c.yaml", cwd=ROOT, **site.settings)
    assert site.slurm.wait(job) == "FAILED"
    assert site.log().count("error: it is wrong") == 1


def test_a_sweep_trains_every_line(site: Site) -> None:
    site.stand_in("exit 0")
    (site.folder / "lines").write_text("# rates\nlr=1e-3 steps=2\n\nlr=1e-4   # smaller\n")
    job = site.submit("sweep.sh", "--nodes=1", "c.yaml", "lines", "seed=1")
    for number in (0, 1):
        assert site.slurm.wait(f"{job}_{number}") == "COMPLETED", site.log()
    assert sorted(site.calls()) == [
        f"0 train c.yaml seed=1 lr=1e-3 steps=2 run_dir={site.folder}/run-0",
        f"0 train c.yaml seed=1 lr=1e-4 run_dir={site.folder}/run-1",
    ]


def test_a_job_has_the_configuration_as_it_was_at_submission(site: Site) -> None:
    site.stand_in("for word; do [[ $word != *.yaml ]] || cat $word; done")
    (site.folder / "c.yaml").write_text("seed: 7\n")
    (site.folder / "lines").write_text("a=1\n")
    jobs = [
        site.submit("pretrain_t2i.sh", "--nodes=1", "--begin=now+1hour", "c.yaml"),
        site.submit("sweep.sh", "--nodes=1", "--begin=now+1hour", "c.yaml", "lines"),
    ]
    (site.folder / "c.yaml").write_text("seed: 8\n")  # for the next job
    for job in jobs:
        assert site.slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now").returncode == 0
        assert site.slurm.wait(job) == "COMPLETED", site.log()
    assert re.findall(r"^seed: \d", site.log(), re.MULTILINE) == ["seed: 7"] * 4  # two jobs of two tasks


def test_an_array_runs_as_many_tasks_at_once_as_it_says(site: Site) -> None:
    note = f"echo $1 $SLURM_ARRAY_TASK_ID >> {site.folder}/noted"
    site.stand_in(f"n() {{ ((SLURM_PROCID)) || {note}; }}; n begin; sleep 2; n end")
    (site.folder / "lines").write_text("a=1\na=2\na=3\na=4\na=5\n")
    job = site.submit("sweep.sh", "--nodes=1", "--array=0-3%2", "c.yaml", "lines")
    for number in range(4):
        assert site.slurm.wait(f"{job}_{number}") == "COMPLETED", site.log()
    running, most, numbers = 0, 0, []
    for line in (site.folder / "noted").read_text().splitlines():
        what, number = line.split()
        running += 1 if what == "begin" else -1
        most = max(most, running)
        numbers += [number] if what == "begin" else []
    assert (sorted(numbers), most) == (["0", "1", "2", "3"], 2)


def test_an_array_that_the_environment_asks_for_is_refused_where_a_job_is_one(site: Site) -> None:
    site.stand_in("exit 0")
    for script, arguments in (("pretrain_t2i.sh", ["c.yaml"]), ("convert_to_hf.sh", ["run", "out"])):
        done = site.slurm.run(
            str(ROOT / "slurm" / script), *arguments, cwd=site.folder, **site.settings, SBATCH_ARRAY_INX="0-3"
        )
        assert done.returncode == 2
        assert "is one job, not an array (--array=0-3)" in done.stderr


def test_a_task_of_an_array_starts_itself_anew_and_no_other(site: Site) -> None:
    """The last task has the array's number as its own."""
    site.stand_in("((SLURM_ARRAY_TASK_ID == 2 && ${SLURM_RESTART_COUNT:-0} == 0)) && exit 75; exit 0")
    (site.folder / "lines").write_text("a=1\na='b c'\na=[d, \"e f\"]\n")
    job = site.submit("sweep.sh", "--nodes=1", "c.yaml", "lines")
    for number in (0, 1, 2):
        assert site.slurm.wait(f"{job}_{number}") == "COMPLETED", site.log()
    run = f"{site.folder}/run"
    assert sorted(site.calls()) == [
        f"0 train c.yaml a=1 run_dir={run}-0",
        f'0 train c.yaml a=[d, "e f"] run_dir={run}-2',
        f"0 train c.yaml a=b c run_dir={run}-1",
        f'1 train c.yaml a=[d, "e f"] run_dir={run}-2',
    ]


def test_a_bad_node_is_named_and_excluded_when_the_job_starts_again(site: Site) -> None:
    """The check of the nodes says that the first one is bad, until another one is the job's."""
    site.stand_in(
        """case "$*" in
            diagnose*) while [[ $1 != --report ]]; do shift; done
                [[ $SLURMD_NODENAME != n1 ]] || { echo "n1 it has 7 GPUs, not 8" > "$2"; exit 1; } ;;
            *) echo "trains on $SLURMD_NODENAME" ;;
        esac"""
    )
    job = site.slurm.submit(
        str(ROOT / "slurm" / "pretrain_t2i.sh"),
        "--nodes=1",
        "c.yaml",
        cwd=site.folder,
        **site.settings,
        SITE_PREFLIGHT="1",
    )
    assert site.slurm.wait(job) == "COMPLETED", site.log()
    log = site.log()
    assert "error: node n1 it has 7 GPUs, not 8" in log
    assert [line for line in log.splitlines() if line.startswith("trains")] == ["trains on n2"] * 2
    assert site.slurm.describe(job)["ExcNodeList"] == "n1"


def test_a_printed_job_script_can_be_submitted_as_it_is(site: Site) -> None:
    site.stand_in("echo rank $SLURM_PROCID of $SLURM_NTASKS")
    printed = site.slurm.run(
        str(ROOT / "slurm" / "pretrain_t2i.sh"),
        "--dry-run",
        "--nodes=2",
        "c.yaml",
        "a=b c",
        cwd=site.folder,
        **site.settings,
    )
    assert printed.returncode == 0, printed.stderr
    (site.folder / "job.sh").write_text(printed.stdout)
    (site.folder / "logs").mkdir()
    job = site.slurm.submit("sbatch", "job.sh", cwd=site.folder)
    assert site.slurm.wait(job) == "COMPLETED", site.log()
    assert site.calls() == ["0 train c.yaml a=b c"]
    assert site.log().count("of 4") == 4


def test_options_of_one_task_reach_the_command(site: Site) -> None:
    site.stand_in("exit 0")
    job = site.submit("convert_to_hf.sh", "--time=5", "runs/x", "models/x", "--raw")
    assert site.slurm.wait(job) == "COMPLETED", site.log()
    assert site.calls() == [
        "0 convert to-hf --help",  # on the login node: the command exists
        "0 convert to-hf runs/x models/x --raw",
    ]
    assert site.slurm.describe(job)["TimeLimit"] == "00:05:00"


def test_an_evaluation_has_a_task_for_every_gpu(site: Site) -> None:
    site.stand_in("echo rank $SLURM_PROCID of $SLURM_NTASKS")
    job = site.submit("eval_geneval.sh", "--nodes=2", "models/x", "--out", "scores")
    assert site.slurm.wait(job) == "COMPLETED", site.log()
    assert sorted(line for line in site.log().splitlines() if line.startswith("rank")) == [
        f"rank {rank} of 4" for rank in range(4)
    ]
    assert site.calls() == ["0 eval geneval --help", "0 eval geneval models/x --out scores"]


def test_tasks_and_gpus_of_a_node_are_as_many_where_there_are_gpus() -> None:
    """Training and evaluation ask SLURM for the GPUs of whole nodes, and every task sees those of its node."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    slurm = local_slurm.start(folder, nodes=2, cpus=2, gpus=2)
    try:
        site = GpuSite(slurm, folder / "site")
        site.folder.mkdir()
        (site.folder / "c.yaml").write_text("")
        site.stand_in("echo rank $SLURM_PROCID of $SLURM_NTASKS sees $CUDA_VISIBLE_DEVICES")
        for script, arguments in (
            ("pretrain_t2i.sh", ["c.yaml"]), ("eval_geneval.sh", ["models/x", "--out", "scores"]),
        ):  # fmt: skip
            job = site.submit(script, "--nodes=2", *arguments)
            assert slurm.wait(job) == "COMPLETED", site.log()
            assert slurm.describe(job)["TresPerNode"] == "gres:gpu:2"
            log = (site.folder / "logs" / f"{script.removesuffix('.sh')}-{job}.log").read_text()
            assert sorted(line for line in log.splitlines() if line.startswith("rank")) == [
                f"rank {rank} of 4 sees 0,1" for rank in range(4)
            ]
        # One task takes one GPU, not a node's.
        job = site.submit("eval_shapes.sh", "models/x", "--data", "data")
        assert slurm.wait(job) == "COMPLETED", site.log()
        assert slurm.describe(job)["TresPerNode"] == "gres:gpu:1"
        assert "rank 0 of 1 sees 0\n" in (site.folder / "logs" / f"eval_shapes-{job}.log").read_text()
    finally:
        local_slurm.stop(slurm)
        shutil.rmtree(folder)


class GpuSite(Site):
    """The same on nodes with two GPUs each."""

    @property
    def settings(self) -> dict[str, str]:
        settings = super().settings | {"SITE_GPUS_PER_NODE": "2"}
        del settings["SITE_TASKS_PER_NODE"]  # a task for every GPU
        return settings


def test_a_stage_that_fails_cancels_those_after_it(site: Site) -> None:
    site.stand_in("[[ $1 != convert || $* == *--help* ]]")
    done = site.slurm.run(
        str(ROOT / "slurm" / "pipeline.sh"),
        "--nodes=1",
        "--evaluate=shapes --data x",
        "c.yaml",
        cwd=site.folder,
        **site.settings,
    )
    assert done.returncode == 0, done.stderr
    jobs = [line.split()[-1] for line in done.stdout.splitlines()]
    assert [site.slurm.wait(job) for job in jobs] == ["COMPLETED", "FAILED", "CANCELLED"], site.log()
    assert site.calls()[-2:] == [
        "0 train c.yaml",
        f"0 convert to-hf {site.folder}/run {site.folder}/run/model",
    ]
