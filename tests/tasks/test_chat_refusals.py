import dataclasses

import pytest

from lora_cli.data.types import Row
from lora_cli.errors import Problem
from lora_cli.tasks.chat_refusals import needs_answers, no_layout, not_written, too_long
from lora_cli.tasks.chat_template import Refused

ROW = Row("7", {}, "rows.jsonl", 7)


@pytest.mark.parametrize(
    "problem",
    [
        needs_answers("bleu"),
        no_layout(["a", "b"]),
        too_long(ROW, 99, 64, what="prompt"),
        not_written(ROW, Refused("roles must alternate")),
    ],
    ids=lambda problem: problem.id,
)
def test_each_says_what_must_be_what_is_and_what_to_do(problem: Problem) -> None:
    assert problem.message.endswith(".")
    assert " must " in problem.message
    assert " but " in problem.message
    assert problem.fix
    assert problem.key
    assert str(problem.key).startswith("task.")
    assert dataclasses.asdict(problem)["where"] in (None, "rows.jsonl row 7")
