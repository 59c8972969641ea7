"""What becomes of every kind of picture that a set from the web holds."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.data.shards.decoding import decode_image
from tests.support.runs import write_shard


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


def like_a_photograph(width: int, height: int) -> Image.Image:
    """Amplitudes fall with the frequency, as photographs' do (Field, 1987), and rectangles have sharp edges."""
    rng = np.random.default_rng(0)
    down, right = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falling = 1 / np.maximum(np.hypot(down, right), 1 / max(width, height))
    noise = rng.normal(size=(3, height, width))
    pixels = np.fft.irfft2(np.fft.rfft2(noise) * falling, s=(height, width))
    pixels = 128 + 50 * (pixels / pixels.std(axis=(1, 2), keepdims=True)).transpose(1, 2, 0)
    for _ in range(20):
        top, left = rng.integers(0, height), rng.integers(0, width)
        pixels[top : top + height // 6, left : left + width // 5] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(384, 192), (385, 193), (287, 199), (771, 769), (401, 769)])
def test_decoding_at_a_half_loses_a_quarter_of_what_a_jpeg_of_the_result_does(
    width: int, height: int, orientation: int
) -> None:
    """Every pixel stays in its place, also where a last, partial pixel is turned to the front."""
    size = Bucket(64, 64) if height < 700 else Bucket(128, 80)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encoded(like_a_photograph(width, height), "jpeg", quality=95, subsampling=0, exif=exif)
    found = decode_image(content, size).astype(int)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    whole = decode_image(encoded(upright, "png"), size)
    stored = decode_image(encoded(Image.fromarray(whole.transpose(1, 2, 0)), "jpeg", quality=95))
    assert 0 < np.abs(found - whole).mean() < np.abs(stored.astype(int) - whole).mean() / 4


def test_small_pictures_are_enlarged_if_asked_alone() -> None:
    content = encoded(gradient(20, 40), "png")
    with pytest.raises(ValueError, match="20 x 40 pixels, smaller than the model's 32 x 32"):
        decode_image(content, Bucket(32, 32))
    assert decode_image(content, Bucket(32, 32), upscale=True).shape == (3, 32, 32)
    # One pixel wide: the resized whole would have 10 million rows.
    assert decode_image(encoded(Image.new("RGB", (1, 10_000)), "png"), Bucket(1024, 1024), upscale=True).shape == (
        3, 1024, 1024,
    )  # fmt: skip


# Which way EXIF's eight orientations say that the stored rows and columns of [[1, 2, 3], [4, 5, 6]] are to be shown (CIPA DC-008, 4.6.5.1).
UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("file_format", ["png", "webp", "jpeg", "avif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_orientation_is_turned_upright(file_format: str, orientation: int, tmp_path: Path) -> None:
    exif, values = Image.Exif(), np.array(UPRIGHT[1], dtype=np.uint8) * 40
    exif[0x0112] = orientation
    stored = Image.fromarray(values.repeat(16, axis=0).repeat(16, axis=1)).convert("RGB")
    options: dict[str, Any] = {"lossless": True} if file_format == "webp" else {"quality": 100}
    content = encoded(stored, file_format, exif=exif, **options)
    expected = np.array(UPRIGHT[orientation]) * 40
    found = decode_image(content)[:, 8::16, 8::16].astype(int)
    assert np.abs(found - expected).max() <= 4
    write_shard(tmp_path / "a.tar", [{file_format: content}])
    assert ShardDataset(tmp_path).size(0) == (16 * expected.shape[1], 16 * expected.shape[0])


def written_png(
    pixels: list[int], depth: int, kind: int, colour: bytes = b"", extra: tuple[tuple[bytes, bytes], ...] = ()
) -> bytes:
    """A PNG of one row written by hand after its specification (ISO/IEC 15948).

    Args:
        pixels: samples of ``depth`` bits, in their order.
        kind: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGB with alpha.
        colour: the transparent one, or alphas of the palette.
        extra: chunks before the pixels.
    """
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    bits = "".join(f"{value:0{depth}b}" for value in pixels)
    bits += "0" * (-len(bits) % 8)
    row = bytes(int(bits[start : start + 8], 2) for start in range(0, len(bits), 8))

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", len(pixels) // channels, 1, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, *([(b"tRNS", colour)] if colour else [])]
    chunks += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def shorts(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


PALETTE = (b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120]))
W = [255, 255, 255]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (written_png([1, 0, 1, 1], 1, 0), [W, [0] * 3, W, W]),
        (written_png([0, 1, 2, 3], 2, 0), [[85 * value] * 3 for value in range(4)]),
        (written_png([0, 5, 15], 4, 0), [[0] * 3, [85] * 3, W]),
        (written_png([0, 7, 255], 8, 0), [[0] * 3, [7] * 3, W]),
        (written_png([0x00FF, 0x8001, 0xFFFF], 16, 0), [[0] * 3, [128] * 3, W]),
        (written_png([1, 2, 3, 255, 0, 9], 8, 2), [[1, 2, 3], [255, 0, 9]]),
        (written_png([0x01FF, 0x8001, 0xFFFF, 0, 0x7F00, 0x00FE], 16, 2), [[1, 128, 255], [0, 127, 0]]),
        (written_png([0, 1, 2, 3], 2, 3, extra=(PALETTE,)), [[10, 20, 30], [40, 50, 60], [70, 80, 90], [100, 110, 120]]),
        (written_png([3, 0], 8, 3, extra=(PALETTE,)), [[100, 110, 120], [10, 20, 30]]),
        # A fifth of the colour over white: 255 - (255 - value) / 5.
        (written_png([55, 51, 55, 255], 8, 4), [[215] * 3, [55] * 3]),
        (written_png([0x37FF, 0x33FF, 0x37FF, 0xFFFF], 16, 4), [[215] * 3, [55] * 3]),
        (written_png([55, 105, 5, 51, 1, 2, 3, 0], 8, 6), [[215, 225, 205], W]),
        (written_png([0x37FF, 0x69FF, 0x05FF, 0x33FF], 16, 6), [[215, 225, 205]]),
        # A transparent colour.
        (written_png([1, 0], 1, 0, shorts(0)), [W, W]),
        (written_png([0, 1, 2], 2, 0, shorts(1)), [[0] * 3, W, [170] * 3]),
        (written_png([0, 5, 6], 4, 0, shorts(5)), [[0] * 3, W, [102] * 3]),
        (written_png([7, 8], 8, 0, shorts(7)), [W, [8] * 3]),
        (written_png([0x8001, 0x8002], 16, 0, shorts(0x8001)), [W, [128] * 3]),
        (written_png([1, 2, 3, 1, 2, 4], 8, 2, shorts(1, 2, 3)), [W, [1, 2, 4]]),
        (written_png([0, 1, 2], 2, 3, bytes([0, 51]), (PALETTE,)), [W, [212, 214, 216], [70, 80, 90]]),
    ],
)  # fmt: skip
def test_every_depth_and_kind_of_png_is_what_its_bits_say(content: bytes, expected: list[list[int]]) -> None:
    assert decode_image(content)[:, 0].T.tolist() == expected


