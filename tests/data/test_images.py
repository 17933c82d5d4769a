"""Decoding, against pixels that are known."""

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_vision import png

from lora_cli.data.images import describe_image, read_image, upright_size, within_pixels
from lora_cli.data.media import MediaError

GREY = np.array([[0, 50], [100, 255]], np.uint8)
GREY_RGB = np.repeat(GREY[:, :, None], 3, axis=2)


def pixels(content: bytes) -> Any:
    image = read_image(content)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_grey_becomes_three_equal_channels() -> None:
    assert (pixels(png(Image.fromarray(GREY))) == GREY_RGB).all()


def test_one_bit_is_black_and_white() -> None:
    image = Image.fromarray(GREY > 75)
    assert image.mode == "1"
    assert (pixels(png(image)) == np.where(GREY_RGB > 75, 255, 0)).all()


def test_sixteen_bits_are_rounded_and_not_cut() -> None:
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert np.abs(pixels(png(deep)).astype(int) - GREY_RGB).max() <= 1


def test_a_palette_gives_its_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putdata([0, 1])
    assert pixels(png(image)).tolist() == [[[10, 20, 30], [200, 100, 0]]]


def test_what_is_transparent_becomes_white() -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)])
    red, clear, half = pixels(png(image))[0].tolist()
    assert (red, clear) == ([255, 0, 0], [255, 255, 255])
    assert half == pytest.approx([127, 127, 127], abs=1)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 0])
    palette.putdata([0, 1])
    assert pixels(png(palette, transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    grey = Image.new("LA", (1, 1), (40, 0))
    assert pixels(png(grey)).tolist() == [[[255, 255, 255]]]


def test_the_exif_note_turns_the_image() -> None:
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_image(png(image, "JPEG", exif=exif))
    assert turned.size == (2, 4)
    assert describe_image(png(image, "JPEG", exif=exif))["measures"] == {"width": 4, "height": 2}
    assert upright_size(png(image, "JPEG", exif=exif)) == (2, 4)
    assert upright_size(png(image)) == (4, 2)


def test_of_several_frames_the_first_is_taken() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    content = png(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(content)[0, 0].tolist() == [255, 0, 0]


def test_measures_and_kinds() -> None:
    found = describe_image(png(Image.fromarray(GREY)))
    assert found == {
        "measures": {"width": 2, "height": 2},
        "kinds": {"format": "PNG", "mode": "L"},
    }


WHOLE = png(Image.frombytes("RGB", (40, 40), bytes(range(240)) * 20))
PHOTO = png(Image.frombytes("RGB", (40, 40), bytes(range(240)) * 20), "JPEG")


@pytest.mark.parametrize("content", [WHOLE[: len(WHOLE) // 2], PHOTO[: len(PHOTO) // 2]])
def test_a_file_that_was_cut_off_is_refused(content: bytes) -> None:
    with pytest.raises(MediaError, match=r"[Tt]runcated"):
        describe_image(content)


def test_damage_in_the_middle_is_refused() -> None:
    broken = bytearray(WHOLE)
    broken[60] ^= 0xFF
    with pytest.raises(MediaError):
        describe_image(bytes(broken))


@pytest.mark.parametrize("content", [b"no image at all", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(MediaError, match="no image of a known format"):
        describe_image(content)


def test_an_image_that_would_fill_the_memory_is_refused() -> None:
    size = struct.pack(">II", 40_000, 40_000) + bytes([8, 0, 0, 0, 0])
    chunk = b"IHDR" + size
    header = struct.pack(">I", len(size)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(MediaError, match="more pixels"):
        describe_image(BytesIO(b"\x89PNG\r\n\x1a\n" + header + WHOLE[33:]).getvalue())


def test_images_of_too_many_pixels_keep_their_shape() -> None:
    image = Image.new("RGB", (300, 100))
    assert within_pixels(image, None) is image
    assert within_pixels(image, 30_000) is image
    assert within_pixels(image, 7_500).size == (150, 50)
    assert within_pixels(Image.new("RGB", (500, 1)), 100).size == (223, 1)
