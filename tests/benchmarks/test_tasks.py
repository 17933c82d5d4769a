"""The runner: what it starts, what it leaves out, keeps and prints, without training anything."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def tasks(script: Callable[[str], ModuleType]) -> Any:
    return script("tasks")


@pytest.fixture
def found() -> dict[str, Any]:
    return {
        "command": ["task=text_regression"],
        "seconds": 61.4,
        "cpu_seconds": 58.6,
        "peak_rss_bytes": 0.5e9,
        "train_rows": 1500,
        "rows": 1000,
        "split": "test",
        "base": {"pearson": 0.1},
        "adapter": {"pearson": 0.76543},
        "baselines": {"cosine": {"pearson": 0.6}},
    }


def test_the_rows_of_the_table_name_settings_and_baselines_that_exist(
    tasks: Any, script: Callable[[str], ModuleType]
) -> None:
    from lora_cli.tasks.table import FAMILIES

    baselines, names = script("baselines").BASELINES, list(tasks.RUNS)
    for place, (name, item) in enumerate(tasks.RUNS.items()):
        assert item.family in FAMILIES
        assert item.baselines, name
        assert set(item.baselines) <= {*baselines, tasks.UNTRAINED}
        for other in (item.start, item.beside):
            assert other is None or names.index(other) < place
    # No data set at hand is for these; docs/benchmarks.md says so.
    without = {"image_multi_label", "image_text_contrastive", "speech_recognition_seq2seq"}
    without |= {"semantic_segmentation", "object_detection", "image_chat"}
    assert {item.family for item in tasks.RUNS.values()} == set(FAMILIES) - without


def test_a_row_without_its_data_or_model_is_left_out(tasks: Any, tmp_path: Path) -> None:
    def arguments(*given: str) -> Any:
        return tasks.parse_arguments([*given, "--output", str(tmp_path / "out" / "results.json")])

    (tmp_path / "fewclue_bustm").mkdir()
    for given, name, why in [
        ((), "banking77", "no folder banking77 in --data"),
        (("--data", ""), "banking77", "no folder banking77 in --data"),
        (("--data", str(tmp_path)), "banking77", "no folder banking77 in --data"),
        ((), "ml-100k", r"no recbole-1\.2\.1-py3-none-any\.whl in --wheels"),
        (("--data", str(tmp_path)), "fewclue_bustm", "no folder me5-small in --models"),
    ]:
        with pytest.raises(tasks.RunError, match=why):
            tasks.train_arguments(arguments(*given), name)
    assert "task.data.path=cache://movie-reviews" in tasks.train_arguments(
        arguments(), "movie_reviews"
    )


def test_commands_are_shown_without_the_folders_of_this_machine(tasks: Any, tmp_path: Path) -> None:
    data = tmp_path / "sets"
    args = tasks.parse_arguments(["--data", f"{data}/", "--output", str(tmp_path / "r" / "x.json")])
    given = [f"task.data.path={data}/sick", f"run.dir={tmp_path}/r/sick", "lora.r=8", f"x={data}s"]
    assert tasks.shown(args, given) == [
        "task.data.path=DATA/sick",
        "run.dir=RUNS/sick",
        "lora.r=8",
        f"x={data}s",
    ]


def test_rows_are_chosen_by_name_in_any_order(tasks: Any) -> None:
    wanted = tasks.parse_arguments(["--only", "wnut17, banking77"]).wanted
    assert wanted == ["wnut17", "banking77"]
    assert tasks.parse_arguments([]).wanted == list(tasks.RUNS)
    assert tasks.parse_arguments(["--table"]).wanted == []
    with pytest.raises(SystemExit):
        tasks.parse_arguments(["--only", "wnut"])


def test_the_strongest_baseline_is_to_be_beaten(tasks: Any, found: dict[str, Any]) -> None:
    name = "sick_likeness"
    line = tasks.cells(name, {name: found})
    assert line == [
        *(name, "text regression", "minilm", "1,500", "1,000", "pearson", "0.100"),
        *("0.600 cosine", "**0.765**", "59", "61", "0.50"),
    ]
    found["baselines"]["other"] = {"pearson": 0.77}
    assert tasks.cells(name, {name: found})[-5:-3] == ["0.770 other", "0.765 (not better)"]


def test_less_perplexity_is_better(tasks: Any, found: dict[str, Any]) -> None:
    name = "ag_news_words"
    found |= {"base": {"perplexity": 40000.0}, "adapter": {"perplexity": 883.9}}
    found["baselines"] = {"unigram": {"perplexity": 1500.4}, "worse": {"perplexity": 1e6}}
    assert tasks.cells(name, {name: found})[6:9] == ["40,000", "1,500 unigram", "**884**"]


def test_a_row_that_starts_otherwise_is_compared_with_the_plain_one(
    tasks: Any, found: dict[str, Any]
) -> None:
    name, plain = "ag_news_after_words", "ag_news"
    found |= {"adapter": {"accuracy": 0.85}, "baselines": {"words": {"accuracy": 0.8}}}
    results = {name: found, plain: {**found, "adapter": {"accuracy": 0.86}}}
    assert tasks.best_baseline(name, results) == ("row ag_news", 0.86)
    assert tasks.best_baseline(name, {name: found}) == ("words", 0.8)


def test_what_is_written_is_compared_with_the_model_before(
    tasks: Any, found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    said = dict.fromkeys(tasks.WRITTEN, 1.0)
    found |= {"base": {**said, "chrf": 12.5}, "adapter": {**said, "chrf": 99.0}, "baselines": {}}
    results = {"tech_support": found}
    assert tasks.best_baseline("tech_support", results) == ("untrained", 12.5)
    tasks.print_table(results)
    shown = capsys.readouterr().out
    assert "| tech_support | 1.000 → 1.000 | 1.000 → 1.000 | 12.500 → 99.000 |" in shown


def test_a_failed_row_loses_no_other_and_a_known_row_is_not_run_again(
    tasks: Any,
    found: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "results.json"
    (tmp_path / "sick").mkdir()
    ran = []

    def measure(item: Any, arguments: list[str], folder: Path) -> dict[str, Any]:
        ran.append(item.family)
        if item.family == "text_classification":
            raise tasks.RunError("it ended with exit code 2")
        return found

    monkeypatch.setattr(tasks, "measure", measure)
    line = [
        "tasks.py",
        "--data",
        str(tmp_path),
        "--only",
        "sick_inference,sick_likeness",
        "--output",
        str(output),
    ]
    monkeypatch.setattr(tasks.sys, "argv", line)
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            tasks.main()
        assert ended.value.code == 1
    assert ran == ["text_classification", "text_regression", "text_classification"]
    assert list(json.loads(output.read_text())) == ["sick_likeness"]
    told = capsys.readouterr()
    assert "error: sick_inference: it ended with exit code 2" in told.err
    assert "| sick_likeness | text regression |" in told.out
    assert "# sick_likeness\nlora-cli train model=minilm task=text_regression" in told.out
    assert str(tmp_path) not in told.out


def test_the_result_of_a_command_is_its_last_line(tasks: Any) -> None:
    assert tasks._result(["-c", "print('told'); print('{\"x\": 1}')"]) == {"x": 1}
    with pytest.raises(tasks.RunError, match="exit code 3"):
        tasks._result(["-c", "raise SystemExit(3)"])
