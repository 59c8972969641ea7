"""What becomes of every kind of picture that a set from the web holds."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.data.decoding import decode_image


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green grows downwards."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def test_a_picture_of_the_right_size_is_left_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(pixels), "png")
    assert np.array_equal(decode_image(content, Bucket(16, 16)).transpose(1, 2, 0), pixels)
    assert np.array_equal(decode_image(content).transpose(1, 2, 0), pixels)


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp", "avif"])
@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 64), (65, 33), (400, 32)])
def test_the_middle_is_taken(file_format: str, width: int, height: int) -> None:
    found = decode_image(encoded(gradient(width, height), file_format), Bucket(32, 32)).astype(int)
    assert found.shape == (3, 32, 32)
    shorter = min(width, height)
    columns, rows = np.linspace(0, 255, width), np.linspace(0, 255, height)
    left, top = (width - shorter) // 2, (height - shorter) // 2
    middle = [columns[left : left + shorter], rows[top : top + shorter]]
    for channel in (0, 1):
        profile = found[channel].mean(axis=channel)
        expected = np.interp(np.linspace(0, shorter - 1, 32), np.arange(shorter), middle[channel])
        assert np.abs(profile - expected).max() < 8


@pytest.mark.parametrize(("width", "height"), [(300, 400), (512, 400), (1024, 768), (2000, 300), (130, 129)])
def test_a_large_jpeg_is_what_its_pixels_are_resized_to(width: int, height: int) -> None:
    """Whatever libjpeg does at a lower resolution is within a few steps of 255 of decoding all and resizing."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    content = encoded(picture, "jpeg", quality=95)
    found = decode_image(content, Bucket(64, 64)).astype(int)
    whole = encoded(Image.open(io.BytesIO(content)), "png")
    difference = np.abs(found - decode_image(whole, Bucket(64, 64)).astype(int))
    assert difference.mean() < 2
    assert difference.max() < 16


def test_small_pictures_are_enlarged_if_asked_alone() -> None:
    content = encoded(gradient(20, 40), "png")
    with pytest.raises(ValueError, match="20 x 40 pixels, smaller than the model's 32 x 32"):
        decode_image(content, Bucket(32, 32))
    assert decode_image(content, Bucket(32, 32), upscale=True).shape == (3, 32, 32)
    # One pixel wide: the resized whole would have 10 million rows.
    assert decode_image(encoded(Image.new("RGB", (1, 10_000)), "png"), Bucket(1024, 1024), upscale=True).shape == (
        3, 1024, 1024,
    )  # fmt: skip


def test_it_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: to be turned clockwise
    found = decode_image(encoded(gradient(64, 32), "jpeg", exif=exif, quality=95)).astype(int)
    assert found.shape == (3, 64, 32)
    assert found[0, -1].mean() > 240 > 20 > found[0, 0].mean()  # what grew to the right grows downwards
    assert found[1, :, 0].mean() > 240 > 20 > found[1, :, -1].mean()


def test_what_is_transparent_becomes_white() -> None:
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0, 0] = (255, 0, 0, 255)
    pixels[0, 1] = (255, 0, 0, 51)  # a fifth of it over white
    found = decode_image(encoded(Image.fromarray(pixels), "png")).transpose(1, 2, 0)
    assert found[0].tolist() == [[255, 0, 0], [255, 204, 204]]
    assert (found[1] == 255).all()
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((0, 0), 0)
    found = decode_image(encoded(palette, "png", transparency=0)).transpose(1, 2, 0)
    assert found[0].tolist() == [[255, 255, 255], [10, 20, 30]]


def test_cmyk_becomes_rgb() -> None:
    found = decode_image(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "jpeg", quality=100)).astype(
        int
    )
    assert np.abs(found - np.array([255, 0, 0])[:, None, None]).max() < 10


