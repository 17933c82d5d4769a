import os
import signal
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lora_cli.commands import encoding
from lora_cli.commands.encoding import encode_rows, encoding_facts
from lora_cli.config.task_families import TASKS
from lora_cli.config.tasks import TextClassificationConfig
from lora_cli.data.types import Row
from lora_cli.errors import Problem, RunFailedError, UserError
from lora_cli.models.sources import ModelSource
from lora_cli.tasks.single_label import SingleLabelTask
from lora_cli.tasks.text_classification import TextClassification
from lora_cli.tasks.texts import TextReader

COLUMNS = {"text": "text", "text_pair": None, "label": "label"}
STATE = {"labels": ["negative", "positive"], "columns": COLUMNS, "numbered": False}
ROWS = [Row(str(n), {"text": "a " * n, "label": "positive"}, "f", n) for n in range(1, 10)]
SOURCE = ModelSource(Path("m"), "m", None, "f" * 64, settings={"tokenizer.json": "e" * 64})


class Notes:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.encoded = 0

    def note(self, text: str) -> None:
        self.texts.append(text)

    def track(self, label: str, items: Any) -> Any:
        assert label == "encode train"
        for item in items:
            self.encoded += 1
            yield item


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(encoding, "KEPT_ROWS", 1)
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Setup:
    """What a run knows before it encodes; each part can be another one."""

    def __init__(self, folder: Path) -> None:
        self.config = TextClassificationConfig(max_length=6)
        self.state: dict[str, Any] = dict(STATE)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.source = SOURCE
        self.rows = ROWS

    def encode(self) -> tuple[list[Any], Notes]:
        task = TextClassification().build(self.config, self.state, self.tokenizer)
        display: Any = Notes()
        facts = encoding_facts(self.config, self.state, self.tokenizer, self.source)
        return list(encode_rows(task, self.rows, "train", display, facts=facts)), display


@pytest.fixture
def setup(tiny_model_dir: Callable[..., Path]) -> Setup:
    return Setup(tiny_model_dir())


def test_cut_rows_are_counted_from_the_cache_as_well(setup: Setup) -> None:
    for is_new in (True, False):
        features, display = setup.encode()
        # Two special tokens leave room for four words.
        assert [row["length"] for row in features] == [3, 4, 5, 6, 6, 6, 6, 6, 6]
        assert display.texts == ["train: task.max_length cut 5 of 9 rows"]
        assert display.encoded == (9 if is_new else 0)


def other_columns(setup: Setup) -> None:
    setup.state["columns"] = {**COLUMNS, "text_pair": "label"}


def other_labels(setup: Setup) -> None:
    setup.state["labels"] = ["positive", "negative"]


def other_text(setup: Setup) -> None:
    setup.rows = [*ROWS[:-1], replace(ROWS[-1], values={"text": "a", "label": "negative"})]


def other_id(setup: Setup) -> None:
    setup.rows = [replace(ROWS[0], id="x"), *ROWS[1:]]


def other_order(setup: Setup) -> None:
    setup.rows = ROWS[::-1]


def other_length(setup: Setup) -> None:
    setup.config = replace(setup.config, max_length=7)


def other_tokenizer(setup: Setup) -> None:
    setup.source = replace(SOURCE, settings={"tokenizer.json": "d" * 64})


def other_gguf(setup: Setup) -> None:
    setup.source = replace(SOURCE, settings={}, sha256="d" * 64)


def added_token(setup: Setup) -> None:
    setup.tokenizer.add_tokens(["zebra"])


def other_template(setup: Setup) -> None:
    setup.tokenizer.chat_template = "{{ messages }}"


def other_side(setup: Setup) -> None:
    setup.tokenizer.padding_side = "left"


@pytest.mark.parametrize(
    "change",
    [
        other_columns,
        other_labels,
        other_text,
        other_id,
        other_order,
        other_length,
        other_tokenizer,
        other_gguf,
        added_token,
        other_template,
        other_side,
    ],
)
def test_nothing_stale_is_used(setup: Setup, change: Callable[[Setup], None]) -> None:
    setup.encode()
    change(setup)
    features, display = setup.encode()
    assert display.encoded == 9
    assert [row["id"] for row in features] == [row.id for row in setup.rows]
    assert setup.encode()[1].encoded == 0


