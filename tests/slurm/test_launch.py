"""Ranks and where they meet, from srun's variables alone."""

import sys
from pathlib import Path

import pytest

from rmoe_megatron.distributed.launch import first_host, tasks_per_node
from tests.support.commands import rmoe
from tests.support.local_slurm import ROOT, LocalSlurm
from tests.support.runs import losses, make_run

SAY = (
    "from rmoe_megatron.distributed import launch as l; "
    "print(l.rank(), l.world_size(), l.local_rank(), l.ranks_on_host(), l.is_main_process(), l.rendezvous_url())"
)


def batch(slurm: LocalSlurm, out: Path, command: str, *options: str, **variables: str) -> str:
    """Submit a job of one command and wait for its end; returns its output."""
    job = slurm.submit(
        "sbatch", *options, f"--output={out}", f"--wrap={command}", PYTHONPATH=str(ROOT), **variables
    )
    slurm.wait(job)
    return f"{slurm.describe(job)['JobId']}\n{out.read_text()}"


def test_tasks_know_their_rank_and_the_first_node(slurm: LocalSlurm, tmp_path: Path) -> None:
    command = f"{sys.executable} -c '{SAY}'; srun {sys.executable} -c '{SAY}'; srun -n2 -N2 {sys.executable} -c '{SAY}'"
    output = batch(slurm, tmp_path / "out", command, "--nodes=2", "--ntasks-per-node=2")
    # On a busy machine srun says that it waits for the step before it to be cleared away.
    job, alone, *tasks = [line for line in output.splitlines() if not line.startswith("srun: ")]
    assert alone == "0 1 0 1 True env://"  # a batch script is no rank of anything
    port = 10_000 + int(job) * 101 % 20_000
    assert sorted(tasks[:4]) == [
        f"{rank} 4 {rank % 2} 2 {rank == 0} tcp://n1:{port}?rank={rank}&world_size=4" for rank in range(4)
    ]
    assert sorted(tasks[4:]) == [
        f"{rank} 2 0 1 {rank == 0} tcp://n1:{port + 1}?rank={rank}&world_size=2" for rank in range(2)
    ]


def test_torchrun_and_srun_must_not_disagree(slurm: LocalSlurm, tmp_path: Path) -> None:
    torchrun = f"{sys.executable} -m torch.distributed.run"
    agents = f"srun {torchrun} --standalone --nproc-per-node=2 -m rmoe_megatron train {make_run(tmp_path)}"
    output = batch(slurm, tmp_path / "out", agents, "--nodes=2", "--ntasks-per-node=1")
    assert (
        "error: srun started 2 tasks, each of which started torchrun, but torchrun joined 1 of them" in output
    )
    by_hand = f"srun {sys.executable} -m rmoe_megatron train {tmp_path}/config.yaml"
    output = batch(slurm, tmp_path / "out2", by_hand, "--nodes=2", "--ntasks-per-node=1", WORLD_SIZE="4")
    assert "error: The environment variable WORLD_SIZE is 4, but SLURM says 2" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "engine",
    [
        "engine=megatron",
        pytest.param("engine=deepspeed deepspeed.zero_stage=3", marks=pytest.mark.slurm_full),
    ],
)
def test_two_nodes_train_as_one_process_does(slurm: LocalSlurm, tmp_path: Path, engine: str) -> None:
    config = make_run(tmp_path)
    train = f"srun {sys.executable} -m rmoe_megatron train {config} {engine} training.micro_batch_size=2 training.steps=5 training.sample_prompts=[] run_dir={tmp_path}/four"
    # The node's names are SLURM's alone; on a cluster the network knows them.
    output = batch(
        slurm, tmp_path / "out", train, "--nodes=2", "--ntasks-per-node=2", MASTER_ADDR="127.0.0.1"
    )
    code, errors = rmoe(
        "train", str(config), "training.steps=5", "training.sample_prompts=[]", f"run_dir={tmp_path}/one"
    )
    assert code == 0, errors
    assert losses(tmp_path / "four").keys() == set(range(1, 6)), output
    # Float32, summed in another order; a token near the border of two modules takes the other one in time.
    for key, tolerance in {"loss": 1e-4, "validation_loss": 1e-4, "grad_norm": 1e-2}.items():
        found, expected = losses(tmp_path / "four", key), losses(tmp_path / "one", key)
        assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    "nodes",
    ["n1", "n[1-2]", "gpu[07-09,12],cpu1", "cpu1,gpu[07-09]", "rack[3-4]n[08,10-12]", "a-b.example,c"],
)
def test_first_host_is_scontrols(slurm: LocalSlurm, nodes: str) -> None:
    assert first_host(nodes) == slurm.run("scontrol", "show", "hostnames", nodes).stdout.split()[0]


def test_tasks_per_node() -> None:
    assert tasks_per_node("4(x2),3") == [4, 4, 3]
    assert tasks_per_node("8") == [8]
