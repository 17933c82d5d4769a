from typing import Any

import pytest

from lora_cli.config.tasks import DataConfig
from lora_cli.data.messages import (
    check_messages,
    made_up_rows,
    one_layout,
    put_before_question,
    read_documents,
    read_messages,
)
from lora_cli.data.types import Row

NONE = dict.fromkeys(("messages", "prompt", "input", "completion", "system", "documents"))
USER, SAYS = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def row(**values: Any) -> Row:
    return Row("1", values, "f.jsonl", 3)


def read(columns: dict[str, str], *, answering: bool = False, **values: Any) -> Any:
    return read_messages(row(**values), {**NONE, **columns}, answering=answering)


MESSAGES = {"messages": "m"}
ALPACA = {"prompt": "instruction", "input": "input", "completion": "output"}


def test_every_layout_gives_the_same_messages() -> None:
    listed = read(MESSAGES, m=[USER, SAYS])
    shared = read(MESSAGES, m=[{"from": "human", "value": "a"}, {"from": "GPT", "value": "b"}])
    parts = read(MESSAGES, m=[{"role": "user", "content": [{"type": "text", "text": "a"}]}, SAYS])
    pair = read({"prompt": "p", "completion": "c"}, p="a", c="b")
    alpaca = read(ALPACA, instruction="a", input="", output="b")
    # As a Parquet file has them in which rows of both layouts were put together.
    padded = read(
        MESSAGES,
        m=[{**USER, "from": None, "value": None},
           {"role": None, "content": None, "from": "gpt", "value": "b"}],
    )  # fmt: skip
    assert listed == shared == parts == pair == alpaca == padded == [USER, SAYS]


def test_an_input_goes_below_the_prompt() -> None:
    found = read(ALPACA, instruction="a", input="x", output="b")
    assert found[0]["content"] == "a\n\nx"
    assert read(ALPACA, instruction="a", input=None, output="b")[0] == USER


def test_a_system_prompt_of_the_row_comes_first_unless_there_is_one() -> None:
    columns = {**MESSAGES, "system": "s"}
    system = {"role": "system", "content": "be brief"}
    assert read(columns, m=[USER, SAYS], s="be brief") == [system, USER, SAYS]
    own = {"role": "developer", "content": "own"}
    assert read(columns, m=[own, USER, SAYS], s="x")[0] == {"role": "system", "content": "own"}
    assert read(columns, m=[USER, SAYS], s=" ") == [USER, SAYS]
    assert read(columns, m=[USER, SAYS]) == [USER, SAYS]


def test_the_last_answer_is_left_out_where_it_is_to_be_predicted() -> None:
    assert read(MESSAGES, answering=True, m=[USER, SAYS, USER, SAYS]) == [USER, SAYS, USER]
    assert read(MESSAGES, answering=True, m=[USER]) == [USER]
    assert read({"prompt": "p"}, p="a") == [USER]


def test_calls_of_tools_are_kept() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "weight": 1}
    told = {"role": "function", "content": "12", "tool_call_id": "x"}
    found = read(MESSAGES, m=[USER, called, told, SAYS])
    assert found[1] == {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    assert found[2] == {"role": "tool", "content": "12", "tool_call_id": "x"}
    assert not check_messages([row(m=[USER, called, told, SAYS])], {**NONE, **MESSAGES},
                              answering=False)  # fmt: skip


BAD: dict[str, tuple[Any, str, str]] = {
    "null": (None, "bad-messages", "null"),
    "text": ("a", "bad-messages", "a text"),
    "empty": ([], "bad-messages", "empty"),
    "a message that is a text": ([USER, "b"], "bad-messages", "message 2 is a text"),
    "no content": ([{"role": "user"}, SAYS], "bad-messages", "content of message 1: null"),
    "an image": (
        [{"role": "user", "content": [{"type": "image"}]}, SAYS],
        "bad-messages",
        "content of message 1: parts of which one is no text",
    ),
    "role": ([{"role": "robot", "content": "x"}], "unknown-role", 'message 1: "robot"'),
    "no role": ([{"content": "x"}], "unknown-role", "message 1: null"),
    "empty answer": ([USER, {"role": "assistant", "content": " \n"}], "empty-answer", "message 2"),
    "null answer": ([USER, {"role": "assistant"}], "empty-answer", "content of message 2: null"),
    "no answer": ([USER], "no-assistant", "f.jsonl row 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_conversations_are_named(name: str) -> None:
    value, kind, finding = BAD[name]
    rows = [row(m=[USER, SAYS]), row(m=value)]
    (problem,) = check_messages(rows, {**NONE, **MESSAGES}, answering=False)
    assert problem.id == f"data.{kind}"
    assert "f.jsonl row 3" in str(problem.where)
    assert finding in str(problem.where)
    assert problem.fix
    assert "{{" not in str(problem.allowed)
    assert "1 row does not" in problem.message


def test_all_rules_are_reported_at_once() -> None:
    values = (value for value, _, _ in BAD.values())
    problems = check_messages([row(m=v) for v in values], {**NONE, **MESSAGES}, answering=False)
    assert {p.id for p in problems} == {f"data.{kind}" for _, kind, _ in BAD.values()}


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"output": "b"}, "bad-prompt"),
        ({"instruction": " ", "output": "b"}, "bad-prompt"),
        ({"instruction": "a", "input": 3, "output": "b"}, "bad-prompt"),
        ({"instruction": "a", "output": ""}, "empty-answer"),
        ({"instruction": "a"}, "empty-answer"),
    ],
)
def test_bad_prompts_and_answers(values: dict[str, Any], kind: str) -> None:
    (problem,) = check_messages([row(**values)], {**NONE, **ALPACA}, answering=False)
    assert problem.id == f"data.{kind}"