def wide_profile(gamma: float = 2.19921875) -> bytes:
    """A profile of three primaries (those of Adobe RGB, as XYZ under D50) and a gamma, written by hand after ICC.1:2001-04."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    def place(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + fixed(*values)

    white = (0.9642, 1.0, 0.8249)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(79)
    tags = [(b"desc", description), (b"cprt", b"text\0\0\0\0none\0\0\0\0"), (b"wtpt", place(*white))]
    primaries = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]
    tags += [
        (bytes([name]) + b"XYZ", place(*primary)) for name, primary in zip(b"rgb", primaries, strict=True)
    ]
    tags += [(bytes([name]) + b"TRC", curve) for name in b"rgb"]
    table, data = b"", b""
    for name, content in tags:
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(
        ">I4sI4s4s4s12s4s",
        128 + len(body),
        b"lcms",
        0x02100000,
        b"mntr",
        b"RGB ",
        b"XYZ ",
        bytes(12),
        b"acsp",
    )
    return (head + bytes(28) + fixed(*white)).ljust(128, b"\0") + body


def to_adobe(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """An sRGB colour in Adobe RGB, by the definitions of both: linear light, primaries, gamma 563/256."""
    encoded_light = np.array(colour) / 255
    light = np.where(
        encoded_light <= 0.04045, encoded_light / 12.92, ((encoded_light + 0.055) / 1.055) ** 2.4
    )
    # Bradford-adapted to D50, as profiles are.
    srgb = np.array(
        [
            [0.4360747, 0.3850649, 0.1430804],
            [0.2225045, 0.7168786, 0.0606169],
            [0.0139322, 0.0971045, 0.7141733],
        ]
    )
    adobe = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
    found = np.clip(np.linalg.solve(adobe, srgb @ light), 0, 1) ** (256 / 563)
    return tuple(int(value) for value in np.rint(found * 255))  # type: ignore[return-value]


COLOURS = [(60, 200, 80), (190, 70, 200), (128, 128, 128), (255, 255, 255), (20, 30, 120)]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "palette", "transparent"])
@pytest.mark.parametrize("colour", COLOURS)
def test_colours_of_a_profile_become_those_of_srgb(kind: str, colour: tuple[int, int, int]) -> None:
    stored = Image.new("RGB", (8, 8), to_adobe(colour))
    if kind == "palette":
        stored = stored.convert("P", palette=Image.Palette.ADAPTIVE)
    elif kind == "transparent":
        stored.putalpha(255)
    options: dict[str, Any] = {"quality": 100} if kind in ("jpeg", "webp") else {}
    options |= {"lossless": True} if kind == "webp" else {}
    file_format = kind if kind in ("jpeg", "webp") else "png"
    found = decode_image(encoded(stored, file_format, icc_profile=wide_profile(), **options)).astype(int)
    assert np.abs(found - np.array(colour)[:, None, None]).max() <= 3
    if len(set(colour)) > 1:  # greys are the same in both
        without = decode_image(encoded(stored, file_format, **options)).astype(int)
        assert np.abs(without - np.array(colour)[:, None, None]).max() > 8


@pytest.mark.parametrize("profile", [b"no profile", bytes(200), wide_profile()[:150]])
def test_a_damaged_profile_is_none(profile: bytes) -> None:
    found = decode_image(encoded(Image.new("RGB", (4, 4), (60, 200, 80)), "png", icc_profile=profile))
    assert found[:, 0, 0].tolist() == [60, 200, 80]


def test_of_a_photograph_with_further_pictures_the_first_is_taken() -> None:
    first, preview = gradient(64, 32), Image.new("RGB", (16, 8))
    content = encoded(first, "mpo", save_all=True, append_images=[preview], quality=95)
    assert np.abs(decode_image(content).astype(int) - np.asarray(first).transpose(2, 0, 1)).mean() < 3


def test_a_colour_profile_is_no_obstacle() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode_image(encoded(gradient(8, 8), "jpeg", icc_profile=profile)).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded(gradient(8, 8), "png", save_all=True, append_images=[Image.new("RGB", (8, 8))]), "2 pictures"),
        (encoded(gradient(8, 8), "webp", save_all=True, append_images=[Image.new("RGB", (8, 8))]), "2 pictures"),
        (encoded(gradient(8, 8), "avif", save_all=True, append_images=[Image.new("RGB", (8, 8))]), "2 pictures"),
        (encoded(gradient(8, 8), "gif"), "cannot identify"),
        (encoded(Image.new("I;16", (4, 4)), "png"), "8 bits"),
        (encoded(gradient(64, 64), "jpeg")[:-400], "(?i)truncated"),
        (encoded(Image.new("1", (13_400, 13_400)), "png"), "bomb"),
        (b"", "cannot identify"),
        (b"<svg/>", "cannot identify"),
    ],
    ids=["apng", "animated webp", "animated avif", "gif", "16 bits", "truncated", "bomb", "empty", "svg"],
)  # fmt: skip
def test_what_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        decode_image(content)