@pytest.mark.parametrize("family", sorted(TASKS))
def test_all_settings_but_those_of_the_source_count(setup: Setup, family: str) -> None:
    config: Any = TASKS[family]()
    facts = encoding_facts(config, STATE, setup.tokenizer, SOURCE)
    counted = {field.name for field in fields(config)} - {"data"}
    assert set(facts["settings"]) == counted
    moved = replace(config, data=replace(config.data, path="elsewhere"))
    assert encoding_facts(moved, STATE, setup.tokenizer, SOURCE) == facts


def test_other_code_or_packages_count(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_hash_code", lambda: "other"), ("_PACKAGES", ("torch",))):
        setup.encode()
        with monkeypatch.context() as patch:
            patch.setattr(encoding, name, value)
            assert setup.encode()[1].encoded == 9
    assert setup.encode()[1].encoded == 0


def test_several_processes_give_the_same_rows(
    setup: Setup, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.rows = [replace(row, id=f"{row.id}-{n}") for n in range(100) for row in ROWS]
    alone, _ = setup.encode()
    (path,) = (cache / "encoded").glob("*.jsonl")
    path.unlink()
    monkeypatch.setattr(encoding, "ROWS_OF_A_PROCESS", 300)
    monkeypatch.setattr(encoding, "_cores", lambda: 2)
    monkeypatch.setattr(encoding, "_line", None)  # it must not be this process that encodes
    together, display = setup.encode()
    assert together == alone
    assert display.encoded == len(alone) == 900


class FailingTask(SingleLabelTask):
    """Refuses a row, or is killed at it."""

    def encode(self, row: Row) -> Any:
        if row.id == "5":
            raise UserError(Problem(id="data.bad", message="It is bad.", where=row.where))
        if row.id == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(row)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_row_that_cannot_be_encoded(
    setup: Setup, cache: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(encoding, "ROWS_OF_A_PROCESS", 1)
    monkeypatch.setattr(encoding, "_cores", lambda: processes)
    task = FailingTask(setup.config, STATE, TextReader(setup.tokenizer, COLUMNS, max_length=6))
    display: Any = Notes()
    with pytest.raises(UserError) as error:
        encode_rows(task, ROWS, "train", display, facts={})
    assert [problem.id for problem in error.value.problems] == ["data.bad"]
    assert not list((cache / "encoded").glob("*.jsonl*"))


def test_a_process_that_is_killed(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "ROWS_OF_A_PROCESS", 1)
    monkeypatch.setattr(encoding, "_cores", lambda: 2)
    task = FailingTask(setup.config, STATE, TextReader(setup.tokenizer, COLUMNS, max_length=6))
    display: Any = Notes()
    with pytest.raises(RunFailedError, match="one was killed"):
        encode_rows(task, [replace(ROWS[0], id="killed")] * 2, "train", display, facts={})


def test_few_rows_are_not_kept(setup: Setup, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = setup.encode()
    monkeypatch.setenv("LORA_CLI_CACHE", str(cache.parent / "other"))
    monkeypatch.setattr(encoding, "KEPT_ROWS", 10)
    assert setup.encode()[0] == kept
    assert not (cache.parent / "other").exists()


def test_without_a_cache_it_goes_on(setup: Setup, cache: Path) -> None:
    cache.write_text("in the way")
    features, display = setup.encode()
    assert len(features) == 9
    assert display.texts[0] == f"train: not kept in the cache, {cache / 'encoded'}: Not a directory"


def test_other_values_give_other_fingerprints() -> None:
    values = (b"a", b"b", 1.5, 1, None, {"x": 1}, "é")
    rows = [[Row("1", {"more": value}, "f", 1)] for value in values]
    assert len({encoding._fingerprint(one, {}) for one in rows}) == len(values)
