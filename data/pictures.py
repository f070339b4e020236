"""Pictures: a path, bytes or a Pillow picture -> RGB, resized as the published loader does (spec 1.4).

An EXIF orientation is left unapplied, as Pillow and the published loader leave it, so boxes are pixels of the stored
picture.
"""
import io
import math
from contextlib import nullcontext

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_PIXELS, MAX_PIXELS = 512 * 512, 2048 * 2048  # published loader bounds (spec 1.4)
FACTOR = 28  # patch 14 x merge 2 of Qwen2.5-VL: the sides a model sees are multiples of it


class BrokenPicture(ValueError):
    """A picture that cannot be decoded; the message names row, picture and cure."""


# ---------------------------------------------------------------- reading

def picture_size(picture) -> tuple[int, int] | None:
    """(W, H) from the header alone; None when it cannot be read, which `encode` reports as a broken picture."""
    try:
        with open_picture(picture) as image:
            return image.size
    except Exception:  # see decode_picture: Pillow raises nearly anything on foreign bytes
        return None


def decode_picture(picture, *, row_id: str) -> Image.Image:
    """Path, bytes or PIL -> RGB picture. Raises BrokenPicture naming row and picture."""
    name = f"of {len(picture)} bytes" if isinstance(picture, bytes) else picture
    try:
        with open_picture(picture) as image:
            rgb = to_rgb(image)
    except Exception as error:  # OSError, SyntaxError, struct.error, bomb errors: whatever a plugin meets in the bytes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise BrokenPicture(f"row {row_id}: picture {name} cannot be read ({reason}): "
                            "replace it or remove the row") from error
    if max(rgb.size) > 200 * min(rgb.size):
        raise BrokenPicture(f"row {row_id}: picture {name} is {rgb.width} x {rgb.height}, thinner than 1:200, which "
                            "the processor refuses: crop it or remove the row")
    return rgb


def open_picture(picture):
    """A context that yields the Pillow picture, header read; a picture in memory is not closed on leaving."""
    if isinstance(picture, Image.Image):
        return nullcontext(picture)
    return Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: 16-bit grey keeps its high byte, transparency goes over white (Pillow alone would clip, or show
    what was hidden). Palettes become colours before any resize, or interpolation would mix palette numbers."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---------------------------------------------------------------- sizes and frames

def resized_size(width: int, height: int, *, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(W, H) after the published loader (spec 1.4): shrink to max_pixels, then grow to min_pixels, sides truncated."""
    if width * height > max_pixels:
        scale = math.sqrt(max_pixels / (width * height))
        width, height = max(1, int(width * scale)), max(1, int(height * scale))
    if width * height < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        width, height = int(width * scale), int(height * scale)
    return width, height


def frame_size(width: int, height: int, *, min_pixels: int, max_pixels: int, factor: int) -> tuple[int, int]:
    """(W, H) the model sees: the loader's resize, then the processor's rounding of each side to `factor`."""
    width, height = resized_size(width, height, min_pixels=min_pixels, max_pixels=max_pixels)
    return max(factor, round(width / factor) * factor), max(factor, round(height / factor) * factor)


def process_image(image: Image.Image, *, min_pixels: int, max_pixels: int) -> Image.Image:
    """The published loader's resize (spec 1.4), RGB in and out, Pillow's default resampling."""
    size = resized_size(*image.size, min_pixels=min_pixels, max_pixels=max_pixels)
    return image if size == image.size else image.resize(size)


# ---------------------------------------------------------------- drawing

COLOURS = ("#e6194b", "#0082c8", "#3cb44b", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324")


def draw_boxes(picture: Image.Image, objects: list[dict], size: tuple[int, int]) -> Image.Image:
    """A copy of the picture, small ones enlarged, with each object's box and id. Boxes are in a frame of `size` (W, H);
    corners may come in any order, and what lies outside is moved to the border."""
    zoom = max(1, -(-448 // min(picture.size)))
    shown = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    pen, font = ImageDraw.Draw(shown), ImageFont.load_default(max(13, min(shown.size) // 40))
    for number, item in enumerate(objects):
        # clipped in the frame first: a coordinate may be nan (then 0) or too large for a float
        x1, y1, x2, y2 = (
            min(max(0, v), side) * full / side
            for v, side, full in zip(item["bbox"], (*size, *size), (*shown.size, *shown.size), strict=True)
        )
        x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
        colour = COLOURS[number % len(COLOURS)]
        pen.rectangle((x1, y1, x2, y2), outline=colour, width=max(2, min(shown.size) // 200))
        name = item["id"][:40]
        _, _, width, height = pen.textbbox((0, 0), name, font=font)
        # above the box, or below where there is no room, and inside the picture
        at = (max(0, min(x1, shown.width - width)), y1 - height - 4 if y1 >= height + 4 else y2 + 4)
        pen.rectangle(pen.textbbox(at, name, font=font), fill=colour)
        pen.text(at, name, fill="white", font=font)
    return shown
