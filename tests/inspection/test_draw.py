"""What a run saw in a draw: found by an order that is computed here once more, and shown."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rmoe_megatron import cli
from rmoe_megatron.data.order import GlobalOrder
from rmoe_megatron.errors import UserError
from rmoe_megatron.inspection.draw import show_draw
from tests.support.runs import array, make_run, write_shard

ORDER = GlobalOrder(16, shuffle=True, seed=5)


def make_folder(tmp_path: Path, precomputed: bool) -> Path:
    """A run's folder over two shards of eight samples; sample n has the grey value n."""
    make_run(tmp_path)
    for shard in range(2):
        samples = []
        for number in range(8 * shard, 8 * shard + 8):
            picture = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(picture, format="png")
            latents = ((np.full((3, 8, 8), number) / 127.5 - 1) + 0.55) * 2.5  # of the pixel codec
            text = {
                "text_hidden_states.npy": array(np.zeros((6, 384))),
                "text_pooled.npy": array(np.zeros(384)),
            }
            image = {"latents.npy": array(latents), **text} if precomputed else {"png": picture.getvalue()}
            samples.append({**image, "txt": f"number {number}".encode(), "cls": b"3"})
        write_shard(tmp_path / "shown" / f"shard-{shard:06d}.tar", samples)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    settings = (tmp_path / "config.yaml").read_text().replace("/data/train", "/shown")
    (run_dir / "config.yaml").write_text(settings + "seed: 5\n")
    return run_dir


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("draw", [0, 11, 16 + 4])
def test_the_sample_of_a_draw(tmp_path: Path, precomputed: bool, draw: int) -> None:
    run_dir = make_folder(tmp_path, precomputed)
    number = ORDER[draw]
    found = show_draw(run_dir, draw, [])
    assert Path(found.shard).name == f"shard-{number // 8:06d}.tar"
    assert (found.key, found.caption, found.class_label) == (f"{number % 8:06d}", f"number {number}", 3)
    assert found.is_finite
    assert found.picture == run_dir / "draws" / f"draw-{draw:08d}.png"
    picture = np.asarray(Image.open(found.picture).convert("RGB")).astype(int)
    assert picture.shape == (8, 8, 3)
    assert np.abs(picture - number).max() <= (1 if precomputed else 0)  # latents are float16


def test_the_command_prints_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, out = make_folder(tmp_path, precomputed=False), tmp_path / "x.png"
    monkeypatch.setattr(sys, "argv", ["rmoe", "data", "show", str(run_dir), "--draw", "3", "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code in (0, None)
    number = ORDER[3]
    printed = capsys.readouterr().out
    assert f"key      {number % 8:06d}\ncaption  number {number}\nclass    3\npicture  {out}\n" in printed


def test_what_cannot_be_shown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run at"):
        show_draw(tmp_path, 0, [])
    run_dir = make_folder(tmp_path, precomputed=False)
    with pytest.raises(UserError, match="no shard folder"):
        show_draw(run_dir, 0, [f"data.train={tmp_path}/gone"])
    shard = tmp_path / "shown" / "shard-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"\x89PNG", b"\x00PNG"))
    numbers = [ORDER[draw] for draw in range(16)]
    draw = next(place for place, number in enumerate(numbers) if number // 8 == 1)
    with pytest.raises(UserError, match="the next readable one"):
        show_draw(run_dir, draw, [])
    with pytest.raises(UserError, match="seed must be"):
        show_draw(run_dir, 0, ["seed=-1"])


def test_megatron_core_is_not_needed() -> None:
    code = "import sys, rmoe_megatron.inspection.draw; assert not [m for m in sys.modules if m.startswith('megatron')]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
