"""The scripts of slurm/ with the real commands: interrupted, orphaned, in parts, one after the other, refused."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rmoe_megatron.checkpoint.folders import list_checkpoints, verify
from rmoe_megatron.encoders.fingerprint import DATASET
from rmoe_megatron.training.history import read_history
from tests.support.commands import rmoe
from tests.support.local_slurm import ROOT, LocalSlurm
from tests.support.runs import losses, make_run

STEPS = 24


class Site:
    """A cluster whose nodes have this Python environment and no GPU."""

    def __init__(self, slurm: LocalSlurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.settings = {
            "SITE_GPUS_PER_NODE": "0", "SITE_TASKS_PER_NODE": "2", "SITE_VENV": sys.prefix, "SITE_LOGS": f"{folder}/logs",
            # The nodes' names are SLURM's alone; on a cluster the network knows them.
            "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip

    def submit(self, script: str, *arguments: str) -> str:
        return self.slurm.submit(str(ROOT / "slurm" / script), *arguments, cwd=self.folder, **self.settings)

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.folder / "logs").glob("*.log")))


@pytest.fixture
def site(slurm: LocalSlurm, tmp_path: Path) -> Site:
    return Site(slurm, tmp_path)


def until(condition: Callable[[], bool], site: Site) -> None:
    deadline = time.monotonic() + 480
    while not condition():
        assert time.monotonic() < deadline, site.log()
        time.sleep(0.05)


def wait_for_step(run_dir: Path, step: int, site: Site) -> None:
    metrics = run_dir / "metrics.jsonl"
    until(lambda: metrics.is_file() and max(losses(run_dir), default=0) >= step, site)


def test_a_wrong_configuration_is_not_submitted(site: Site) -> None:
    config = make_run(site.folder)
    before = site.slurm.run("squeue", "--noheader", "--states=all").stdout.splitlines()
    for script, arguments, words in (
        ("pretrain_t2i.sh", [str(config), "model.hiden_size=3"], "did you mean model.hidden_size?"),
        (
            "finetune_sd3.sh",
            ["--nodes=3", str(config)],
            "is not divisible by micro_batch_size x data-parallel ranks",
        ),
        ("pretrain_t2i.sh", ["-N", "2", str(config)], "give options of sbatch as --option=value"),
        ("precompute_latents.sh", [str(config), f"{site.folder}/data", f"{site.folder}/data/x"], "overlap"),
        ("pipeline.sh", ["--evaluate=poetry", str(config)], "there is no benchmark poetry"),
    ):
        done = site.slurm.run(str(ROOT / "slurm" / script), *arguments, cwd=site.folder, **site.settings)
        assert done.returncode == 2, done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert words in errors[0]
    assert site.slurm.run("squeue", "--noheader", "--states=all").stdout.splitlines() == before
    assert not (site.folder / "logs").exists()


@pytest.mark.slurm_full
@pytest.mark.parametrize("engine", [[], ["engine=deepspeed", "deepspeed.zero_stage=2"]])
def test_an_interrupted_job_starts_anew_and_ends_as_if_it_had_not_been(site: Site, engine: list[str]) -> None:
    config = make_run(site.folder)
    settings = [
        f"training.steps={STEPS}",
        "checkpoint.every=100",
        "training.sample_prompts=[]",
        "data.num_workers=1",
        *engine,
    ]
    job = site.submit("pretrain_t2i.sh", "--nodes=1", str(config), *settings)
    run_dir = site.folder / "run"
    wait_for_step(run_dir, 4, site)
    site.slurm.signal(job, "--batch", "--signal=USR1")  # as --signal=B:USR1@N does, to the batch script alone
    assert site.slurm.wait(job) == "COMPLETED", site.log()
    history = read_history(run_dir)
    assert [event["event"] for event in history] == ["started", "interrupted", "resumed", "finished"], (
        site.log()
    )
    assert (history[1]["why"], history[2]["job"], history[2]["restart"]) == ("SIGUSR1", job, 1)
    assert 4 <= history[1]["step"] < STEPS
    code, errors = rmoe("train", str(config), *settings, f"run_dir={site.folder}/whole", ranks=2)
    assert code == 0, errors
    for key in ("loss", "grad_norm", "validation_loss"):
        assert losses(run_dir, key) == losses(site.folder / "whole", key)
    restarts = losses(run_dir, "restarts")
    assert set(restarts.values()) == {0, 1}
    assert list(restarts.values()) == sorted(restarts.values())


@pytest.mark.slurm_full
def test_a_lost_node_is_replaced_and_its_orphans_write_nothing(site: Site) -> None:
    config, run_dir = make_run(site.folder), site.folder / "run"
    settings = [
        "training.micro_batch_size=2",
        "training.steps=60",
        "training.sample_prompts=[]",
        "checkpoint.every=4",
    ]
    job = site.submit("pretrain_t2i.sh", "--nodes=1-2", str(config), *settings)
    wait_for_step(run_dir, 5, site)
    assert site.slurm.describe(job)["NumNodes"] == "2"
    site.slurm.kill_daemon("n1")  # where the batch script and rank 0 are
    site.slurm.wait(job, "PENDING", timeout=120)
    assert site.slurm.wait(job) == "COMPLETED", site.log()
    history = read_history(run_dir)
    assert (history[0]["ranks"], history[-1]["ranks"]) == (4, 2)
    assert history[-1]["event"] == "finished"
    resumed = next(event for event in history if event["event"] == "resumed")
    assert resumed["step"] >= 4
    # Every step once, in order: nothing was written by two.
    steps = [int(step) for step in losses(run_dir)]
    assert steps == list(range(1, 61))
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if '"loss"' in line]) == 60
    assert list_checkpoints(run_dir)[0].step == 60
    site.slurm.start_daemon("n1")


def ranks_of(job: str, restart: int) -> list[int]:
    """The processes of a start of a job that train."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            variables = process.environ()
            mine = variables.get("SLURM_JOB_ID") == job and variables.get("SLURM_RESTART_COUNT", "0") == str(
                restart
            )
            if (
                mine
                and "SLURM_PROCID" in variables
                and "train" in process.cmdline()
                and process.name() not in ("srun", "sh")  # which start them
            ):
                found.append(process.pid)
    return found


