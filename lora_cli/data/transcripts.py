"""Transcripts of speech: made alike before they are learned and scored, and spelled by letters."""

import unicodedata
from collections.abc import Iterable, Sequence

BLANK, UNKNOWN, SPACE = "<pad>", "<unk>", "|"
SPECIAL = (BLANK, UNKNOWN, SPACE)
_APOSTROPHES = "'\u2019"


def normalize(text: str, how: str) -> str:
    r"""Return a text as it is learned and scored.

    Args:
        text: As in the data.
        how: "basic" takes compatible characters as one (NFKC), lower case, and drops punctuation
            and symbols but apostrophes within words; "none" keeps all that. Either makes all white
            space one space, and takes away that of the ends.

    >>> normalize("Don\u2019t \u2013  STOP, 2\u00bd!", "basic")
    "don't stop 21 2"
    >>> normalize(" Don't  stop! ", "none")
    "Don't stop!"
    """
    if how == "basic":
        text = unicodedata.normalize("NFKC", text).lower()
        text = "".join(_kept(text, place) for place in range(len(text)))
    return " ".join(text.replace(SPACE, " ").split())


def _kept(text: str, place: int) -> str:
    """Return the character of a place, or a space where it is punctuation or a symbol."""
    character = text[place]
    if unicodedata.category(character)[0] not in "PS":
        return character
    around = text[place - 1 : place] + text[place + 1 : place + 2]
    is_inside = len(around) == 2 and around.isalnum()
    return "'" if character in _APOSTROPHES and is_inside else " "


def build_vocabulary(texts: Iterable[str]) -> list[str]:
    """Return the letters of normalized texts in order of their code points, after `SPECIAL`."""
    return [*SPECIAL, *sorted({letter for text in texts for letter in text if letter != " "})]


def spell(text: str, vocabulary: Sequence[str]) -> list[int]:
    """Return the number of each letter of a normalized text; unknown ones have that of UNKNOWN."""
    numbers = {letter: number for number, letter in enumerate(vocabulary)}
    numbers[" "] = numbers[SPACE]
    return [numbers.get(letter, numbers[UNKNOWN]) for letter in text]


def read_spelling(path: Sequence[int], vocabulary: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the words of the best number at each moment, with their first moment and their last.

    Equal neighbours are one letter, and the blank between two letters parts them (Graves et al.
    2006, section 3.1).

    >>> read_spelling([3, 3, 0, 3, 2, 4, 0], ["<pad>", "<unk>", "|", "a", "b"])
    [('aa', 0, 3), ('b', 5, 5)]
    """
    words: list[tuple[str, int, int]] = []
    word, start, end, before = "", 0, 0, -1
    for moment, number in enumerate(path):
        letter = vocabulary[number]
        if letter == SPACE:
            if word:
                words.append((word, start, end))
            word = ""
        elif letter not in SPECIAL:
            start = start if word else moment
            end = moment
            word += letter if number != before else ""
        before = number
    return [*words, (word, start, end)] if word else words
