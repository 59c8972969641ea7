"""PNG files and labelled grids."""

import base64
import io
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from rmoe_megatron.files.foreign_errors import refusal
from rmoe_megatron.files.regular import read_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF")  # as Pillow names them; some of the others start programs
MAX_BYTES = 1 << 28  # of a file
CELL = 128  # pixels of a picture in a grid, at least
LINE = 12  # pixels of a line of text
TITLE = 20  # pixels above a titled picture


def open_picture(path: Path) -> Image.Image:
    """Open a picture that others may have made.

    Raises:
        UserError: it is no regular file, or no picture of the formats that are read.
    """
    content = read_bytes(path, MAX_BYTES)
    with refusal(f"{path} cannot be read as a picture"):
        return Image.open(io.BytesIO(content), formats=FORMATS)


def png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def embedded(content: bytes) -> str:
    """Return the bytes of a PNG file as an address that an HTML page carries in itself."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def stacked(grids: dict[str, Image.Image]) -> Image.Image:
    """Lay pictures out one below the other, each under its title."""
    height = sum(grid.height + TITLE for grid in grids.values())
    picture = Image.new("RGB", (max(grid.width for grid in grids.values()), height), "white")
    draw, top = ImageDraw.Draw(picture), 0
    for title, grid in grids.items():
        draw.text((4, top + 4), title, fill="black")
        picture.paste(grid, (0, top + TITLE))
        top += grid.height + TITLE
    return picture


def labelled_grid(images: np.ndarray, labels: list[str], columns: int = 8) -> Image.Image:
    """Lay uint8 images [N, H, W, 3] out in a grid with their labels below; small images are enlarged."""
    columns = min(columns, len(images))
    scale = max(1, round(CELL / images.shape[2]))
    width, height = images.shape[2] * scale, images.shape[1] * scale
    wrapped = [textwrap.wrap(label, width // 6)[:3] for label in labels]
    row_height = height + 3 * LINE + 8
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + 8), rows * row_height), "white")
    draw = ImageDraw.Draw(grid)
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = index % columns * (width + 8) + 4, index // columns * row_height + 4
        grid.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        for number, line in enumerate(lines):
            draw.text((x, y + height + 2 + number * LINE), line, fill="black")
    return grid
