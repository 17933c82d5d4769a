from lora_cli.errors import UserError
from lora_cli.lora.unmatched import check_patterns, unmatched_error

KNOWN = ("dense", "query", "value")


def test_one_problem_for_each_pattern() -> None:
    error = unmatched_error(("qurey", "zz"), KNOWN, key="lora.targets", what="layers")
    assert isinstance(error, UserError)
    assert error.patterns == ("qurey", "zz")
    assert error.known == KNOWN
    assert [problem.fix for problem in error.problems] == [
        'did you mean "query"?',
        "use names from the list in `lora.targets`.",
    ]


def test_the_nearest_name_is_that_of_the_last_part() -> None:
    error = unmatched_error(("layer.3.self.qurey",), KNOWN, key="k", what="layers")
    assert error.problems[0].fix == 'did you mean "query"?'


def test_a_reason_ends_the_sentence() -> None:
    error = unmatched_error(("a", "b"), KNOWN, key="k", what="layers", explain={"a": "is new"}.get)
    assert [problem.message for problem in error.problems] == [
        '`k` must name layers of the model, but "a" is new.',
        '`k` must name layers of the model, but "b" matches none.',
    ]


def test_lengths() -> None:
    assert [p.key for p in check_patterns(("", "a", "x" * 200, "x" * 201), key="k")] == ["k", "k"]
