"""An export goes to the hub when that is asked for, private unless asked otherwise: against a stand-in of the hub's interface."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rmoe_megatron.conversion.push import files_to_push, push
from rmoe_megatron.errors import UserError
from tests.support.commands import rmoe


class Hub:
    """What a stand-in of the hub knows: its repositories, with their files, and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.endpoint = ""
        self.refuses = False

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        self.asked.append(f"{method} {path}")
        if self.refuses:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = (
                f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            )
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{name}"}
            private = wanted.get("private", wanted.get("visibility") == "private")
            self.repositories[name] = {"private": private, "files": {}}
            return 200, {"url": f"{self.endpoint}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name = "/".join(path.split("/")[3:5])
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {
                "files": [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in files
                ]
            }
        if "/commit/" in path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.repositories[name]["files"][entry["value"]["path"]] = content
            oid = "0" * 40
            return 200, {
                "commitUrl": f"{self.endpoint}/{name}/commit/{oid}",
                "commitOid": oid,
                "success": True,
            }
        return 200, {
            "id": name,
            "private": self.repositories[name]["private"],
            "sha": "0" * 40,
            "siblings": [],
        }


@contextmanager
def serving(hub: Hub) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, found = hub.answer(self.command, self.path.partition("?")[0], body)
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_HEAD = do  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    found = Hub()
    with serving(found):
        yield found


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "README.md").write_text("---\nlibrary_name: diffusers\n---\n# A model\n")
    (folder / "transformer" / "weights.safetensors").write_bytes(b"12345678")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "token").write_text("stays here")
    return folder


NAMES = ["README.md", "model_index.json", "transformer/weights.safetensors"]


def test_an_export_is_sent_whole_to_a_private_repository(hub: Hub, export: Path) -> None:
    assert push(export, "owner/model", endpoint=hub.endpoint) == f"{hub.endpoint}/owner/model"
    repository = hub.repositories["owner/model"]
    assert repository["private"] is True
    assert sorted(repository["files"]) == NAMES
    assert repository["files"]["transformer/weights.safetensors"] == b"12345678"
    (export / "model_index.json").write_text('{"a": 1}')
    push(export, "owner/model", endpoint=hub.endpoint)  # again, into the same one
    assert repository["files"]["model_index.json"] == b'{"a": 1}'


def test_public_is_asked_for(hub: Hub, export: Path) -> None:
    push(export, "owner/model", public=True, endpoint=hub.endpoint)
    assert hub.repositories["owner/model"]["private"] is False
    hub.repositories["owner/model"]["files"].clear()
    with pytest.raises(UserError, match="owner/model is there and public; nothing was sent"):
        push(export, "owner/model", endpoint=hub.endpoint)
    assert hub.repositories["owner/model"]["files"] == {}


def test_what_the_hub_refuses_is_one_sentence(hub: Hub, export: Path) -> None:
    hub.refuses = True
    with pytest.raises(
        UserError, match=r"cannot be sent to owner/model .*; log in with `hf auth login`"
    ) as error:
        push(export, "owner/model", endpoint=hub.endpoint)
    assert "\n" not in str(error.value)
    assert "hf_of_the_test" not in str(error.value)


def test_a_dry_run_lists_the_files_and_sends_nothing(
    export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rmoe_megatron.cli.app import app
    from rmoe_megatron.conversion import push as pushing

    monkeypatch.setattr(pushing, "push", lambda *arguments: pytest.fail("it was sent"))
    app(["convert", "push", str(export), "owner/model", "--dry-run"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:-1]] == NAMES
    assert (
        lines[-1] == "3 files, 52 bytes would be sent to the private repository owner/model; nothing was sent"
    )
    assert files_to_push(export, "owner/model")[-1] == (NAMES[-1], 8)


@pytest.mark.parametrize(
    ("repository", "change", "words"),
    [
        ("model", None, "'model' is no repository of the hub"),
        ("owner/../x", None, "is no repository of the hub"),
        ("owner/model", "empty", "holds no export"),
        ("owner/model", "link", "secret"),
    ],
)
def test_what_is_no_export_is_not_sent(export: Path, repository: str, change: str | None, words: str) -> None:
    if change == "empty":
        (export / "model_index.json").unlink()
    elif change == "link":
        (export.parent / "secret").write_text("of somebody else")
        (export / "secret.json").symlink_to(export.parent / "secret")
    with pytest.raises(UserError, match=words):
        files_to_push(export, repository)


def test_the_command_ends_with_one_sentence(tmp_path: Path) -> None:
    code, errors = rmoe("convert", "push", str(tmp_path), "owner/model")
    assert code == 2
    assert errors.startswith(f"error: {tmp_path} holds no export")
