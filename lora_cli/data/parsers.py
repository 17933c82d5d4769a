"""Text layouts, parsed from a stream of bytes into numbered rows, one at a time.

Each parser yields ``(row number, values)`` pairs and raises `BadRowError` where the bytes do not
fit the layout. None of them reads ahead further than the row that it yields, except json, which
is one value and therefore read whole.
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

from lora_cli.data.answers import squad_rows
from lora_cli.data.coco import coco_rows

Values = dict[str, Any]
Numbered = tuple[int, Values]

_BETWEEN = re.compile(r"[ \t]+")
_DOCUMENT = "-DOCSTART-"
_BOM = b"\xef\xbb\xbf"


class BadRowError(Exception):
    """A row does not fit the layout of its file.

    Attributes:
        number: Row number counted from 1, or None when the file as a whole is at fault.
        rule: What the file must hold.
        finding: What was found instead, without a full stop.
        fix: What to do.
    """

    def __init__(self, number: int | None, *, rule: str, finding: str, fix: str) -> None:
        self.number = number
        self.rule = rule
        self.finding = finding
        self.fix = fix
        super().__init__(finding)


def _decode(raw: bytes, number: int, *, first: bool) -> str:
    if first and raw.startswith(_BOM):
        raw = raw[len(_BOM) :]
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError(
            number,
            rule="must be UTF-8 text",
            finding=f"has the byte 0x{raw[error.start]:02x} at byte {error.start + 1}",
            fix="save the file as UTF-8: iconv -f latin1 -t utf-8 FILE > NEW",
        ) from None
    if "\0" in text:
        raise BadRowError(
            number,
            rule="must be UTF-8 text",
            finding=f"has a NUL character at column {text.index(chr(0)) + 1}",
            fix="save the file as UTF-8 without NUL characters",
        )
    return text


def _iter_lines(stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(stream, start=1):
        yield number, _decode(raw, number, first=number == 1)


class _NotStrictJsonError(ValueError):
    """Something that Python's parser accepts and JSON or Unicode does not."""


def _unique(pairs: list[tuple[str, Any]]) -> Values:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _NotStrictJsonError(f'has the key "{twice}" twice')
    return values


