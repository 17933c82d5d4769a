"""Tokens of padded rows in one line, against plain indexing."""

import pytest
import torch

from lora_cli.training.token_line import Layout, layout_of

LENGTHS = (3, 7, 1, 5, 7)
WIDTH = 7


def mask_of(lengths: tuple[int, ...] = LENGTHS, width: int = WIDTH) -> torch.Tensor:
    return (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()


@pytest.fixture
def layout() -> Layout:
    found = layout_of(mask_of())
    assert found is not None
    return found


def test_tokens_stand_row_by_row_longest_first(layout: Layout) -> None:
    x = torch.arange(5 * 7).view(5, 7, 1)
    expected = [n for row in (1, 4, 3, 0, 2) for n in x[row, : LENGTHS[row], 0].tolist()]
    assert layout.pack(x)[0, :, 0].tolist() == expected
    assert layout.count == sum(LENGTHS)
    assert [group.rows.tolist() for group in layout.groups] == [[1, 4, 3], [0], [2]]
    assert [group.width for group in layout.groups] == [7, 3, 1]


def test_there_and_back_leaves_zeros_at_padding(layout: Layout) -> None:
    x = torch.randn(5, 7, 4)
    found = layout.unpack(layout.pack(x))
    assert torch.equal(found, x * mask_of().unsqueeze(-1))


def test_rows_of_a_group_and_back(layout: Layout) -> None:
    x = torch.randn(5, 7, 2, 4)
    line = layout.pack(x)[0]
    parts = []
    for group in layout.groups:
        rows = group.pad(line)
        expected = (x * mask_of()[..., None, None])[group.rows, : group.width]
        assert torch.equal(rows, expected)
        parts.append(group.unpad(rows))
    assert torch.equal(torch.cat(parts), line)


def test_gradients(layout: Layout) -> None:
    x = torch.randn(5, 7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.pack, (x,))
    line = torch.randn(1, layout.count, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.unpack, (line,))
    for group in layout.groups:
        assert torch.autograd.gradcheck(lambda y, g=group: g.unpad(g.pad(y)), (line[0],))


def test_what_all_rows_share_is_spread_and_kept(layout: Layout) -> None:
    positions = torch.arange(7).unsqueeze(0)
    line = layout.pack(positions)
    assert line.tolist() == [[p for row in (1, 4, 3, 0, 2) for p in range(LENGTHS[row])]]
    assert layout.pack(positions) is line
    for other in (torch.zeros(1, layout.count, 3), torch.zeros(5, 1, 7, 7), torch.zeros(7)):
        assert layout.pack(other) is other


def test_masks_of_groups(layout: Layout) -> None:
    mask = torch.rand(5, 1, 7, 7) < 0.5
    found = layout.masks_of(mask)
    assert layout.masks_of(mask) is found
    for part, group in zip(found, layout.groups, strict=True):
        assert part is not None
        assert torch.equal(part, mask[group.rows][:, :, : group.width, : group.width])
    shared = torch.rand(1, 1, 7, 7) < 0.5
    assert [part.shape for part in layout.masks_of(shared) if part is not None] == [
        (1, 1, group.width, group.width) for group in layout.groups
    ]
    assert layout.masks_of(None) == [None, None, None]


def test_batches_that_have_no_padding_at_the_end_have_no_layout() -> None:
    assert layout_of(mask_of((7, 7))) is None
    assert layout_of(mask_of((3, 0))) is None
    assert layout_of(mask_of((3, 7)).flip(1)) is None
    holes = mask_of((3, 7))
    holes[1, 2] = 0
    assert layout_of(holes) is None
