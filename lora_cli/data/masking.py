"""Which tokens of a text are masked, and by what, as BERT does it (arXiv:1810.04805).

A text is cut into windows of tokens. A unit is what is masked together, a word or a token; every
token has the number of its unit, counted from 0 over all windows of the text, or `NEVER`.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

NEVER = -1
"""Instead of the number of a unit: a token that is never masked."""

# A longer word is masked token by token: it is a run of a script without spaces, or no word.
MOST_TOKENS = 10

_SHOWN_AS_MASK, _SHOWN_AS_ANOTHER = 0.8, 0.1


@dataclass(frozen=True, slots=True)
class Masked:
    """A token to be predicted.

    Attributes:
        window: The window that it is in.
        place: Where in the window.
        shown: The number of the token that the model is shown there.
    """

    window: int
    place: int
    shown: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskRule:
    """How to mask.

    Attributes:
        share: Of the units of a text.
        mask: Number of the token that stands for a masked one.
        others: Numbers of the tokens that may be shown instead of the true one.
    """

    share: float
    mask: int
    others: Sequence[int]


def number_units(
    words: Sequence[int | None], allowed: Sequence[bool], *, whole_words: bool
) -> list[int]:
    """Return the number of the unit of each token.

    A word is what neighbouring tokens with the same number belong to; tokens that are not allowed
    belong to no unit, and those on both sides of them not to the same.

    Args:
        words: Number of the word of each token; None for special tokens.
        allowed: Whether a token may be masked.
        whole_words: Whether words of at most `MOST_TOKENS` tokens are units; else tokens are.

    >>> number_units([None, 0, 0, 1], [True] * 4, whole_words=True)
    [-1, 0, 0, 1]
    >>> number_units([None, 0, 0, 1], [True] * 4, whole_words=False)
    [-1, 0, 1, 2]
    """
    sizes = Counter(words)
    units: list[int] = []
    count, before = 0, None
    for word, may_be in zip(words, allowed, strict=True):
        if word is None or not may_be:
            units.append(NEVER)
            before = None
            continue
        if not (whole_words and word == before and sizes[word] <= MOST_TOKENS):
            count += 1
        units.append(count - 1)
        before = word
    return units


def cut_windows(units: Sequence[int], *, size: int) -> list[tuple[int, int]]:
    """Return (first token, one behind the last) of windows that hold all tokens, one at least.

    Each is as long as it can be without cutting a unit.

    >>> cut_windows([0, 1, 1, 2], size=2)
    [(0, 1), (1, 3), (3, 4)]
    """
    windows, first = [], 0
    while len(units) - first > size:
        end = first + size
        while end > first + 1 and units[end] != NEVER and units[end] == units[end - 1]:
            end -= 1
        windows.append((first, end))
        first = end
    return [*windows, (first, len(units))]


def draw_masks(
    ids: Sequence[Sequence[int]], units: Sequence[Sequence[int]], *, rule: MaskRule, key: str
) -> list[Masked]:
    """Choose round(share * units) units of a text, one at least, and what is shown for them.

    Of the chosen tokens 80 % are shown as the mask token, 10 % as any other token, and 10 % as
    they are.

    Args:
        ids: Numbers of the tokens of each window.
        units: Numbers of their units.
        rule: How to mask.
        key: What is drawn depends on this text, and on nothing else.
    """
    count = 1 + max((unit for window in units for unit in window), default=NEVER)
    if not count:
        return []
    draw = random.Random(key)
    chosen = set(draw.sample(range(count), max(1, round(rule.share * count))))
    masked = []
    for number, (window, own) in enumerate(zip(units, ids, strict=True)):
        for place, unit in enumerate(window):
            if unit not in chosen:
                continue
            luck = draw.random()
            shown = own[place]
            if luck < _SHOWN_AS_MASK:
                shown = rule.mask
            elif luck < _SHOWN_AS_MASK + _SHOWN_AS_ANOTHER:
                shown = draw.choice(rule.others)
            masked.append(Masked(number, place, shown))
    return masked
