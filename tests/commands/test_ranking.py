"""Ranking through every command, on a tiny model and rows that can be learned."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from sklearn.metrics import ndcg_score, roc_auc_score

BAD, GOOD = ("bad", "awful", "dull", "poor"), ("good", "great", "warm", "fine")


def user_rows(draw: random.Random, user: str) -> list[dict[str, Any]]:
    """Good films are clicked, three times of four; there is one that is, and one that is not."""
    rows, history = [], [f"film {draw.choice(GOOD)}", "the city"]
    for number in range(6):
        good = number == 0 or (number > 1 and draw.random() < 0.5)
        row = {
            "user": user,
            "history": history,
            # No two alike: the order of equal scores would be a matter of rounding.
            "candidate": f"a {draw.choice(GOOD if good else BAD)} story {number}",
            "clicked": int(good if number < 2 or draw.random() < 0.75 else not good),
            "day": number,
        }
        rows.append(row)
    return rows


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(jsonl(rows))


@pytest.fixture(scope="module")
def run(train_family: Callable[..., Any]) -> Any:
    draw, files = random.Random(5), {}
    for split, count in (("train", 24), ("validation", 6), ("test", 6)):
        users = [user_rows(draw, f"{split} {number}") for number in range(count)]
        files[f"{split}.jsonl"] = jsonl([row for rows in users for row in rows])
    settings = ("task.max_length=32", "task.k=2", "trainer.epochs=4")
    return train_family("ranking", files, *settings)


def predict(run_cli: Any, run: Any, cwd: Path, rows: list[dict[str, Any]]) -> Any:
    stdin = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return run_cli("predict", run.path, cwd=cwd, stdin=stdin)


def test_training_learns(run: Any) -> None:
    assert "% clicked" in run.said.err
    assert set(run.result["adapter"]) == {"auc", "ndcg", "hit_rate", "mrr", "auc_all", "loss"}
    assert run.result["adapter"]["auc"] > 0.65
    assert run.result["adapter"]["loss"] < run.result["base"]["loss"]
    assert run.result["merged"] == pytest.approx(run.result["adapter"], abs=1e-5)


def test_metrics_are_those_of_scikit_learn_on_the_written_predictions(
    run: Any, run_cli: Any, tmp_path: Path
) -> None:
    done = run_cli("eval", run.path, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    text = (run.path / "predictions" / "test.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    users = {line["user"] for line in lines}
    aucs, ndcgs = [], []
    for user in users:
        own = [line for line in lines if line["user"] == user]
        clicked, scores = [x["reference"] for x in own], [x["score"] for x in own]
        aucs.append(roc_auc_score(clicked, scores))
        ndcgs.append(ndcg_score([clicked], [scores], k=2))
    found = done.lines[0]["adapter"]
    assert len(users) == 6
    assert found["auc"] == pytest.approx(np.mean(aucs))
    assert found["ndcg"] == pytest.approx(np.mean(ndcgs))
    every = roc_auc_score([x["reference"] for x in lines], [x["score"] for x in lines])
    assert found["auc_all"] == pytest.approx(every)


def test_all_forms_say_the_same(run: Any, run_cli: Any, tmp_path: Path) -> None:
    exported = tmp_path / "model.onnx"
    done = run_cli("export", run.path, f"output={exported}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.lines[0]["max_abs_difference"] < 1e-4
    done = run_cli("merge", run.path, f"output={tmp_path / 'm'}", "--json", cwd=tmp_path)
    assert done.lines[0]["max_abs_difference"] < 1e-4
    forms = (f"merged={tmp_path / 'm'}", f"exported={exported}")
    done = run_cli("eval", run.path, *forms, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    for form in ("merged", "exported"):
        assert done.lines[0][form] == pytest.approx(done.lines[0]["adapter"], abs=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_list_of_candidates_is_ranked_as_each_is_scored(
    run: Any, run_cli: Any, tmp_path: Path
) -> None:
    texts = ["a bad story", "a good story", "the city was long", "a great film"]
    row = {"id": "x", "history": ["film good", "the city"], "who": 7}
    singles = [{**row, "candidate": text} for text in texts]
    done = predict(run_cli, run, tmp_path, [{**row, "candidates": texts}])
    assert done.code == 0, done.err
    (line,) = done.lines
    assert (line["id"], line["who"], line["candidates"]) == ("x", 7, texts)
    ranking = line["ranking"]
    assert [entry["rank"] for entry in ranking] == [1, 2, 3, 4]
    assert {entry["candidate"] for entry in ranking} == set(texts)
    scores = [entry["score"] for entry in ranking]
    assert scores == sorted(scores, reverse=True)
    alone = predict(run_cli, run, tmp_path, singles).lines
    by_text = {entry["candidate"]: entry["score"] for entry in ranking}
    assert {one["candidate"]: one["score"] for one in alone} == pytest.approx(by_text, abs=1e-5)
    auto_class = transformers.AutoModelForSequenceClassification
    base = auto_class.from_pretrained(run.base, num_labels=1)
    loaded = peft.PeftModel.from_pretrained(base, run.path / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.base)
    pairs = [("film good; the city", text) for text in texts]
    with torch.no_grad():
        logits = loaded(**tokenizer(pairs, padding=True, return_tensors="pt")).logits
    expected = dict(zip(texts, logits.squeeze(-1).sigmoid().tolist(), strict=True))
    assert by_text == pytest.approx(expected, abs=1e-5)


def test_lists_train_and_evaluate_without_users(run: Any, run_cli: Any, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        rows = [json.loads(x) for x in (run.data / f"{split}.jsonl").read_text().splitlines()]
        lists = [
            {
                "history": rows[start]["history"],
                "candidates": [row["candidate"] for row in rows[start : start + 6]],
                "labels": [row["clicked"] for row in rows[start : start + 6]],
            }
            for start in range(0, len(rows), 6)
        ]
        write(tmp_path / f"{split}.jsonl", lists)
    settings = [s for s in run.settings if not s.startswith(("task.data", "trainer."))]
    settings += [f"task.data.path={tmp_path}", "trainer.max_steps=2", "run.dir=lists", "--quiet"]
    done = run_cli("train", *settings, cwd=tmp_path)
    assert done.code == 0, done.err
    # Each list holds the rows of a user, so the adapter that was trained on rows scores alike.
    done = run_cli(
        "eval", run.path, f"task.data.path={tmp_path}/test.jsonl", "--json", cwd=tmp_path
    )
    assert done.code == 0, done.err
    known = run_cli("eval", run.path, "--json", cwd=tmp_path).lines[0]
    assert done.lines[0]["rows"] == 6
    assert done.lines[0]["adapter"] == pytest.approx(known["adapter"], abs=1e-5)


def test_users_without_clicks_are_refused_or_skipped(
    run: Any, run_cli: Any, tmp_path: Path
) -> None:
    rows = [json.loads(x) for x in (run.data / "test.jsonl").read_text().splitlines()]
    for row in rows[6:12]:
        row["clicked"] = 0
    write(tmp_path / "new.jsonl", rows)
    done = run_cli("eval", run.path, f"task.data.path={tmp_path}/new.jsonl", cwd=tmp_path)
    assert done.code == 2
    assert "error[data.no-clicks]" in done.err
    assert f"{tmp_path}/new.jsonl row 7 (the user's first row)" in done.err
    (tmp_path / "d").mkdir()
    train = [json.loads(x) for x in (run.data / "train.jsonl").read_text().splitlines()]
    write(tmp_path / "d" / "train.jsonl", train)
    write(tmp_path / "d" / "test.jsonl", rows)
    settings = [s for s in run.settings if not s.startswith(("task.data", "trainer."))]
    settings += [
        f"task.data.path={tmp_path / 'd'}",
        "task.data.time_column=day",
        "task.users_without_clicks=skip",
        "trainer.max_steps=1",
        "run.dir=skip",
    ]
    done = run_cli("train", *settings, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "(10 %, the latest of all users, seed 42)" in done.err


def test_an_adapter_is_trained_on(run: Any, run_cli: Any, tmp_path: Path) -> None:
    kept = [s for s in run.settings if not s.startswith(("lora.", "trainer."))]
    more = ("trainer.max_steps=1", f"adapter={run.path}", "run.dir=again", "--quiet")
    done = run_cli("train", *kept, *more, cwd=tmp_path)
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "again" / "result.json").read_text())
    assert result["start"] == pytest.approx(run.result["adapter"], abs=1e-5)