def test_a_transparent_colour_of_sixteen_bits_is_left_out_by_name() -> None:
    with pytest.raises(ValueError, match="a transparent colour with 16 bits a channel"):
        decode_image(written_png([1, 2, 3], 16, 2, shorts(1, 2, 3)))


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


def test_ideal_inks_without_a_profile() -> None:
    """Light that an ink lets through is what the others leave: (1 - C) (1 - K)."""
    for inks in [(51, 102, 204, 0), (0, 0, 0, 128), (255, 128, 0, 51), (40, 80, 120, 160)]:
        expected = [(255 - ink) * (255 - inks[3]) / 255 for ink in inks[:3]]
        found = decode_image(encoded(Image.new("CMYK", (8, 8), inks), "jpeg", quality=100)).astype(int)
        assert np.abs(found - np.array(expected)[:, None, None]).max() <= 3


# Lab (D50) of what inks give, by C, M, Y, K each all or nothing; these are no real inks. The others are black, so that the darkest
# colour is, which a conversion would make it otherwise (compensation of the black point).
INKS = {
    (0, 0, 0, 0): (100, 0, 0),
    (1, 0, 0, 0): (60, -20, -30),
    (0, 1, 1, 0): (45, 40, 25),
    (0, 0, 0, 1): (0, 0, 0),
}


def ink_profile() -> bytes:
    """A CMYK profile whose table has the corners alone, written by hand after ICC.1:2001-04 (lut8Type, 6.5.8)."""
    table = b"".join(
        bytes([round(lightness * 2.55), a + 128, b + 128])
        for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)
        for lightness, a, b in [INKS.get((c, m, y, k), (0, 0, 0))]
    )  # fmt: skip
    identity = struct.pack(">9i", *(65536 if place % 4 == 0 else 0 for place in range(9)))
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + 4 * ramp + table + 3 * ramp
    return profile(b"prtr", b"CMYK", b"Lab ", [(b"A2B0", lut)])


def grey_profile() -> bytes:
    """A profile of greys that are as bright as their numbers."""
    return profile(b"mntr", b"GRAY", b"XYZ ", [(b"kTRC", b"curv\0\0\0\0" + struct.pack(">I", 0))])


def from_lab(lightness: float, a: float, b: float) -> np.ndarray:
    """An sRGB colour of Lab under D50, by the definitions of both (CIE 15; IEC 61966-2-1; Bradford's adaptation)."""
    f = np.array([(lightness + 16) / 116 + a / 500, (lightness + 16) / 116, (lightness + 16) / 116 - b / 200])
    place = np.array([0.9642, 1, 0.8249]) * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    light = np.linalg.solve(SRGB, place)
    return 255 * np.where(
        light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 0) ** (1 / 2.4) - 0.055
    )


# Primaries of sRGB as XYZ, Bradford-adapted to D50, as profiles are.
SRGB = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)