def _refuse_constant(name: str) -> Any:
    raise _NotStrictJsonError(f"holds {name}, which JSON does not have (write null)")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _check_characters(value: Any) -> None:
    """Refuse what an escape can smuggle past the decoding of bytes: NUL and half characters."""
    if isinstance(value, str):
        if "\0" in value:
            raise _NotStrictJsonError("has a NUL character (\\u0000)")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise _NotStrictJsonError("has half of a character (a lone surrogate such as \\ud83d)")
    elif isinstance(value, list):
        for item in value:
            _check_characters(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_characters(name)
            _check_characters(item)


def _parse_json(text: str) -> Any:
    """Parse one JSON value.

    Raises:
        ValueError: With a finding that fits after the name of the row.
    """
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:
            _check_characters(value)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        reason = error.msg[:1].lower() + error.msg[1:]
        raise ValueError(f"is not valid JSON ({reason}, {line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    return value


def iter_jsonl(stream: IO[bytes]) -> Iterator[Numbered]:
    """Yield the objects of a JSON Lines stream; the row number is the line number."""
    rule = "must hold one JSON object a line"
    for number, line in _iter_lines(stream):
        text = line.strip()
        if not text:
            continue
        try:
            value = _parse_json(text)
        except ValueError as error:
            fix = "correct or remove the row; json.dumps of one object a line writes this layout"
            raise BadRowError(number, rule=rule, finding=str(error), fix=fix) from None
        if not isinstance(value, dict):
            fix = 'write each row as an object, such as {"text": "...", "label": "..."}'
            finding = f"is {_kind(value)}"
            raise BadRowError(number, rule=rule, finding=finding, fix=fix)
        yield number, value


def iter_json(stream: IO[bytes]) -> Iterator[Numbered]:
    """Yield the objects of a JSON list; the row number is the place in the list.

    The questions of a file in the layout of SQuAD are such a list too, and so are the images of
    one in the layout of COCO.
    """
    rule = "must hold one JSON list of objects"
    text = "".join(line for _, line in _iter_lines(stream))
    if not text.strip():
        return
    try:
        value = _parse_json(text)
    except ValueError as error:
        fix = "correct the file"
        if "extra data" in str(error):
            fix = "one object a line is the jsonl layout: rename the file to .jsonl"
        raise BadRowError(None, rule=rule, finding=str(error), fix=fix) from None
    value = squad_rows(value) or coco_rows(value) or value
    if not isinstance(value, list):
        fix = 'write [{"text": "...", "label": "..."}, ...]'
        raise BadRowError(None, rule=rule, finding=f"is {_kind(value)}", fix=fix)
    for number, item in enumerate(value, start=1):
        if not isinstance(item, dict):
            fix = 'write each row as an object, such as {"text": "...", "label": "..."}'
            raise BadRowError(number, rule=rule, finding=f"is {_kind(item)}", fix=fix)
        yield number, item


def _iter_records(stream: IO[bytes], *, delimiter: str, rule: str) -> Iterator[list[str]]:
    """Yield the records of a csv or tsv stream that are not blank lines."""
    # The module's default would refuse a long document; the limit is global to the module.
    csv.field_size_limit(sys.maxsize)
    lines = (line for _, line in _iter_lines(stream))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    count = -1
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except BadRowError as error:
            # The number was that of a line; a record may span several.
            error.number = max(count + 1, 1)
            error.finding += f" (line {reader.line_num + 1})"
            raise
        except csv.Error as error:
            raise BadRowError(
                max(count + 1, 1),
                rule=rule,
                finding=f"cannot be read ({error}, line {reader.line_num})",
                fix='put the value in quotation marks and double those inside it: "say ""hi"""',
            ) from None
        if record:
            count += 1
            yield record


def _check_header(header: list[str], *, rule: str) -> None:
    if "" in (name.strip() for name in header):
        place = next(i for i, name in enumerate(header, start=1) if not name.strip())
        finding = f"has no name for column {place}"
    elif len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        finding = f'has two columns called "{twice}"'
    else:
        return
    raise BadRowError(None, rule=rule, finding=finding, fix="give each column one name of its own")


def _iter_table(stream: IO[bytes], *, delimiter: str) -> Iterator[Numbered]:
    rule = "must start with a line of column names and have as many values in every row"
    records = _iter_records(stream, delimiter=delimiter, rule=rule)
    header = next(records, None)
    if header is None:
        return
    _check_header(header, rule=rule)
    for number, record in enumerate(records, start=1):
        if len(record) != len(header):
            raise BadRowError(
                number,
                rule=rule,
                finding=f"has {len(record)} values for {len(header)} columns",
                fix="put values that hold the separator or a line break in quotation marks",
            )
        yield number, dict(zip(header, record, strict=True))


def iter_csv(stream: IO[bytes]) -> Iterator[Numbered]:
    """Yield the rows of a comma-separated stream with a header line; all values are texts."""
    return _iter_table(stream, delimiter=",")


def iter_tsv(stream: IO[bytes]) -> Iterator[Numbered]:
    """Yield the rows of a tab-separated stream with a header line; all values are texts."""
    return _iter_table(stream, delimiter="\t")


def iter_txt(stream: IO[bytes]) -> Iterator[Numbered]:
    """Yield one text a line, as column "text"; blank lines count as lines and yield nothing."""
    for number, line in _iter_lines(stream):
        if line.strip():
            yield number, {"text": line.rstrip("\r\n")}


def iter_conll(stream: IO[bytes]) -> Iterator[Numbered]:
    """Yield the sentences of a stream with a word a line and blank lines between sentences.

    Columns are parted by tabs where a line has some, else by spaces: column "tokens" is the first,
    "tags" the last, and those between go by their numbers, "2", "3", .... The row number is that of
    the sentence's first line. Lines that start a document (-DOCSTART-) are no words.
    """
    start, width = 0, 0
    sentence: list[list[str]] = []
    for number, line in _iter_lines(stream):
        is_word = line.strip() != "" and not line.startswith(_DOCUMENT)
        if not is_word:
            if sentence:
                yield start, _columns(sentence)
            sentence = []
            continue
        start = start if sentence else number
        sentence.append(_cells(line, start, number, width=width))
        width = len(sentence[-1])
    if sentence:
        yield start, _columns(sentence)


def _cells(line: str, start: int, number: int, *, width: int) -> list[str]:
    """Return the columns of a line, which are `width` unless that is 0."""
    plain = line.strip("\r\n")
    if "\t" in plain:
        cells = [cell.strip(" ") for cell in plain.split("\t")]
    else:
        cells = _BETWEEN.split(plain.strip(" "))
    if width and len(cells) != width:
        lines = "1 column" if len(cells) == 1 else f"{len(cells)} columns"
        finding = f"has {lines} where the lines before have {width} (line {number})"
    elif "" in cells:
        finding = f"has nothing in column {cells.index('') + 1} (line {number})"
    else:
        return cells
    raise BadRowError(
        start,
        rule="must have a word and its tag a line, and blank lines between sentences",
        finding=finding,
        fix="correct the line: as many columns in each, parted by a tab or by spaces",
    )


def _columns(sentence: list[list[str]]) -> Values:
    first, *others = (list(column) for column in zip(*sentence, strict=True))
    numbers = range(2, len(others) + 1)
    names = [*(str(number) for number in numbers), "tags"] if others else []
    return {"tokens": first, **dict(zip(names, others, strict=True))}


def _kind(value: Any) -> str:
    kinds = {str: "a text", bool: "true or false", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), "a number")


PARSERS: dict[str, Callable[[IO[bytes]], Iterator[Numbered]]] = {
    "jsonl": iter_jsonl,
    "json": iter_json,
    "csv": iter_csv,
    "tsv": iter_tsv,
    "txt": iter_txt,
    "conll": iter_conll,
}
