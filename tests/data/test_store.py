"""Shards at URLs: the samples are those of the local folder, from an S3 server and from a web server with its troubles."""

import os
import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from rmoe_megatron.data.loader import BatchLayout, batches
from rmoe_megatron.data.order import GlobalOrder
from rmoe_megatron.data.shards import build_index
from rmoe_megatron.data.shards.build_index import INDEX, open_index
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.data.storage import block_cache, remote_store
from rmoe_megatron.data.storage.block_cache import BlockCache
from rmoe_megatron.data.storage.remote_store import ATTEMPTS, RemoteStore, shard_store
from rmoe_megatron.data.storage.store import LocalStore
from rmoe_megatron.data.training_dataset import SampleFormat, TrainingDataset
from rmoe_megatron.errors import UserError
from tests.data.test_index import picture
from tests.support.commands import rmoe
from tests.support.runs import losses, make_run, write_members, write_shard
from tests.support.web_server import WebServer, serving


def write_set(folder: Path, shards: int = 2, samples: int = 8) -> Path:
    for shard in range(shards):
        numbers = range(shard * samples, (shard + 1) * samples)
        write_shard(
            folder / f"{shard}.tar",
            [{"png": picture(20 + number, 20, "png"), "txt": str(number).encode()} for number in numbers],
        )
    return folder


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote_store, "FIRST_PAUSE", 1e-4)
    write_set(tmp_path / "served" / "set")
    with serving(tmp_path / "served") as server:
        yield server


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of an S3 server, which is that of this process's environment."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in names}
    os.environ |= names
    yield names["AWS_ENDPOINT_URL"]
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def upload(folder: Path, bucket: str, prefix: str) -> str:
    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder)}")
    return f"s3://{bucket}/{prefix}"


def assert_same_samples(remote: ShardDataset, local: ShardDataset) -> None:
    assert len(remote) == len(local)
    for index in range(len(local)):
        ours, theirs = remote[index], local[index]
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
        assert remote.size(index) == local.size(index)


