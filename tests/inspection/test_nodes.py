"""A bad node is named, with what it lacks."""

from pathlib import Path

import pytest

from rmoe_megatron.inspection import nodes
from rmoe_megatron.inspection.nodes import Found, Limits, check_nodes
from tests.support.commands import rmoe

GOOD = Found(node="n1", gpus=8, gpu="H100", driver="580.1", free=500.0, free_temporary=90.0, problem="")


def judge(*found: Found) -> dict[str, list[str]]:
    limits = Limits(gpus=8, bandwidth=0.0, free=50.0, skew=5.0)
    problems: dict[str, list[str]] = {each["node"]: [] for each in found}
    nodes._judge(list(found), limits, problems)
    return {name: each for name, each in problems.items() if each}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"gpus": 7}, "it has 7 GPUs, not 8"),
        ({"driver": "570.9"}, "its driver is 570.9, that of most nodes 580.1"),
        ({"gpu": "A100"}, "its gpu is A100, that of most nodes H100"),
        ({"free": 49.9}, "49.9 GB of disk are free where runs lie, less than 50"),
        ({"free_temporary": 1.0}, "1.0 GB of disk are free for temporary files, less than 50"),
        ({"problem": "its GPU cannot be used (ECC error)"}, "its GPU cannot be used (ECC error)"),
    ],
)
def test_what_a_node_lacks_is_said_of_it_alone(change: dict[str, object], problem: str) -> None:
    bad = Found(**{**GOOD, "node": "n2", **change})  # type: ignore[typeddict-item]
    third = Found(**{**GOOD, "node": "n3"})  # type: ignore[typeddict-item]
    assert judge(GOOD, bad, third) == {"n2": [problem]}


def test_the_slow_node_of_a_ring_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four nodes the third is slow with each of its neighbours; they are not, with their others."""
    measured = iter([10.0, 1.0, 1.5, 10.0])  # of (0, 1), (1, 2), (2, 3), (3, 0)
    monkeypatch.setattr(nodes, "_bandwidth", lambda *arguments: next(measured))
    monkeypatch.setattr(nodes.dist, "new_group", lambda ranks: None)
    monkeypatch.setattr(nodes.dist, "all_reduce", lambda tensor, op: None)

    class Everywhere:  # this rank is in every group
        def __eq__(self, other: object) -> bool:
            return True

    rank: int = Everywhere()  # type: ignore[assignment]
    best = nodes._of_each_node(nodes.torch.device("cpu"), rank, per_node=2, num_nodes=4, whole=1.0)
    assert best == {0: 10.0, 1: 10.0, 2: 1.5, 3: 10.0}


def test_this_host_alone(tmp_path: Path) -> None:
    report = check_nodes(tmp_path, ["here"], Limits(gpus=0, bandwidth=0.0, free=0.0, skew=5.0))
    assert report is not None
    assert report.problems == {}
    assert report.lines[0].startswith("here")
    bad = tmp_path / "bad_nodes"
    code, errors = rmoe(
        "diagnose", "nodes", str(tmp_path), "--names", "here", "--gpus", "3", "--report", str(bad)
    )
    assert code == 1
    assert "error: 1 of the nodes are not as they must be: here it has 0 GPUs, not 3." in errors
    assert bad.read_text() == "here it has 0 GPUs, not 3\n"
