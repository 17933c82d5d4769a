"""Labels that differ in next to nothing, and are several for a model."""

from collections import Counter
from collections.abc import Sequence

from lora_cli.data.listing import list_rows
from lora_cli.data.types import Row
from lora_cli.errors import Problem

_SHOWN = 5


def check_alike(rows: Sequence[Row], labels: Sequence[Sequence[str]], column: str) -> list[Problem]:
    """Return a problem if labels differ in white space alone, which makes two of one by accident.

    Args:
        rows: Rows of train.
        labels: The labels of each.
        column: The label column.
    """
    counts = Counter(label for own in labels for label in own)
    usual: dict[str, str] = {}
    for label, _ in counts.most_common():
        usual.setdefault(" ".join(label.split()), label)
    odd = sorted(set(counts) - set(usual.values()))
    if not odd:
        return []
    pairs = ", ".join(
        f'"{label}" beside "{usual[" ".join(label.split())]}"' for label in odd[:_SHOWN]
    )
    bad = [
        (row, f'"{found[0]}"')
        for row, own in zip(rows, labels, strict=True)
        if (found := [label for label in own if label in odd])
    ]
    return [
        Problem(
            id="data.alike-labels",
            message=f"`{column}` must hold labels that differ in more than white space, but holds "
            f"{pairs}.",
            where=list_rows(bad),
            fix="correct the rows, or name all labels in task.data.label_names if both are meant",
        )
    ]


def case_notes(names: Sequence[str]) -> tuple[str, ...]:
    """Return a sentence about label names that differ in case alone, if there are some.

    >>> case_notes(["no", "yes", "Yes"])
    ('labels that differ in case alone, and are several: yes, Yes',)
    """
    folded = Counter(name.casefold() for name in names)
    alike = [name for name in names if folded[name.casefold()] > 1]
    if not alike:
        return ()
    more = f" and {len(alike) - _SHOWN} more" if len(alike) > _SHOWN else ""
    return (
        f"labels that differ in case alone, and are several: {', '.join(alike[:_SHOWN])}{more}",
    )