@pytest.mark.slurm_full
def test_ranks_left_on_a_lost_node_end_when_the_job_starts_again(site: Site) -> None:
    run_dir = site.folder / "run"
    # Nothing is logged: what is left of a step would end at the first line that nobody reads.
    settings = [
        "training.steps=1000000",
        "training.log_every=1000000",
        "training.sample_prompts=[]",
        "checkpoint.every=5",
    ]
    settings += ["data.validation=null"]
    job = site.submit("pretrain_t2i.sh", "--nodes=1", str(make_run(site.folder)), *settings)
    until(lambda: bool(list_checkpoints(run_dir)), site)
    node = site.slurm.describe(job)["BatchHost"]
    site.slurm.kill_daemon(node)
    orphans = ranks_of(job, restart=0)
    rank_0 = json.loads((run_dir / "run.lock").read_text())["pid"]
    assert len(orphans) == 2
    assert rank_0 in orphans
    site.slurm.wait(job, "PENDING", timeout=120)
    assert set(ranks_of(job, restart=0)) >= set(orphans)  # they go on, and save
    until(lambda: read_history(run_dir)[-1]["event"] == "resumed", site)
    assert rank_0 not in ranks_of(job, restart=0)  # the folder was free only then
    until(lambda: not ranks_of(job, restart=0), site)
    step = read_history(run_dir)[-1]["step"]
    until(lambda: list_checkpoints(run_dir)[0].step > step, site)
    assert [event["event"] for event in read_history(run_dir)] == ["started", "resumed"]
    site.slurm.signal(job)
    assert site.slurm.wait(job) == "CANCELLED"
    site.slurm.start_daemon(node)


