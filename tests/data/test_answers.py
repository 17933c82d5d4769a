import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.data.answers import answers_of, check_answers, row_answers, squad_rows
from lora_cli.data.files import read_file
from lora_cli.data.types import Row
from lora_cli.errors import UserError

CONTEXT = "Panthers gave up 308 points, 308 in all. 北京 "
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Panthers",
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [
                        {
                            "id": "a1",
                            "question": "How many points?",
                            "answers": [{"text": "308", "answer_start": 17}],
                            "is_impossible": False,
                        },
                        {"id": "a2", "question": "Who?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        },
        {"paragraphs": [{"context": "b", "qas": [{"id": "a3", "question": "c", "answers": []}]}]},
    ],
}


def row(number: int, **values: Any) -> Row:
    return Row(str(number), {"context": CONTEXT, **values}, "rows.jsonl", number)


def check(*rows: Row, start: str | None = None) -> Any:
    return check_answers(rows, context="context", answers="answers", start=start)


@given(st.lists(st.tuples(st.text(min_size=1), st.integers(-5, 10**6)), max_size=4))
def test_both_layouts_say_the_same(answers: list[tuple[str, int]]) -> None:
    columns = {"text": [text for text, _ in answers], "answer_start": [n for _, n in answers]}
    objects = [{"text": text, "answer_start": n, "more": 1} for text, n in answers]
    assert answers_of(columns) == answers_of(objects) == tuple(answers)
    if len(answers) == 1:
        ((text, place),) = answers
        assert answers_of({"text": text, "answer_start": place}) == tuple(answers)
        assert answers_of(text, place) == answers_of(text, float(place)) == tuple(answers)


@pytest.mark.parametrize(
    ("value", "start"),
    [
        ({"text": ["a"], "answer_start": []}, None),
        ({"text": ["a"]}, None),
        ({"text": ["", "a"], "answer_start": [0, 0]}, None),
        ({"text": [3], "answer_start": [0]}, None),
        ({"text": ["a"], "answer_start": [True]}, None),
        ({"text": ["a"], "answer_start": [0.5]}, None),
        ({}, None),
        (["a"], 0),
        (["a", {"text": "a", "answer_start": 0}], None),
        ("a", None),
        ("a", "first"),
        ("a", "-1"),
        (3, 0),
    ],
)
def test_what_is_no_answer(value: Any, start: Any) -> None:
    assert answers_of(value, start) is None


@pytest.mark.parametrize("value", [None, "", [], {"text": [], "answer_start": []}])
def test_a_question_without_an_answer(value: Any) -> None:
    assert answers_of(value) == ()
    assert row_answers(row(1, answers=value), "answers", None) == ()
    assert row_answers(row(1), "answers", None) is None


def test_columns_of_csv() -> None:
    found = row_answers(row(1, answers="308", begin=" 17"), "answers", "begin")
    assert found == (("308", 17),)
    assert (
        check(row(1, answers="308", begin="17"), row(2, answers="", begin=""), start="begin") == []
    )


def test_answers_stand_where_they_say() -> None:
    right = [{"text": "308", "answer_start": n} for n in (17, 29)]
    assert check(row(1, answers=right), row(2, answers=[])) == []
    wrong = [
        row(3, answers={"text": ["308", "308"], "answer_start": [17, 28]}),
        row(4, answers=[{"text": "Bears", "answer_start": 0}]),
        row(5, answers=[{"text": "Panthers", "answer_start": -46}]),
        row(6, answers=[{"text": " ", "answer_start": 8}]),
        row(7, answers=[{"text": "北京", "answer_start": 43}]),
    ]
    (problem,) = check(row(1, answers=right), *wrong)
    assert problem.id == "data.answer-elsewhere"
    assert problem.message == (
        "`answers` must hold texts that stand in `context` where they say, but does not in 5 rows."
    )
    assert problem.where == (
        'rows.jsonl row 3 ("308" is not at 28 but at 29), '
        'rows.jsonl row 4 ("Bears" is not at 0 but nowhere), '
        'rows.jsonl row 5 ("Panthers" is not at -46 but at 0), '
        "rows.jsonl row 6 (an answer of white space), "
        'rows.jsonl row 7 ("北京" is not at 43 but at 41)'
    )


def test_unreadable_answers_are_named_with_those_elsewhere() -> None:
    rows = [row(n, answers=5) for n in range(1, 13)]
    first, second = check(*rows, row(13), row(14, answers=[{"text": "x", "answer_start": 0}]))
    assert first.id == "data.bad-answers"
    assert "in 13 rows" in first.message
    assert first.where.startswith("rows.jsonl row 1 (5), ")
    assert first.where.endswith("row 10 (5) and 3 more")
    assert second.where == 'rows.jsonl row 14 ("x" is not at 0 but nowhere)'


def test_a_file_of_squad_is_read(tmp_path: Path) -> None:
    path = tmp_path / "dev-v2.0.json"
    path.write_text(json.dumps(SQUAD), encoding="utf-8")
    rows = read_file(path)
    assert [item.id for item in rows] == ["a1", "a2", "a3"]
    assert rows[1].where == f"{path} row 2"
    assert rows[0].values["title"] == "Panthers"
    assert "title" not in rows[2].values
    assert check(*rows) == []
    found = [row_answers(item, "answers", None) for item in rows]
    assert found == [(("308", 17),), (), ()]


@pytest.mark.parametrize(
    "document",
    [
        [{"data": []}],
        {"data": 3},
        {"data": [{"context": "a"}]},
        {"data": [{"paragraphs": [{"context": "a", "qas": ["b"]}]}]},
        {"rows": []},
    ],
)
def test_other_documents_are_not_taken_for_squad(document: Any, tmp_path: Path) -> None:
    assert squad_rows(document) is None
    if isinstance(document, dict):
        path = tmp_path / "x.json"
        path.write_text(json.dumps(document))
        with pytest.raises(UserError, match=re.escape("must hold one JSON list of objects")):
            read_file(path)
