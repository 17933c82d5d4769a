"""The error for names in settings that match nothing in the model."""

from collections.abc import Callable, Iterable, Sequence

from lora_cli.errors import Problem, UserError, nearest_name

MAX_PATTERN_LENGTH = 200


class UnmatchedTargetsError(UserError):
    """Some patterns select nothing in the base model, which is still untouched.

    Attributes:
        patterns: The entries that matched nothing, in the order given.
        known: Last name parts of everything that could have been matched, sorted.
    """

    def __init__(
        self, problems: Sequence[Problem], *, patterns: tuple[str, ...], known: tuple[str, ...]
    ) -> None:
        super().__init__(problems)
        self.patterns = patterns
        self.known = known


def check_patterns(patterns: Iterable[str], *, key: str) -> list[Problem]:
    """Return one problem for each entry that is empty or too long to be a pattern."""
    return [
        Problem(
            id="lora.bad-pattern",
            message=f"`{key}` must hold names of 1 to {MAX_PATTERN_LENGTH} characters, "
            f"but one entry has {len(pattern)}.",
            key=key,
        )
        for pattern in patterns
        if not 0 < len(pattern) <= MAX_PATTERN_LENGTH
    ]


def unmatched_error(
    patterns: Sequence[str],
    known: tuple[str, ...],
    *,
    key: str,
    what: str,
    explain: Callable[[str], str | None] = lambda _: None,
) -> UnmatchedTargetsError:
    """Build the error for patterns that match nothing, one problem each.

    Args:
        patterns: The patterns that matched nothing.
        known: Names that would have been accepted.
        key: Configuration key that held the patterns.
        what: Kind of thing to be named, such as "layers".
        explain: Gives the end of the sentence for a pattern, where there is more to say than that
            it matches none.
    """
    problems = []
    for pattern in patterns:
        near = nearest_name(pattern, known) or nearest_name(pattern.rpartition(".")[2], known)
        problems.append(
            Problem(
                id="lora.unmatched-target",
                message=f"`{key}` must name {what} of the model, "
                f'but "{pattern}" {explain(pattern) or "matches none"}.',
                key=key,
                allowed=", ".join(known),
                fix=f'did you mean "{near}"?' if near else f"use names from the list in `{key}`.",
            )
        )
    return UnmatchedTargetsError(problems, patterns=tuple(patterns), known=known)
