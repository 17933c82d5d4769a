"""Values that stand in for data that cannot be reached: what a column of a made-up row holds.

Each function takes the settings of a task and the number of the row, and gives its value, always
the same one; None leaves the column out. Bytes are those of a file, whose path the column holds.
"""

import random
from collections.abc import Mapping
from typing import Any

_WORDS = (
    *("the", "a", "small", "old", "green", "quiet", "river", "market", "letter", "teacher"),
    *("window", "garden", "music", "winter", "journey", "finds", "carries", "opens", "paints"),
    *("follows", "remembers", "near", "under", "after", "without", "slowly", "today", "again"),
)
_ROWS_OF_A_USER = 4


def sentence(number: int, *, words: int = 10) -> str:
    """Return a text without meaning, another for each number.

    >>> sentence(0, words=4), sentence(1, words=4)
    ('green river letter window', 'quiet letter garden journey')
    """
    start, step = 4 + number, 2 + number % 5
    return " ".join(_WORDS[(start + place * step) % len(_WORDS)] for place in range(words))


def text(config: Any, number: int) -> str:
    """Return a sentence."""
    del config
    return f"{sentence(number)}."


def word(config: Any, number: int) -> str:
    """Return one word."""
    del config
    return sentence(number, words=1)


def second_text(config: Any, number: int) -> str:
    """Return another sentence than `text` does."""
    return text(config, number + 1)


def label(config: Any, number: int) -> str:
    """Return one of the labels that the settings name, or that they have answers for, or of two."""
    answers = getattr(config, "answers", None)
    named = tuple(answers) if isinstance(answers, Mapping) else ()
    names = config.data.label_names or named or ("first", "second")
    return str(names[number % len(names)])


def labels(config: Any, number: int) -> list[str]:
    """Return some of these labels, or none."""
    return [label(config, number)] * (number % 3 > 0)


def picture(config: Any, number: int) -> bytes:
    """Return a PNG of random dots, darker or lighter by its label."""
    del config
    from io import BytesIO

    from PIL import Image

    content, size = BytesIO(), (24 + number % 5, 20)
    dots = random.Random(number).randbytes(3 * size[0] * size[1])
    shade = 255 * (number % 2)
    picture = Image.blend(
        Image.frombytes("RGB", size, dots), Image.new("RGB", size, (shade, shade, shade)), 0.3
    )
    picture.save(content, "PNG")
    return content.getvalue()


def mask(config: Any, number: int) -> bytes:
    """Return a PNG as large as that of `picture`: the last class, and the first at its left."""
    from io import BytesIO

    from PIL import Image

    content, size = BytesIO(), (24 + number % 5, 20)
    first = int(config.zero_is_ignored)
    last = first + max(1, len(config.data.label_names or ()) - 1)
    classes = Image.new("L", size, last)
    classes.paste(first, (0, 0, size[0] // 2, size[1]))
    classes.save(content, "PNG")
    return content.getvalue()


def objects(config: Any, number: int) -> dict[str, Any]:
    """Return one or two boxes inside of `picture`, in the format of the settings."""
    has_corners = config.box_format == "corners"
    boxes, names = [], []
    for place in range(1 + number % 2):
        left, top, width, height = 1 + 12 * place, 3, 9, 12
        boxes.append([left, top, width + has_corners * left, height + has_corners * top])
        names.append(label(config, number + place))
    return {"bbox": boxes, "category": names}


def sound(config: Any, number: int) -> bytes:
    """Return a WAV file of half a second, a tone with some noise, low or high by its label."""
    del config
    import math
    import wave
    from io import BytesIO

    rate, content, draw = 8000, BytesIO(), random.Random(number)
    pitch = 2 * math.pi * (300 + 500 * (number % 2)) / rate
    samples = [
        round(8000 * math.sin(pitch * place) + draw.uniform(-2000, 2000))
        for place in range(rate // 2 + number % 5)
    ]
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(b"".join(value.to_bytes(2, "little", signed=True) for value in samples))
    return content.getvalue()


def score(config: Any, number: int) -> float:
    """Return a number from 0 to 4."""
    del config
    return float(number % 5)


def tokens(config: Any, number: int) -> list[str]:
    """Return the words of a sentence."""
    del config
    return sentence(number).split()


def tags(config: Any, number: int) -> list[str]:
    """Return a tag for each word of `tokens`, of those that the settings name or of entities."""
    names = config.data.label_names or ("O", "B-thing", "I-thing")
    return [str(names[place % len(names)]) for place in range(len(tokens(config, number)))]


def answers(config: Any, number: int) -> Any:
    """Return the third word of `text`, with its place unless that has a column of its own."""
    word = sentence(number).split()[2]
    if config.data.answer_start_column is not None:
        return word
    return {"text": [word], "answer_start": [_place(number)]}


def answer_start(config: Any, number: int) -> int | None:
    """Return the place of the answer, where it has a column."""
    return None if config.data.answer_start_column is None else _place(number)


def _place(number: int) -> int:
    first, second, *_ = sentence(number).split()
    return len(first) + len(second) + 2


def choices(config: Any, number: int) -> Any:
    """Return a list of texts, with keys where the answers are such."""
    texts = [sentence(number + place, words=3) for place in range(_count(config))]
    return {"text": texts, "label": _keys(config)} if config.answers == "key" else texts


def answer(config: Any, number: int) -> Any:
    """Return which of `choices` is right, as the settings say that answers are written."""
    place = number % _count(config)
    kinds = {
        "index": place,
        "number": place + 1,
        "letter": chr(ord("A") + place),
        "key": _keys(config)[place],
    }
    return kinds.get(config.answers, sentence(number + place, words=3))


def _count(config: Any) -> int:
    return len(config.data.choice_columns or ("one", "two", "three"))


def _keys(config: Any) -> list[str]:
    return [f"key {place}" for place in range(_count(config))]


def user(config: Any, number: int) -> str:
    """Return a user, who has several rows."""
    del config
    return f"user {number // _ROWS_OF_A_USER}"


def click(config: Any, number: int) -> int:
    """Return 1 for one of the rows of a user."""
    del config
    return int(number % _ROWS_OF_A_USER == 0)


def time(config: Any, number: int) -> int:
    """Return the number of the row."""
    del config
    return number


def candidate(config: Any, number: int) -> str | None:
    """Return one of the labels of zero-shot classification, where there are some."""
    labels = config.zero_shot.labels
    return None if labels is None else str(labels[number % len(labels)])
