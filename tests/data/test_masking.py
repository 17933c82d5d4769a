from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.data.masking import (
    MOST_TOKENS,
    NEVER,
    Masked,
    MaskRule,
    cut_windows,
    draw_masks,
    number_units,
)

RULE = MaskRule(share=0.15, mask=4, others=range(5, 100))


def test_a_word_is_a_unit_unless_it_is_too_long() -> None:
    words = [None, 0, 0, 1, *[2] * (MOST_TOKENS + 1), 3, 3, None]
    long = list(range(2, 3 + MOST_TOKENS))
    found = number_units(words, [True] * len(words), whole_words=True)
    assert found == [NEVER, 0, 0, 1, *long, long[-1] + 1, long[-1] + 1, NEVER]
    kept = number_units(words[:3] + [0] * 8, [True] * 11, whole_words=True)
    assert kept == [NEVER, *[0] * 10], "ten tokens are not too many"
    alone = number_units(words, [True] * len(words), whole_words=False)
    assert alone == [NEVER, *range(len(words) - 2), NEVER]


def test_what_is_not_allowed_belongs_to_no_unit() -> None:
    found = number_units([0, 0, 0, 1, 1], [True, False, True, True, True], whole_words=True)
    assert found == [0, NEVER, 1, 2, 2]


@given(
    st.lists(st.integers(0, 6), min_size=0, max_size=60).map(sorted),
    st.integers(MOST_TOKENS, 20),
    st.booleans(),
)
def test_windows_hold_everything_and_cut_no_unit(
    words: list[int], size: int, whole_words: bool
) -> None:
    units = number_units(words, [True] * len(words), whole_words=whole_words)
    windows = cut_windows(units, size=size)
    assert [n for first, end in windows for n in range(first, end)] == list(range(len(words)))
    assert all(end - first <= size for first, end in windows)
    assert all(units[end] != units[end - 1] for _, end in windows[:-1])
    # As long as they can be: with the next unit they would be too long.
    for first, end in windows[:-1]:
        following = sum(unit == units[end] for unit in units)
        assert end - first + following > size


@given(st.integers(1, 80), st.floats(0.01, 0.9), st.integers(), st.integers(1, 3))
def test_the_share_is_exact_and_whole_words_go_together(
    count: int, share: float, number: int, tokens: int
) -> None:
    units = [unit for unit in range(count) for _ in range(tokens)]
    windows = [[NEVER, *units[: count // 2 * tokens]], [*units[count // 2 * tokens :], NEVER]]
    ids = [[50] * len(window) for window in windows]
    rule = MaskRule(share=share, mask=4, others=range(5, 100))
    masked = draw_masks(ids, windows, rule=rule, key=f"{number}/row")
    assert masked == draw_masks(ids, windows, rule=rule, key=f"{number}/row")
    chosen = Counter(windows[one.window][one.place] for one in masked)
    assert len(chosen) == max(1, round(share * count))
    assert set(chosen.values()) == {tokens}
    assert NEVER not in chosen


def test_what_is_shown_is_drawn_as_bert_does_it() -> None:
    length = 20_000
    masked = draw_masks([[50] * length], [list(range(length))], rule=RULE, key="0/a")
    assert len(masked) == 3000
    shares = Counter(
        "mask" if one.shown == RULE.mask else "same" if one.shown == 50 else "other"
        for one in masked
    )
    assert shares["mask"] / 3000 == pytest.approx(0.8, abs=0.03)
    assert shares["same"] / 3000 == pytest.approx(0.1, abs=0.03)
    assert shares["other"] / 3000 == pytest.approx(0.1, abs=0.03)
    assert all(4 <= one.shown < 100 for one in masked)
    other = draw_masks([[50] * length], [list(range(length))], rule=RULE, key="1/a")
    assert {one.place for one in other} != {one.place for one in masked}


def test_nothing_to_mask() -> None:
    assert draw_masks([[2, 3]], [[NEVER, NEVER]], rule=RULE, key="a") == []
    assert cut_windows([], size=10) == [(0, 0)]
    (only,) = draw_masks([[2, 9, 3]], [[NEVER, 0, NEVER]], rule=RULE, key="a")
    assert isinstance(only, Masked)
    assert (only.window, only.place) == (0, 1)