def test_samples_of_an_object_store_are_those_of_the_folder(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    folder = write_set(tmp_path / "set")
    url = upload(folder, "samples", "deep/set")
    remote = ShardDataset(shard_store(f"{url}/"))
    assert isinstance(remote.store, RemoteStore)
    assert_same_samples(remote, ShardDataset(folder))
    assert remote.shard(9) == f"{url}/1.tar"
    # Another machine takes the index that the first has put beside the shards.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(build_index, "scan_shard", lambda *_: pytest.fail("the shards are scanned again"))
    assert_same_samples(ShardDataset(shard_store(url)), ShardDataset(folder))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    # A shard that has changed is seen.
    write_shard(folder / "1.tar", [{"png": picture(3, 3, "png"), "txt": b"new"}])
    upload(folder, "samples", "deep/set")
    assert len(open_index(shard_store(url))) == 9


def test_a_run_reads_an_object_store(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    config = make_run(tmp_path)
    url = upload(tmp_path / "data", "runs", "data")
    settings = ["training.steps=6", "training.sample_prompts=[]", "training.validate_every=6"]
    remote = [f"data.train={url}/train", f"data.validation={url}/val", "data.num_workers=1"]
    remote += [f"data.cache={tmp_path}/cache", "data.cache_gigabytes=0.1"]
    for name, more in (("local", []), ("remote", remote)):
        code, errors = rmoe("train", str(config), f"run_dir={tmp_path}/{name}", *settings, *more)
        assert code == 0, errors
    for key in ("loss", "validation_loss"):
        assert losses(tmp_path / "local", key) == losses(tmp_path / "remote", key)
    assert list((tmp_path / "cache").glob("??/*"))


def test_samples_of_a_web_server_are_those_of_the_folder(web: WebServer) -> None:
    remote = ShardDataset(shard_store(f"{web.url}/set"))
    assert_same_samples(remote, ShardDataset(web.folder / "set"))
    assert not (web.folder / "set" / f"{INDEX}.partial").exists()
    web.asked.clear()
    remote[3]
    ((path, asked),) = web.asked
    assert path == "/set/0.tar"
    assert asked is not None
    first, last = map(int, asked.removeprefix("bytes=").split("-"))
    assert last - first + 1 == int(remote._record(3)["size"])  # the sample's own bytes and no more


def test_members_of_a_web_server_need_not_lie_side_by_side(web: WebServer, tmp_path: Path) -> None:
    pictures = [(f"{number}.png", picture(20 + number, 20, "png")) for number in range(4)]
    captions = [(f"{number}.txt", str(number).encode()) for number in range(4)]
    write_members(tmp_path / "served" / "apart" / "0.tar", pictures + captions)
    samples = ShardDataset(shard_store(f"{web.url}/apart"), ["png", "txt"])
    samples.expect([2, 3])
    found = [(samples[place]["txt"], samples[place]["png"].shape) for place in (2, 0, 3, 1)]
    assert found == [(str(number), (3, 20, 20 + number)) for number in (2, 0, 3, 1)]


@pytest.mark.parametrize("trouble", ["failures", "cut_off"])
def test_what_goes_wrong_now_and_then_is_tried_again(
    web: WebServer, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    setattr(web, trouble, 2)  # while the shards are scanned
    remote = ShardDataset(shard_store(f"{web.url}/set"))
    setattr(web, trouble, ATTEMPTS - 1)
    assert_same_samples(remote, ShardDataset(web.folder / "set"))
    assert caplog.text.count("attempt 2 of 6 follows") == 2
    assert caplog.text.count("attempt 6 of 6 follows") == 1
    assert remote.skipped == 0


def test_after_the_last_attempt_the_run_ends_and_no_sample_is_left_out(web: WebServer) -> None:
    dataset = TrainingDataset(shard_store(f"{web.url}/set"), SampleFormat())
    web.failures = 1000
    bad: list[Any] = []
    with pytest.raises(
        UserError, match=r"shard http://.*/set/0.tar cannot be read: 6 attempts failed, the last with .*503"
    ):
        dataset.draw(0, 0, bad)
    assert not bad
    web.failures, web.has_ranges = 0, False
    with pytest.raises(UserError, match="does the server answer range requests"):
        dataset.draw(0, 0, bad)


def test_what_is_not_there_is_not_tried_again(web: WebServer, caplog: pytest.LogCaptureFixture) -> None:
    (web.folder / "empty").mkdir()
    for name, complaint in (("nothing", "cannot be read"), ("empty", "has no .tar shards")):
        with pytest.raises(UserError, match=complaint):
            shard_store(f"{web.url}/{name}").shards()
    with pytest.raises(UserError, match="extras s3, gs and http"):
        shard_store("unheard-of://bucket/set").shards()
    assert "attempt" not in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_the_samples_of_a_micro_batch_are_read_at_the_same_time(web: WebServer, workers: int) -> None:
    remote = TrainingDataset(shard_store(f"{web.url}/set"), SampleFormat(num_classes=0))
    local = TrainingDataset(web.folder / "set", SampleFormat())
    remote.samples.shapes = local.samples.shapes = {}  # of all sizes here
    web.seconds, web.most_at_once = 0.05, 0
    order, layout = GlobalOrder(16, shuffle=True, seed=0), BatchLayout(1, 1, 0, 1)
    loaded = [
        [batch["caption"] for batch in islice(batches(each, order, layout, num_workers=workers), 8)]
        for each in (remote, local)
    ]
    assert loaded[0] == loaded[1]
    remote.expect(list(range(8)))
    assert [remote.draw(index, 0)["caption"] for index in range(8)] == list("01234567")
    assert web.most_at_once >= 4


def test_a_store_goes_into_other_processes(web: WebServer) -> None:
    remote = shard_store(f"{web.url}/set", BlockCache(web.folder / "cache", 1 << 30))
    remote.shards()
    copied = pickle.loads(pickle.dumps(remote))
    assert copied.read("0.tar", 0, 100) == remote.read("0.tar", 0, 100)
    local = pickle.loads(pickle.dumps(LocalStore(web.folder / "set")))
    assert local.read("0.tar", 0, 100) == remote.read("0.tar", 0, 100)


def test_what_was_read_is_kept_within_bounds(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_cache, "BLOCK", 1 << 10)
    content = (web.folder / "set" / "0.tar").read_bytes()
    total, blocks = len(content), -(-len(content) // 1024)
    cache = BlockCache(web.folder / "cache", 1 << 30)
    remote = shard_store(f"{web.url}/set", cache)
    remote.shards()
    web.asked.clear()
    for _ in range(2):
        for offset in range(0, total, 700):
            assert remote.read("0.tar", offset, 700) == content[offset : offset + 700]
        assert len(web.asked) == blocks  # each once, also for the second time
    others = shard_store(f"{web.url}/set", BlockCache(web.folder / "cache", 1 << 30))
    others.shards()
    assert others.read("0.tar", 0, total) == content
    assert len(web.asked) == blocks
    # A block that is not whole is read again.
    first = next((web.folder / "cache").glob("??/*-0"))
    first.write_bytes(b"")
    assert remote.read("0.tar", 0, 10) == content[:10]
    assert len(web.asked) == blocks + 1
    # A small cache has what was used last.
    small = shard_store(f"{web.url}/set", BlockCache(web.folder / "small", 4 << 10))
    small.shards()
    for offset in range(0, 1024 * (total // 1024), 1024):
        small.read("0.tar", offset, 1024)
        left = sum(path.stat().st_size for path in (web.folder / "small").glob("??/*"))
        assert left <= (4 << 10) + 1024
    web.asked.clear()
    small.read("0.tar", offset, 1024)
    assert not web.asked


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    web: WebServer, caplog: pytest.LogCaptureFixture
) -> None:
    (web.folder / "file").write_text("in the way")
    remote = shard_store(f"{web.url}/set", BlockCache(web.folder / "file" / "cache", 1 << 30))
    remote.shards()
    assert remote.read("0.tar", 5, 50) == (web.folder / "set" / "0.tar").read_bytes()[5:55]
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize(
    "url", ["https://user:secret@host/set", "https://host/set?signature=secret", "s3://secret@bucket/set"]
)
def test_credentials_are_refused_and_in_no_message(url: str) -> None:
    with pytest.raises(UserError, match="credentials come from the environment") as raised:
        shard_store(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("0.tar.gz", "0.tar.gz is compressed, and shards are read at any place: unpack it"), ("0.tgz", "0.tgz is compressed"),
        ("0.TAR", "0.TAR is not called .tar: rename it"), ("train-00000-of-00001.parquet", "make shards of it with `rmoe data pack`"),
        ("train/0.tar", "there are some in .*train: name that folder"), ("README.md", "build or download the data first"),
    ],
)  # fmt: skip
def test_a_folder_without_shards_says_what_it_holds(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"has no .tar shards; .*{words}"):
        LocalStore(tmp_path).shards()