def stop_in_a_save(run_dir: Path, site: Site) -> int:
    """Stop rank 0 (SIGSTOP) while it writes a checkpoint that is not the first; returns its process number."""
    partials = run_dir / "checkpoints"
    until(lambda: bool(list_checkpoints(run_dir)), site)
    process = int(json.loads((run_dir / "run.lock").read_text())["pid"])
    deadline = time.monotonic() + 240
    while True:
        assert time.monotonic() < deadline, site.log()
        if list(partials.glob("*.partial")):
            os.kill(process, signal.SIGSTOP)
            if list(partials.glob("*.partial")):
                return process
            os.kill(process, signal.SIGCONT)
        time.sleep(0.001)


SAVING = [
    f"training.steps={STEPS}", "checkpoint.every=3", "training.sample_prompts=[]", "data.num_workers=1", "data.validation=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the same run without any fault."""
    folder = tmp_path_factory.mktemp("whole")
    code, errors = rmoe("train", str(make_run(folder)), *SAVING, ranks=2)
    assert code == 0, errors
    return losses(folder / "run")


def check_ended_as_if_nothing_had_been(run_dir: Path, whole: dict[int, float], site: Site) -> None:
    assert losses(run_dir) == whole, site.log()
    assert list(losses(run_dir)) == list(range(1, STEPS + 1))
    assert read_history(run_dir)[-1]["event"] == "finished"
    checkpoints = list_checkpoints(run_dir)
    assert checkpoints[0].step == STEPS
    assert {verify(each.path) for each in checkpoints} == {None}
    assert sorted(each.name for each in (run_dir / "checkpoints").iterdir()) == sorted(
        each.path.name for each in checkpoints
    )


@pytest.mark.slurm_full
@pytest.mark.parametrize("told", ["by a signal", "by its end", "by scancel", "by its limit"])
def test_time_is_up_in_the_middle_of_a_save(site: Site, whole: dict[int, float], told: str) -> None:
    """A job is told to save, or killed, while it saves; what is there is whole, and it goes on."""
    run_dir = site.folder / "run"
    options = ["--nodes=1"]
    if told == "by its limit":  # its signal may come a minute early
        options += ["--time=00:02:00", "--signal=B:USR1@1"]
    job = site.submit("pretrain_t2i.sh", *options, str(make_run(site.folder)), *SAVING)
    process = stop_in_a_save(run_dir, site)
    if told == "by a signal":
        site.slurm.signal(job, "--batch", "--signal=USR1")
        time.sleep(1)  # until it has come to the ranks
        os.kill(process, signal.SIGCONT)
    elif told == "by its end":
        site.slurm.signal(f"{job}.0", "--signal=KILL")  # what SLURM does in the end, here to the ranks alone
    else:
        if told == "by scancel":
            site.slurm.signal(job)
        assert site.slurm.wait(job) == ("CANCELLED" if told == "by scancel" else "TIMEOUT")
        until(
            lambda: not ranks_of(job, restart=0), site
        )  # SLURM kills them a little later, and the other node is free
        assert {verify(each.path) for each in list_checkpoints(run_dir)} == {None}
        job = site.submit("pretrain_t2i.sh", "--nodes=1", "--resume", str(run_dir))
    assert site.slurm.wait(job) == "COMPLETED", site.log()
    check_ended_as_if_nothing_had_been(run_dir, whole, site)
    history = read_history(run_dir)
    events = [event["event"] for event in history]
    if told == "by a signal":
        assert events == ["started", "interrupted", "resumed", "finished"]
        assert history[1]["why"] == "SIGUSR1"
    elif (
        told == "by its limit"
    ):  # a slow machine may be told by the signal before its first save, and start anew
        assert (events[0], *events[-2:]) == ("started", "resumed", "finished")
    else:
        assert events == ["started", "resumed", "finished"]


@pytest.mark.slurm_full
@pytest.mark.parametrize("program", ["srun", "slurmstepd"])
def test_what_runs_the_ranks_is_killed(site: Site, whole: dict[int, float], program: str) -> None:
    run_dir = site.folder / "run"
    job = site.submit("pretrain_t2i.sh", "--nodes=1", str(make_run(site.folder)), *SAVING)
    wait_for_step(run_dir, 4, site)
    for process in processes_of_step(job, program):
        os.kill(process, signal.SIGKILL)
    assert site.slurm.wait(job) == "COMPLETED", site.log()
    if program == "srun":
        assert int(site.slurm.describe(job)["Restarts"]) >= 1, site.log()
    else:  # the ranks need none, but srun waits for it
        assert [event["event"] for event in read_history(run_dir)] == ["started", "finished"]
        assert f"srun did not notice that the ranks of job {job} have ended" in site.log()
    check_ended_as_if_nothing_had_been(run_dir, whole, site)
    until(lambda: not ranks_of(job, restart=0), site)


def processes_of_step(job: str, program: str) -> list[int]:
    """The processes that run the ranks of a job: its srun, or the daemons of that step."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if program == "srun":
                is_it = process.name() == "srun" and process.environ().get("SLURM_JOB_ID") == job
            else:
                is_it = bool(command) and command[0] == f"slurmstepd: [{job}.0]"
            if is_it:
                found.append(process.pid)
    assert found, f"there is no {program} of job {job}"
    return found


@pytest.mark.slurm_full
def test_precomputation_in_an_array(site: Site) -> None:
    shapes, config = site.folder / "shapes", ROOT / "configs" / "shapes_dit.yaml"
    assert rmoe("data", "build-shapes", str(shapes), "--train", "40", "--val", "10")[0] == 0
    out = site.folder / "encoded"
    job = site.submit("precompute_latents.sh", "--array=0-1", str(config), str(shapes), str(out))
    for number in (0, 1):
        assert site.slurm.wait(f"{job}_{number}") == "COMPLETED", site.log()
    assert rmoe("data", "precompute", str(config), str(shapes), str(site.folder / "alone"))[0] == 0
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert DATASET in names
    for name in names:
        assert (out / name).read_bytes() == (site.folder / "alone" / name).read_bytes()
    assert names == {
        str(path.relative_to(site.folder / "alone"))
        for path in (site.folder / "alone").rglob("*")
        if path.is_file()
    }


@pytest.mark.slurm_full
def test_train_convert_evaluate(site: Site) -> None:
    shapes, config = site.folder / "shapes", str(ROOT / "configs" / "shapes_tiny.yaml")
    assert rmoe("data", "build-shapes", str(shapes), "--train", "40", "--val", "10")[0] == 0
    small = [
        f"data.train={shapes}/train", "data.validation=null", "training.steps=4", "optimizer.warmup_steps=2",
        "training.sample_prompts=[]", "training.global_batch_size=4", "training.micro_batch_size=2", "model.num_layers=3",
    ]  # fmt: skip
    evaluate = f"--evaluate=shapes --data {shapes} --limit 2 --images-per-prompt 1 --steps 2"
    chain = ["--nodes=1", evaluate, config, *small]
    jobs = submit_chain(site, *chain, f"run_dir={site.folder}/good")
    assert [site.slurm.wait(job) for job in jobs] == ["COMPLETED"] * 3, site.log()
    assert (site.folder / "good" / "scores" / "shapes" / "results.json").is_file()


def submit_chain(site: Site, *arguments: str) -> list[str]:
    """Submit a pipeline; returns its jobs."""
    script = str(ROOT / "slurm" / "pipeline.sh")
    done = site.slurm.run(script, *arguments, cwd=site.folder, **site.settings)
    assert done.returncode == 0, done.stderr
    return [line.split()[-1] for line in done.stdout.splitlines()]