def test_a_system_prompt_that_is_no_text_is_not_passed_over() -> None:
    columns = {**NONE, **MESSAGES, "system": "s"}
    (problem,) = check_messages([row(m=[USER, SAYS], s=3)], columns, answering=False)
    assert (problem.id, problem.where) == ("data.bad-system", "f.jsonl row 3 (a number)")


def test_what_is_to_be_answered_needs_a_question() -> None:
    system = {"role": "system", "content": "s"}
    for value in ([SAYS], [system], [system, SAYS]):
        (problem,) = check_messages([row(m=value)], {**NONE, **MESSAGES}, answering=True)
        assert problem.id == "data.no-question"
    assert not check_messages([row(m=[USER])], {**NONE, **MESSAGES}, answering=True)


def test_passages_are_read() -> None:
    plain, titled = {"title": "", "text": "x"}, {"title": "t", "text": "x"}
    assert read_documents(row(d=["x"]), "d") == [plain]
    assert read_documents(row(d="x"), "d") == [plain]
    assert read_documents(row(d=[{"title": "t", "content": "x"}]), "d") == [titled]
    assert read_documents(row(d=[{"text": "x", "score": 1}]), "d") == [plain]
    assert read_documents(row(d=None), "d") == read_documents(row(), "d") == []
    assert read_documents(row(d=["x"]), None) == []


@pytest.mark.parametrize("value", [[1], [{"text": 1}], [{"title": "t"}], {"a": 1}, 5, [None]])
def test_bad_passages_are_named(value: Any) -> None:
    columns = {**NONE, **MESSAGES, "documents": "d"}
    (problem,) = check_messages([row(m=[USER, SAYS], d=value)], columns, answering=False)
    assert problem.id == "data.bad-documents"


def test_passages_go_before_the_last_question() -> None:
    asked = [USER, SAYS, USER, SAYS]
    found = put_before_question(asked, [{"title": "t", "text": "x"}, {"title": "", "text": "y"}])
    assert [m["content"] for m in found] == ["a", "b", "[1] t\nx\n\n[2] y\n\na", "b"]
    assert asked == [USER, SAYS, USER, SAYS]
    assert USER["content"] == "a"
    assert put_before_question(asked, []) == asked


@pytest.mark.parametrize(
    "named",
    [
        {},
        {"messages_column": "talk"},
        {"prompt_column": "q", "completion_column": "a"},
        {"prompt_column": "q", "completion_column": "a", "input_column": "i"},
    ],
)
def test_made_up_rows_are_conversations(named: dict[str, str]) -> None:
    found = [row(**values) for values in made_up_rows(DataConfig(**named), 5)]
    asked = {name.removesuffix("_column"): column for name, column in named.items()}
    columns = {**NONE, **(asked or MESSAGES | {"messages": "messages"})}
    assert len(found) == 5
    assert not check_messages(found, columns, answering=False)
    assert len({str(read_messages(one, columns)) for one in found}) == 5


def test_messages_go_before_prompts() -> None:
    columns = {**NONE, **ALPACA, "system": "s"}
    assert one_layout(columns) == columns
    both = one_layout({**columns, **MESSAGES})
    assert {name for name, column in both.items() if column} == {"messages", "system"}
