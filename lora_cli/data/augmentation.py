"""Changes of images for training: random crop, flip, colours and RandAugment, with Pillow alone.

Each is a pure function of an image and a generator. What is drawn for a row is a function of the
seed of the step and of the id of the row, so it is the same in whatever batch or process the row
is, and in a run that was resumed.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Sides of a crop as width / height, as Szegedy et al. 2015 (arXiv:1409.4842, section 6) have it.
_NARROWEST, _WIDEST = 3 / 4, 4 / 3
_TRIES = 10
# Strengths of RandAugment go from 0 to this (Cubuk et al. 2020, arXiv:1909.13719).
_STRONGEST = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """What may be changed.

    Attributes:
        crop_scale: Least share of the area that a random crop keeps; 1 crops nothing.
        flip: Chance of mirroring left and right.
        color_jitter: How far brightness, contrast and saturation go from 1; 0 leaves them.
        operations: Number of operations of RandAugment; 0 is off.
        strength: Of these operations, from 0 to 30.
    """

    crop_scale: float
    flip: float
    color_jitter: float
    operations: int
    strength: int

    @property
    def is_on(self) -> bool:
        """Whether anything is changed."""
        return self.crop_scale < 1 or self.flip > 0 or self.color_jitter > 0 or self.operations > 0


def augment(image: Any, how: Augmentation, *, seed: int, row_id: str) -> Any:
    """Return a changed image of Pillow, in RGB.

    Args:
        image: In RGB.
        how: What may be changed.
        seed: Of the step.
        row_id: Of the row.
    """
    draw = random.Random(f"{seed}/{row_id}/augment")
    if how.crop_scale < 1:
        image = random_crop(image, draw, least=how.crop_scale)
    if draw.random() < how.flip:
        image = _mirrored(image)
    if how.color_jitter > 0:
        image = jitter(image, draw, by=how.color_jitter)
    if how.operations:
        image = rand_augment(image, draw, operations=how.operations, strength=how.strength)
    return image


def random_crop(image: Any, draw: random.Random, *, least: float) -> Any:
    """Cut out a part of between `least` and all of the area, its sides between 3:4 and 4:3.

    The processor of the model makes it the size that the model reads. Where no such part fits in
    ten tries, the image stays whole.
    """
    width, height = image.size
    for _ in range(_TRIES):
        area = width * height * draw.uniform(least, 1.0)
        ratio = math.exp(draw.uniform(math.log(_NARROWEST), math.log(_WIDEST)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = draw.randint(0, width - wide), draw.randint(0, height - high)
            return image.crop((left, top, left + wide, top + high))
    return image


def jitter(image: Any, draw: random.Random, *, by: float) -> Any:
    """Change brightness, contrast and saturation, in a random order, each by a factor near 1."""
    from PIL import ImageEnhance

    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    draw.shuffle(enhancers)
    for enhancer in enhancers:
        image = enhancer(image).enhance(draw.uniform(max(0.0, 1 - by), 1 + by))
    return image


def rand_augment(image: Any, draw: random.Random, *, operations: int, strength: int) -> Any:
    """Apply so many operations, drawn with repeats, each with the same strength (Cubuk 2020)."""
    share = strength / _STRONGEST
    for _ in range(operations):
        operation = OPERATIONS[draw.randrange(len(OPERATIONS))]
        image = operation(image, share, draw.choice((-1, 1)))
    return image


def _mirrored(image: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.mirror(image)


def _affine(image: Any, matrix: Sequence[float]) -> Any:
    from PIL import Image

    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _enhanced(name: str) -> Callable[[Any, float, int], Any]:
    def change(image: Any, share: float, sign: int) -> Any:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, name)(image).enhance(1 + 0.9 * share * sign)

    return change


def _with_ops(name: str) -> Callable[[Any, float, int], Any]:
    def change(image: Any, share: float, sign: int) -> Any:
        del share, sign
        from PIL import ImageOps

        return getattr(ImageOps, name)(image)

    return change


def _identity(image: Any, share: float, sign: int) -> Any:
    del share, sign
    return image


def _rotate(image: Any, share: float, sign: int) -> Any:
    return image.rotate(30 * share * sign)


def _shear_x(image: Any, share: float, sign: int) -> Any:
    return _affine(image, (1, 0.3 * share * sign, 0, 0, 1, 0))


def _shear_y(image: Any, share: float, sign: int) -> Any:
    return _affine(image, (1, 0, 0, 0.3 * share * sign, 1, 0))


def _translate_x(image: Any, share: float, sign: int) -> Any:
    return _affine(image, (1, 0, 0.45 * share * sign * image.width, 0, 1, 0))


def _translate_y(image: Any, share: float, sign: int) -> Any:
    return _affine(image, (1, 0, 0, 0, 1, 0.45 * share * sign * image.height))


def _posterize(image: Any, share: float, sign: int) -> Any:
    del sign
    from PIL import ImageOps

    return ImageOps.posterize(image, 8 - round(4 * share))


def _solarize(image: Any, share: float, sign: int) -> Any:
    del sign
    from PIL import ImageOps

    return ImageOps.solarize(image, round(256 * (1 - share)))


OPERATIONS: tuple[Callable[[Any, float, int], Any], ...] = (
    _identity,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
    _rotate,
    _enhanced("Brightness"),
    _enhanced("Color"),
    _enhanced("Contrast"),
    _enhanced("Sharpness"),
    _posterize,
    _solarize,
    _with_ops("autocontrast"),
    _with_ops("equalize"),
)
"""Operations of RandAugment: an image, the strength from 0 to 1, and a direction."""
