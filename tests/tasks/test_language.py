"""Batches, loss and packing, against plain torch and texts that are run alone."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from lora_cli.tasks.language import (
    collate_sequences,
    each_alone,
    next_token_loss,
    pack,
    scores,
    supervised,
    training_lines,
    why_not_packed,
)

DECODERS = ("llama", "gpt2", "qwen2", "gpt_neox")


def sequence(ids: list[int], *spans: tuple[int, int]) -> dict[str, Any]:
    return {"input_ids": ids, "spans": [list(span) for span in spans]}


def feature(name: str, *sequences: dict[str, Any], **more: Any) -> dict[str, Any]:
    length = sum(len(one["input_ids"]) for one in sequences)
    plain = {"id": name, "sequences": list(sequences), "length": length, "cut": 0}
    return {**plain, "supervised": supervised(sequences), **more}


def texts(count: int, *, seed: int = 0, most: int = 14) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    found = []
    for number in range(count):
        ids = [draw.randrange(4, 60) for _ in range(draw.randint(2, most))]
        found.append(feature(str(number), sequence(ids, (1, len(ids)))))
    return found


@pytest.fixture(scope="module")
def load(tiny_language_dir: Callable[..., Path]) -> Callable[..., Any]:
    def get(kind: str, **more: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            tiny_language_dir(kind), **more
        ).eval()

    return get


def alone(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits


def test_a_batch_is_padded_at_the_right() -> None:
    rows = [
        feature("a", sequence([5, 6, 7], (1, 3))),
        feature("b", sequence([8], (0, 1)), sequence([9, 9], (0, 2))),
    ]
    batch = collate_sequences(rows, padding=0)
    assert batch["inputs"]["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [9, 9, 0]]
    assert batch["inputs"]["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["lines"] == [1, 2]
    # The first token of a sequence has nothing before it.
    assert batch["learned"].tolist() == [
        [False, True, True],
        [False, False, False],
        [False, True, False],
    ]
    assert [row["supervised"] for row in rows] == [2, 1]


def test_packed_rows_start_counting_again() -> None:
    line = feature("a", sequence([5, 6, 7], (1, 2)), sequence([8, 9], (0, 2)), packed=True)
    batch = collate_sequences([line, feature("b", sequence([4], (0, 0)), packed=True)], padding=0)
    assert set(batch["inputs"]) == {"input_ids", "position_ids"}
    assert batch["inputs"]["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 0, 0, 0, 0]]
    assert batch["inputs"]["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    assert batch["learned"].tolist() == [[False, True, False, False, True], [False] * 5]


@pytest.mark.parametrize("kind", DECODERS)
def test_the_loss_is_that_of_plain_torch(load: Any, kind: str) -> None:
    model, rows = load(kind), texts(6)
    rows[2]["sequences"][0]["spans"] = [[1, 2], [3, 5]]
    expected, hits, count = [], [], []
    for row in rows:
        (one,) = row["sequences"]
        logits = alone(model, one["input_ids"])
        places = [p for start, end in one["spans"] for p in range(start, end) if p < row["length"]]
        true = torch.tensor([one["input_ids"][p] for p in places])
        said = logits[[p - 1 for p in places]]
        expected.append(float(functional.cross_entropy(said, true, reduction="sum")))
        hits.append(int((said.argmax(-1) == true).sum()))
        count.append(len(places))
    batch = collate_sequences(rows, padding=0)
    with torch.no_grad():
        found = next_token_loss(model, batch)
        trained = next_token_loss(model, {**batch, "seed": 1})
    assert float(found.loss_sum) == pytest.approx(sum(expected), rel=1e-5)
    assert float(trained.loss_sum) == pytest.approx(sum(expected), rel=1e-5)
    assert found.count == trained.count == sum(count)
    assert not trained.outputs
    told = scores(found.outputs, batch)
    assert [one.loss_sum for one in told] == pytest.approx(expected, rel=1e-4)
    assert [one.hits for one in told] == hits
    assert [one.count for one in told] == count


@pytest.mark.parametrize("kind", DECODERS)
def test_no_cache_is_made(load: Any, kind: str, monkeypatch: Any) -> None:
    """It would take memory, and transformers warns of one where it recomputes layers."""
    made = []
    monkeypatch.setattr(transformers.DynamicCache, "update", lambda *_, **__: made.append(1))
    batch = collate_sequences(texts(3), padding=0)
    next_token_loss(load(kind), {**batch, "seed": 1})
    with torch.no_grad():
        next_token_loss(load(kind), batch)
    assert not made


def test_many_tokens_are_run_in_several_passes(load: Any, monkeypatch: Any) -> None:
    model, rows = load("llama"), texts(9)
    batch = collate_sequences(rows, padding=0)
    with torch.no_grad():
        whole = next_token_loss(model, batch)
        monkeypatch.setattr("lora_cli.tasks.language._TOKENS_AT_ONCE", 30)
        monkeypatch.setattr("lora_cli.tasks.token_loss._NUMBERS_AT_ONCE", 3 * 64)
        calls = []
        parts = next_token_loss(lambda **x: calls.append(1) or model(**x), batch)
    assert len(calls) > 2
    torch.testing.assert_close(parts.outputs["log_probs"], whole.outputs["log_probs"])


def test_gradients_of_packed_and_plain_rows_are_equal(load: Any) -> None:
    model, rows = load("llama"), texts(7)
    found = []
    for some in (rows, pack(rows, max_length=32)):
        model.zero_grad()
        batch = {**collate_sequences(some, padding=0), "seed": 1}
        next_token_loss(model, batch).loss_sum.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", DECODERS)
def test_texts_in_a_row_do_not_see_each_other(load: Any, kind: str, attention: str) -> None:
    model = load(kind, attn_implementation=attention)
    lines = pack(texts(12), max_length=32)
    assert max(len(line["sequences"]) for line in lines) > 2
    inputs = collate_sequences(lines, padding=0)["inputs"]
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    for number, line in enumerate(lines):
        place = 0
        for one in line["sequences"]:
            end = place + len(one["input_ids"])
            torch.testing.assert_close(
                logits[number, place:end], alone(model, one["input_ids"]), rtol=1e-5, atol=1e-5
            )
            place = end
    assert why_not_packed(model, texts(3)) is None


class Leaking(torch.nn.Module):
    """A decoder that forgets where texts begin."""

    def __init__(self, model: Any, *, keeps: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.keeps = model, keeps

    def forward(self, input_ids: Any, position_ids: Any = None, use_cache: bool = True) -> Any:
        given = {"position_ids": position_ids}
        if "mask" in self.keeps:
            starts = (position_ids == 0).cumsum(-1)
            length = input_ids.shape[1]
            same = starts[:, :, None] == starts[:, None, :]
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            given = {"attention_mask": (same & causal)[:, None]}
        kept = {name: value for name, value in given.items() if name != "position_ids"}
        return self.model(input_ids=input_ids, **kept)


def test_models_that_mix_texts_are_found_out(load: Any) -> None:
    rows = texts(4)
    reason = why_not_packed(Leaking(load("llama"), keeps=()).eval(), rows)
    assert reason == "texts in one row see each other in Leaking"
    # gpt2 has learned positions, which go on counting here.
    reason = why_not_packed(Leaking(load("gpt2"), keeps=("mask",)).eval(), rows)
    assert reason == "Leaking does not count the positions of each text by itself"
    lines, notes = training_lines(rows, Leaking(load("llama"), keeps=()).eval(), max_length=32)
    assert [line["id"] for line in lines] == ["0", "1", "2", "3"]
    assert notes == ("not packed: texts in one row see each other in Leaking",)

    class Positionless(Leaking):
        def forward(self, input_ids: Any) -> Any:  # type: ignore[override]
            return self.model(input_ids=input_ids)

    reason = why_not_packed(Positionless(load("llama"), keeps=()).eval(), rows)
    assert reason == "Positionless takes no positions"


def test_the_note_says_how_full_the_rows_are(load: Any) -> None:
    rows = texts(12)
    lines, notes = training_lines(rows, load("llama"), max_length=32)
    tokens = sum(row["length"] for row in rows)
    share = 100 * tokens / (32 * len(lines))
    assert notes == (
        f"packed: 12 texts in {len(lines)} rows of at most 32 tokens, {share:.1f} % full",
    )


@given(st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=3), min_size=1, max_size=30))
def test_packing_loses_nothing(lengths: list[list[int]]) -> None:
    rows, token = [], iter(range(10**6))
    for number, own in enumerate(lengths):
        ids = [[next(token) for _ in range(length)] for length in own]
        rows.append(feature(str(number), *(sequence(x, (1, len(x))) for x in ids)))
    lines = pack(rows, max_length=20)
    packed = [tuple(one["input_ids"]) for line in lines for one in line["sequences"]]
    whole = [tuple(one["input_ids"]) for row in rows for one in row["sequences"]]
    assert sorted(packed) == sorted(whole), "no text is cut or lost"
    assert all(line["length"] <= 20 for line in lines)
    assert sum(line["supervised"] for line in lines) == sum(row["supervised"] for row in rows)
    if len(lines) > 1:
        # Best fit leaves no two lines that would fit into one.
        shortest = sorted(line["length"] for line in lines)[:2]
        assert sum(shortest) > 20
    assert pack(rows, max_length=20) == lines


def test_windows_become_rows_of_their_own() -> None:
    rows = [
        feature("a", sequence([1, 2, 3], (1, 3)), sequence([3, 4], (1, 2)), text="x"),
        feature("b", sequence([5, 6], (1, 2))),
    ]
    found = each_alone(rows)
    assert [row["id"] for row in found] == ["a/0", "a/1", "b"]
    assert [row["length"] for row in found] == [3, 2, 2]
    assert [row["supervised"] for row in found] == [2, 1, 1]
    assert [len(row["sequences"]) for row in found] == [1, 1, 1]
