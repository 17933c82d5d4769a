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