@pytest.mark.parametrize("inks", INKS)
def test_inks_with_a_profile_have_the_colours_that_it_says(inks: tuple[int, ...]) -> None:
    stored = Image.new("CMYK", (16, 16), tuple(255 * ink for ink in inks))
    found = decode_image(encoded(stored, "jpeg", quality=100, icc_profile=ink_profile())).astype(float)
    expected = from_lab(*INKS[inks])
    assert expected.min() > -1
    assert np.abs(found - expected[:, None, None]).max() <= 4
    small = decode_image(encoded(stored, "jpeg", quality=100, icc_profile=ink_profile()), Bucket(4, 4))
    assert np.abs(small.astype(float) - expected[:, None, None]).max() <= 4


@pytest.mark.parametrize("kind", ["grey", "16 bits", "alpha", "transparent"])
def test_greys_with_a_profile_are_as_bright_as_it_says(kind: str) -> None:
    chunk = (b"iCCP", b"grey\0\0" + zlib.compress(grey_profile()))
    values = [20, 128, 230]
    content = {
        "grey": written_png([*values, 7], 8, 0, extra=(chunk,)),
        "16 bits": written_png([257 * value for value in (*values, 7)], 16, 0, extra=(chunk,)),
        "alpha": written_png(
            [each for value in values for each in (value, 255)] + [7, 0], 8, 4, extra=(chunk,)
        ),
        "transparent": written_png([*values, 7], 8, 0, shorts(7), (chunk,)),
    }[kind]
    light = np.array(values) / 255
    expected = 255 * (1.055 * light ** (1 / 2.4) - 0.055)
    found = decode_image(content)[:, 0].astype(float)
    assert np.abs(found[:, :3] - expected).max() <= 1.5
    assert (found[:, 3] == 255).all() == (kind in ("alpha", "transparent"))


def test_what_a_profile_leaves_transparent_is_white() -> None:
    chunk = (b"iCCP", b"wide\0\0" + zlib.compress(wide_profile()))
    found = decode_image(written_png([*to_adobe((60, 200, 80)), 1, 2, 3], 8, 2, shorts(1, 2, 3), (chunk,)))
    assert np.abs(found[:, 0, 0].astype(int) - [60, 200, 80]).max() <= 3
    assert found[:, 0, 1].tolist() == W


def profile(kind: bytes, space: bytes, connection: bytes, tags: list[tuple[bytes, bytes]]) -> bytes:
    """An ICC profile of these tags and those that every profile has."""
    white = struct.pack(">3i", *(round(value * 65536) for value in (0.9642, 1, 0.8249)))
    description = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"made\0" + bytes(79)
    tags = [
        (b"desc", description), (b"cprt", b"text\0\0\0\0none\0\0\0\0"), (b"wtpt", b"XYZ \0\0\0\0" + white), *tags,
    ]  # fmt: skip
    table, data = b"", b""
    for name, content in tags:
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(
        ">I4sI4s4s4s12s4s", 128 + len(body), b"lcms", 0x02100000, kind, space, connection, bytes(12), b"acsp"
    )
    return (head + bytes(28) + white).ljust(128, b"\0") + body


def wide_profile(gamma: float = 2.19921875) -> bytes:
    """A profile of three primaries (those of Adobe RGB, as XYZ under D50) and a gamma, written by hand after ICC.1:2001-04."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    def place(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + fixed(*values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    primaries = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]
    tags = [
        (bytes([name]) + b"XYZ", place(*primary)) for name, primary in zip(b"rgb", primaries, strict=True)
    ]
    tags += [(bytes([name]) + b"TRC", curve) for name in b"rgb"]
    return profile(b"mntr", b"RGB ", b"XYZ ", tags)


def to_adobe(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """An sRGB colour in Adobe RGB, by the definitions of both: linear light, primaries, gamma 563/256."""
    encoded_light = np.array(colour) / 255
    light = np.where(
        encoded_light <= 0.04045, encoded_light / 12.92, ((encoded_light + 0.055) / 1.055) ** 2.4
    )
    adobe = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
    found = np.clip(np.linalg.solve(adobe, SRGB @ light), 0, 1) ** (256 / 563)
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
        (encoded(gradient(8, 8), "gif"), "^it is a GIF picture"),
        (encoded(gradient(8, 8), "bmp"), "a BMP picture"),
        (encoded(gradient(8, 8), "jpeg2000"), "a JPEG 2000 picture"),
        (encoded(gradient(8, 8), "ppm"), "a PNM or PFM picture"),
        *((encoded(Image.new(mode, (4, 4)), "tiff"), "it is a TIFF picture") for mode in ("1", "L", "I;16", "F", "RGB", "CMYK")),
        (encoded(gradient(64, 64), "jpeg")[:-400], "(?i)truncated"),
        (encoded(Image.new("1", (13_400, 13_400)), "png"), "bomb"),
        (b"", "an empty file"),
        (b"<svg/>", "an SVG drawing"),
        (b'<?xml version="1.0"?>\n<svg/>', "an SVG drawing"),
        (b"<!DOCTYPE html><html>404</html>", "an HTML page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC picture"),
        (b"anything", "no picture"),
    ],
)  # fmt: skip
def test_what_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        decode_image(content)
