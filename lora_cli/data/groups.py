"""Rows that are evaluated together, such as those of a user: cutting and drawing them as groups."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError

Cut = tuple[tuple[Row, ...], tuple[Row, ...]]


class LimitBelowGroupError(UserError):
    """A limit on the rows to evaluate has no room for any group.

    Attributes:
        least: Rows of the smallest group.
    """

    def __init__(self, problems: Problem | Sequence[Problem], *, least: int = 0) -> None:
        super().__init__(problems)
        self.least = least


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """How rows are grouped, and how a split is cut so that each group in it can be evaluated.

    Attributes:
        group_of: Name of a row's group.
        is_usable: Whether these rows of a group can be evaluated; a cut leaves others in train.
        time_of: When a row happened, if the latest rows of each group are cut rather than whole
            groups. All values can be compared with each other.
        what: What the groups are, for notes and errors.
        stay_whole: Whether a limit on the rows to evaluate keeps them whole, as a cut does.
    """

    group_of: Callable[[Row], str]
    is_usable: Callable[[Sequence[Row]], bool]
    time_of: Callable[[Row], Any] | None = None
    what: str = "users"
    stay_whole: bool = True

    @property
    def how(self) -> str:
        """How rows are cut, in words."""
        return f"whole {self.what}" if self.time_of is None else f"the latest of all {self.what}"

    def cut(self, rows: tuple[Row, ...], count: int, *, split: str, seed: int) -> Cut:
        """Return (rows that stay, about `count` rows cut off), both in the given order.

        Raises:
            UserError: If there is nothing that can be cut.
        """
        if self.time_of is None:
            places = self._whole_groups(rows, count, random.Random(f"{seed}/{split}"))
        else:
            places = self._latest(rows, count / len(rows))
        if not places or len(places) == len(rows):
            raise UserError(
                Problem(
                    id="data.too-few-groups",
                    message=f"`train` must have enough {self.what} to cut {split} from, but in no "
                    f"cut of its {len(rows)} rows could they be evaluated.",
                    key=f"task.data.{split}_split",
                    allowed=f"several {self.what}, some of them with a row of label 1"
                    if self.stay_whole
                    else f"several {self.what}",
                    fix=f"add rows, or name a split: task.data.{split}_split=NAME",
                )
            )
        stay = tuple(row for place, row in enumerate(rows) if place not in places)
        return stay, tuple(row for place, row in enumerate(rows) if place in places)

    def draw(self, rows: tuple[Row, ...], most: int, *, split: str, seed: int) -> tuple[Row, ...]:
        """Draw whole groups at random, `most` rows at most, in the given order.

        Raises:
            LimitBelowGroupError: If every group is larger.
        """
        found = self._places(rows)
        order = sorted(found)
        random.Random(f"{seed}/{split}/rows").shuffle(order)
        drawn: set[int] = set()
        for name in order:
            if len(drawn) + len(found[name]) <= most:
                drawn.update(found[name])
        if not drawn:
            least = min(len(places) for places in found.values())
            raise LimitBelowGroupError(
                Problem(
                    id="data.limit-below-group",
                    message=f"`task.data.max_eval_rows` must have room for all rows of one of the "
                    f"{self.what}, which has {least} at least, but is {most}.",
                    key="task.data.max_eval_rows",
                    fix=f"task.data.max_eval_rows={least} or more",
                ),
                least=least,
            )
        return tuple(row for place, row in enumerate(rows) if place in drawn)

    def unusable(self, rows: Sequence[Row]) -> list[Row]:
        """Return the first row of each group that cannot be evaluated."""
        return [
            rows[places[0]]
            for places in self._places(rows).values()
            if not self.is_usable([rows[place] for place in places])
        ]

    def _places(self, rows: Iterable[Row]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            found[self.group_of(row)].append(place)
        return found

    def _whole_groups(
        self, rows: tuple[Row, ...], count: int, generator: random.Random
    ) -> set[int]:
        found = self._places(rows)
        order = sorted(found)
        generator.shuffle(order)
        cut: set[int] = set()
        for name in order:
            if len(cut) >= count:
                break
            # A group may be larger than what is to be cut; one at least stays.
            fits = len(cut) + len(found[name]) < len(rows)
            if fits and self.is_usable([rows[place] for place in found[name]]):
                cut.update(found[name])
        return cut

    def _latest(self, rows: tuple[Row, ...], share: float) -> set[int]:
        cut: set[int] = set()
        for places in self._places(rows).values():
            take = min(int(len(places) * share + 0.5), len(places) - 1)
            latest = sorted(places, key=lambda place: (self._time(rows[place]), place))
            latest = latest[len(places) - take :]
            if latest and self.is_usable([rows[place] for place in latest]):
                cut.update(latest)
        return cut

    def _time(self, row: Row) -> Any:
        return 0 if self.time_of is None else self.time_of(row)
