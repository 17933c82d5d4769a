"""Images: decoded from bytes, upright and in RGB, whatever their file holds."""

import base64
import warnings
from io import BytesIO
from typing import Any

from lora_cli.data.media import MediaError

# Formats of photographs and drawings; Pillow has readers of others, some of which start programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_WHITE = (255, 255, 255)
_THUMBNAIL = 96
# The tag of EXIF that says how an image is turned, and its values that exchange the sides.
_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)


def read_image(content: bytes) -> Any:
    """Return an image of Pillow in RGB, turned as its EXIF note says.

    What is transparent becomes white, 16 bits are rounded to 8, and of several frames the first is
    taken.

    Raises:
        MediaError: If the bytes are no image, or not a whole one.
    """
    return to_rgb(load_image(content))


def describe_image(content: bytes) -> dict[str, Any]:
    """Decode an image, and return its ``measures`` and ``kinds``; see `Task.encode`.

    Raises:
        MediaError: As `read_image`.
    """
    image = load_image(content)
    return {
        "measures": {"width": image.width, "height": image.height},
        "kinds": {"format": image.format or "", "mode": image.mode},
    }


def upright_size(content: bytes) -> tuple[int, int]:
    """Return width and height of an image that `read_image` can read, as it gives it."""
    from PIL import Image

    with Image.open(BytesIO(content), formats=_FORMATS) as image:
        width, height = image.size
        is_lying = image.getexif().get(_ORIENTATION) in _LYING
    return (height, width) if is_lying else (width, height)


def mirror(image: Any) -> Any:
    """Return an image with left and right exchanged."""
    from PIL import ImageOps

    return ImageOps.mirror(image)


def thumbnail(content: bytes) -> str:
    """Return a small copy of an image as a data URI, which a page can hold in itself."""
    image, small = read_image(content), BytesIO()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    image.save(small, "PNG")
    return f"data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}"


def within_pixels(image: Any, most: int | None) -> Any:
    """Return an image of at most so many pixels, in its shape; None leaves it as it is."""
    pixels = image.width * image.height
    if most is None or pixels <= most:
        return image
    share = (most / pixels) ** 0.5
    return image.resize((max(1, int(image.width * share)), max(1, int(image.height * share))))


def to_rgb(image: Any) -> Any:
    """Turn an image upright and into RGB."""
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        # Pillow cuts 16 bits at 255 instead.
        upright = upright.point(lambda value: value / 257).convert("L")
    if upright.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        paper = Image.new("RGB", layer.size, _WHITE)
        paper.paste(layer, mask=layer.getchannel("A"))
        return paper
    return upright.convert("RGB")


def load_image(content: bytes) -> Any:
    """Decode all of an image, in the mode of its file.

    Raises:
        MediaError: If that cannot be done.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        # Pillow warns of files whose pixels would fill the memory.
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(content), formats=_FORMATS)
            image.load()
    except UnidentifiedImageError:
        raise MediaError("no image of a known format") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise MediaError("more pixels than an image should have") from None
    # Its readers raise whatever they stumble over.
    except Exception as error:
        text = str(error).strip().splitlines()[0][:120] if str(error).strip() else ""
        raise MediaError(text or type(error).__name__) from error
    return image
