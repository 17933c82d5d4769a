import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.data.parsers import PARSERS, BadRowError

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(TEXT, VALUES, max_size=4), max_size=5), st.booleans())
def test_jsonl_and_json_read_what_the_standard_library_wrote(rows, ascii_only):
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    assert [row for _, row in PARSERS["jsonl"](io.BytesIO(lines.encode()))] == rows
    whole = json.dumps(rows, ensure_ascii=ascii_only)
    assert [row for _, row in PARSERS["json"](io.BytesIO(whole.encode()))] == rows


@pytest.mark.parametrize("layout", sorted(PARSERS))
@given(content=st.binary(max_size=80))
def test_any_bytes_give_rows_or_a_bad_row(layout, content):
    rows, faults = [], []
    try:
        rows += PARSERS[layout](io.BytesIO(content))
    except BadRowError as error:
        faults.append(error)
    assert all(number >= 1 and all(isinstance(name, str) for name in row) for number, row in rows)
    assert all(fault.rule.startswith("must ") and fault.fix for fault in faults)


def sentences(text):
    return list(PARSERS["conll"](io.BytesIO(text.encode())))


@pytest.mark.parametrize("between", [" ", "\t", "   "])
def test_conll_has_a_word_a_line_and_blank_lines_between_sentences(between):
    lines = ["-DOCSTART- -X- -X- O", "", "U.N. NNP I-NP B-ORG", "official NN I-NP O", "", ""]
    lines.append("Ok UH O O")
    found = sentences("\n".join(line.replace(" ", between) for line in lines))
    first = {
        "tokens": ["U.N.", "official"],
        "2": ["NNP", "NN"],
        "3": ["I-NP", "I-NP"],
        "tags": ["B-ORG", "O"],
    }
    second = {"tokens": ["Ok"], "2": ["UH"], "3": ["O"], "tags": ["O"]}
    assert found == [(3, first), (7, second)]


def test_conll_keeps_quotes_hashes_and_spaces_inside_tabs():
    found = sentences('"\tO\n#tag\tB-X\nNew York\tB-LOC\r\n\r\n北\tO\r\n')
    assert [row for _, row in found] == [
        {"tokens": ['"', "#tag", "New York"], "tags": ["O", "B-X", "B-LOC"]},
        {"tokens": ["北"], "tags": ["O"]},
    ]


def test_conll_of_words_alone_has_no_tags():
    assert sentences("a\nb\n\nc") == [(1, {"tokens": ["a", "b"]}), (4, {"tokens": ["c"]})]


@pytest.mark.parametrize(
    ("text", "number", "finding"),
    [
        ("a O\n\nb O\nc\n", 3, "has 1 column where the lines before have 2 (line 4)"),
        ("a O\n\nb X O\n", 3, "has 3 columns where the lines before have 2 (line 3)"),
        ("a\tO\nb\t\n", 1, "has nothing in column 2 (line 2)"),
        ("\tO\n", 1, "has nothing in column 1 (line 1)"),
    ],
)
def test_conll_names_the_line_that_does_not_fit(text, number, finding):
    with pytest.raises(BadRowError) as caught:
        sentences(text)
    assert (caught.value.number, caught.value.finding) == (number, finding)
