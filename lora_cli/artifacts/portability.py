"""What a portability rule is, and what it finds in an adapter.

The rules are rows of tables, in the modules `lora_cli.artifacts.portability_...`, each with the
source that it was read from or the test that tries it. Those for PEFT and transformers are tried
in the tests by loading with both; vLLM and llama.cpp are not run, their rules are readings of their
sources at the versions that are named here.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lora_cli.artifacts.inspection import Inspected

Severity = Literal["error", "warning"]

PEFT, TRANSFORMERS, VLLM, GGUF = "peft", "transformers", "vllm", "llama.cpp"
EVERY = (PEFT, TRANSFORMERS, VLLM, GGUF)
VERSIONS = {
    PEFT: "0.21.2, tried",
    TRANSFORMERS: "5.23.0, tried",
    VLLM: "commits e745baff and 0306474e, and one after #53555, read",
    GGUF: "convert_lora_to_gguf.py at commit 0b03adaa, read",
}
"""What the rules were made from, by program."""

TRIED = "peft 0.21.2 and transformers 5.23.0, by loading"
_SHOWN = 3


class Found(NamedTuple):
    """One thing that a rule has found: a sentence, and what to do."""

    text: str
    fix: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of a table.

    Attributes:
        id: Stable name.
        runtimes: The programs that it is about.
        severity: "error" where the adapter would not load, or be another one without a word.
        source: Where that is known from.
        find: Yields what breaks the rule.
    """

    id: str
    runtimes: tuple[str, ...]
    severity: Severity
    source: str
    find: Callable[[Inspected], Iterable[Found]]


@dataclass(frozen=True, slots=True)
class Finding:
    """What is to be told of an adapter.

    Attributes:
        id: Name of the rule.
        severity: "error" or "warning".
        runtimes: The programs asked for that it is about.
        text: What was found, as a sentence.
        fix: What to do.
        source: Where the rule is known from.
    """

    id: str
    severity: Severity
    runtimes: tuple[str, ...]
    text: str
    fix: str
    source: str


def find_problems(
    inspected: Inspected, rules: Iterable[Rule], runtimes: Collection[str]
) -> list[Finding]:
    """Return what the rules for some programs find, errors first."""
    found = list(_find(inspected, rules, runtimes))
    return sorted(found, key=lambda finding: finding.severity != "error")


def _find(
    inspected: Inspected, rules: Iterable[Rule], runtimes: Collection[str]
) -> Iterator[Finding]:
    for rule in rules:
        concerned = tuple(name for name in rule.runtimes if name in runtimes)
        if concerned:
            for text, fix in rule.find(inspected):
                yield Finding(rule.id, rule.severity, concerned, text, fix, rule.source)


def listed(names: Iterable[str]) -> str:
    """Return the first names of many, and how many more there are.

    >>> listed(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    every = list(names)
    more = len(every) - _SHOWN
    return ", ".join(every[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
