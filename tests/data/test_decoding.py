"""What becomes of every kind of picture that a set from the web holds."""

import io
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
