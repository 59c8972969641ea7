"""Ranks from the variables of torchrun and srun, and what is refused of them."""

import os
from pathlib import Path

import pytest

from rmoe_megatron.cli import main
from rmoe_megatron.distributed import launch
from rmoe_megatron.errors import UserError

TASK = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_STEP_NODELIST": "gpu[08-10]",
}  # fmt: skip
AGENT = {
    "GROUP_WORLD_SIZE": "6", "RANK": "9", "WORLD_SIZE": "48", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "gpu08", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("SLURM_") or name in AGENT:
            monkeypatch.delenv(name)


def test_a_process_alone_is_a_job_of_one_rank() -> None:
    found = (
        launch.rank(),
        launch.world_size(),
        launch.local_rank(),
        launch.ranks_on_host(),
        launch.is_main_process(),
    )
    assert found == (0, 1, 0, 1, True)


def test_a_task_of_srun_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    found = (
        launch.rank(),
        launch.world_size(),
        launch.local_rank(),
        launch.ranks_on_host(),
        launch.is_main_process(),
    )
    assert found == (5, 6, 1, 2, False)
    assert launch.rendezvous_url() == "tcp://gpu08:17777?rank=5&world_size=6"
    monkeypatch.setenv("MASTER_ADDR", "fe80::1")
    monkeypatch.setenv("MASTER_PORT", "4711")
    assert launch.rendezvous_url() == "tcp://[fe80::1]:4711?rank=5&world_size=6"
    for name, value in {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)  # by hand, and the same
    assert (launch.rank(), launch.world_size(), launch.local_rank(), launch.ranks_on_host()) == (5, 6, 1, 2)


def test_torchrun_in_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TASK | AGENT).items():
        monkeypatch.setenv(name, value)
    found = launch.rank(), launch.world_size(), launch.local_rank(), launch.ranks_on_host()
    assert (found, launch.rendezvous_url()) == ((9, 48, 1, 8), "env://")


def test_torchrun_in_a_step_of_one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "GROUP_WORLD_SIZE": "1"}
    for name, value in (TASK | AGENT | alone).items():
        monkeypatch.setenv(name, value)
    assert (launch.rank(), launch.world_size(), launch.rendezvous_url()) == (9, 48, "env://")


@pytest.mark.parametrize("step", ["4294967290", "4294967291", "4294967292"])
def test_torchrun_in_a_shell_that_is_no_task(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the shell of an salloc and in a batch script SLURM gives the step a number above all those of srun."""
    shell = {
        "SLURM_STEP_ID": step,
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "0",
        "SLURM_JOB_ID": "4227858433",
    }
    for name, value in (TASK | shell).items():
        monkeypatch.setenv(name, value)
    assert (launch.rank(), launch.world_size(), launch.rendezvous_url()) == (0, 1, "env://")
    for name, value in (AGENT | {"GROUP_WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    assert (launch.rank(), launch.world_size(), launch.rendezvous_url()) == (9, 48, "env://")


def test_jobs_of_federated_clusters_have_large_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TASK | {"SLURM_JOB_ID": "4227858433"}).items():
        monkeypatch.setenv(name, value)
    port = 10_000 + 4227858433 * 101 % 20_000
    assert launch.rendezvous_url() == f"tcp://gpu08:{port}?rank=5&world_size=6"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "abc"}, ["WORLD_SIZE", "'abc'"]),
        ({"WORLD_SIZE": "2"}, ["RANK is not set"]),
        ({"WORLD_SIZE": "-1"}, ["WORLD_SIZE"]),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ["RANK", "from 0 to 1"]),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, ["MASTER_PORT", "65535"]),
        (TASK | {"RANK": "0"}, ["RANK is 0, but SLURM says 5"]),
        (TASK | {"WORLD_SIZE": "1"}, ["WORLD_SIZE is 1, but SLURM says 6"]),
        (TASK | {"SLURM_PROCID": "6"}, ["SLURM_PROCID", "from 0 to 5"]),
        (TASK | AGENT | {"GROUP_WORLD_SIZE": "1"}, ["6 tasks", "torchrun joined 1 of them"]),
    ],
)
def test_wrong_variables(
    variables: dict[str, str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        launch.rank()
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("nodes", ["", "[", "n[", "n[a-b]"])
def test_a_node_list_without_a_host(nodes: str) -> None:
    with pytest.raises(UserError, match="MASTER_ADDR"):
        launch.first_host(nodes)


@pytest.mark.parametrize(
    "command",
    [
        "convert to-hf R M", "data build-shapes O", "data pack D O",
        "data check D O", "data index D", "data show R --draw 0", "inspect R", "eval compare S --out O",
    ],
)  # fmt: skip
def test_what_one_process_does_is_not_done_by_every_rank(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["rmoe", *command.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "does its work in one process, but this job has 2 ranks" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
