"""Pictures with any kind of pixels as RGB with 8 bits a channel: sRGB's colours, and white where they are transparent."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageFile

# Of a transparent grey of 2 or 4 bits, which Pillow leaves as it is stored, while it brings the pixels to 8 bits.
_GREY_LEVELS = {"L;2": 255 // 3, "L;4": 255 // 15}


def note_transparent_colour(image: Image.Image) -> None:
    """Bring the one colour that a PNG without alpha may call transparent to the bits of its pixels, as they will be loaded.

    Args:
        image: opened and not loaded.

    Raises:
        ValueError: it is a colour of 16 bits a channel, of which Pillow loads 8.
    """
    transparent = image.info.get("transparency")
    if image.format != "PNG" or transparent is None or not isinstance(image, ImageFile.ImageFile):
        return
    arguments = image.tile[0].args if image.tile else None
    stored = arguments if isinstance(arguments, str) else str((arguments or ("",))[0])
    if stored == "RGB;16B":
        raise ValueError(
            "a transparent colour with 16 bits a channel, which cannot be told from its neighbours"
        )
    if stored in _GREY_LEVELS:
        image.info["transparency"] = transparent * _GREY_LEVELS[stored]


def as_rgb(image: Image.Image) -> Image.Image:
    """Return a loaded picture as RGB: itself, if it is RGB already.

    Of 16 bits a channel the upper 8 are kept; grey, palettes and CMYK become RGB; a profile's colours become sRGB's (without one, or with
    one that cannot be read, they are sRGB's, and CMYK's are those of ideal inks); what is transparent is laid on white.

    Raises:
        ValueError: its pixels are of another kind.
    """
    profile = image.info.get("icc_profile")
    plain = _in_eight_bits(image)
    alpha = plain.getchannel("A") if plain.mode in ("LA", "RGBA") else None
    colours = plain.convert("L" if plain.mode == "LA" else "RGB") if alpha is not None else plain
    transform = _to_srgb(profile, colours.mode) if profile else None
    if transform is None:
        colours = colours if colours.mode == "RGB" else colours.convert("RGB")
    else:
        converted = ImageCms.applyTransform(colours, transform)
        assert converted is not None
        colours = converted
    if alpha is None:
        return colours
    colours.putalpha(alpha)
    ground = Image.new("RGBA", colours.size, "white")
    return Image.alpha_composite(ground, colours).convert("RGB")


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Return a picture of mode L, RGB or CMYK, or with what is transparent LA or RGBA."""
    mode, transparent = image.mode, image.info.get("transparency")
    if mode.startswith("I;16"):
        values = np.asarray(image)
        grey = Image.fromarray((values >> 8).astype(np.uint8))
        if transparent is not None:
            grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
        return grey
    if mode in ("P", "PA"):
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if mode in ("1", "L"):
        return image.convert("LA" if transparent is not None else "L")
    if mode == "RGB":
        return image.convert("RGBA") if transparent is not None else image
    if mode in ("LA", "RGBA", "CMYK"):
        return image
    raise ValueError(f"pixels of mode {mode}, which are not converted")


@lru_cache(maxsize=64)  # pictures of a set share a few profiles
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion from a profile's colours to sRGB; None if they are sRGB's, or the profile is of no use here."""
    srgb = ImageCms.createProfile("sRGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        return ImageCms.buildTransform(source, srgb, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
