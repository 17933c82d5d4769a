"""Question answering through every command, on a tiny model and windows of long contexts."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import peft
import pytest
import torch
import transformers

from lora_cli.metrics.answers import word_scores

GOOD = ("good", "great", "warm", "fine")
NEUTRAL = ("film", "story", "city", "night", "was", "with", "very", "and", "music", "day")


def make_row(draw: random.Random, number: int) -> dict[str, Any]:
    """A context, now and then a long one, whose only good word is the answer, if there is one."""
    words, found = draw.choices(NEUTRAL, k=40 if number % 5 == 0 else 8), []
    if number % 4:
        place = draw.randint(0, len(words))
        words.insert(place, draw.choice(GOOD))
        found = [{"text": words[place], "answer_start": len(" ".join([*words[:place], ""]))}]
    context = " ".join(words)
    return {"id": f"q{number}", "context": context, "question": "see good", "answers": found}


@pytest.fixture(scope="module")
def qa_run(train_family: Callable[..., Any]) -> Any:
    draw, files = random.Random(5), {}
    for split, count in (("train", 96), ("validation", 24), ("test", 24)):
        rows = [make_row(draw, number) for number in range(count)]
        files[f"{split}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    return train_family(
        "question_answering",
        files,
        "task.max_length=32",
        "task.n_best=3",
        "lora.targets=all-linear",
        "lora.r=8",
        "optimizer.lr=0.01",
        "trainer.max_steps=24",
    )


def test_it_learns_and_says_what_a_threshold_would_do(qa_run: Any) -> None:
    result = qa_run.result
    assert set(result["adapter"]) == {
        *("exact_match", "f1", "has_answer_exact_match", "has_answer_f1", "no_answer_accuracy"),
        *("best_exact_match", "best_exact_match_threshold", "best_f1", "best_f1_threshold", "loss"),
    }
    assert result["adapter"]["f1"] > 0.6 > result["base"]["f1"]
    assert result["adapter"]["best_f1"] >= result["adapter"]["f1"]
    assert result["merged"] == pytest.approx(result["adapter"], abs=1e-4)
    card = (qa_run.path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForQuestionAnswering" in card


def test_all_forms_say_the_same(qa_run: Any, run_cli: Any, tmp_path: Path) -> None:
    merged, exported = tmp_path / "merged", tmp_path / "model.onnx"
    for command, output in (("merge", merged), ("export", exported)):
        done = run_cli(command, qa_run.path, f"output={output}", "--json", cwd=tmp_path)
        assert done.code == 0, done.err
        assert done.lines[0]["max_abs_difference"] < 1e-4
    forms = (f"merged={merged}", f"exported={exported}")
    done = run_cli("eval", qa_run.path, *forms, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    found = done.lines[0]
    assert found["split"] == "test"
    for form in ("merged", "exported"):
        assert found[form] == pytest.approx(found["adapter"], abs=1e-4)
    config = transformers.AutoConfig.from_pretrained(merged)
    assert config.architectures == ["BertForQuestionAnswering"]
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["start_logits", "end_logits"]


def test_answers_are_parts_of_the_context(qa_run: Any, run_cli: Any, tmp_path: Path) -> None:
    text = (qa_run.data / "test.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    stdin = "".join(json.dumps({**row, "answers": None}) + "\n" for row in rows).encode()
    done = run_cli("predict", qa_run.path, cwd=tmp_path, stdin=stdin)
    assert done.code == 0, done.err
    assert run_cli("eval", qa_run.path, "--quiet", cwd=tmp_path).code == 0
    known = (qa_run.path / "predictions" / "test.jsonl").read_text().splitlines()
    exact = 0.0
    for row, line, other in zip(rows, done.lines, map(json.loads, known), strict=True):
        assert (line["id"], line["context"]) == (row["id"], row["context"])
        assert line["answer"] == other["answer"]
        assert other["reference"] == [answer["text"] for answer in row["answers"]]
        assert len(line["n_best"]) == 3
        for one in line["n_best"]:
            assert one["text"] == row["context"][one["start"] : one["end"]] != ""
        top = line["n_best"][0]
        said = (line["answer"], line["start"], line["end"], line["score"])
        is_said = line["no_answer_score"] <= 0
        assert said == (tuple(top.values()) if is_said else ("", None, None, None))
        exact += word_scores(line["answer"], other["reference"])[0]
    result = run_cli("eval", qa_run.path, "--json", cwd=tmp_path).lines[0]
    assert result["adapter"]["exact_match"] == pytest.approx(exact / len(rows))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_says_the_same(qa_run: Any, tmp_path: Path, run_cli: Any) -> None:
    auto = transformers.AutoModelForQuestionAnswering
    base = auto.from_pretrained(qa_run.base)
    loaded = peft.PeftModel.from_pretrained(base, qa_run.path / "adapter").eval()
    assert type(loaded) is peft.PeftModel
    done = run_cli("merge", qa_run.path, f"output={tmp_path / 'm'}", "--quiet", cwd=tmp_path)
    assert done.code == 0, done.err
    merged = auto.from_pretrained(tmp_path / "m").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    inputs = tokenizer("see good", "the film was good", return_tensors="pt")
    assert inputs["token_type_ids"].any()
    with torch.no_grad():
        first, second = loaded(**inputs), merged(**inputs)
    for name in ("start_logits", "end_logits"):
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-4)


def test_an_adapter_is_trained_on(qa_run: Any, run_cli: Any, tmp_path: Path) -> None:
    kept = [s for s in qa_run.settings if not s.startswith(("lora.", "trainer."))]
    more = ("trainer.max_steps=1", f"adapter={qa_run.path}", "run.dir=again", "--quiet")
    done = run_cli("train", *kept, *more, cwd=tmp_path)
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "again" / "result.json").read_text())
    assert result["start"] == pytest.approx(qa_run.result["adapter"], abs=1e-5)


def test_a_prefix_is_not_said_to_load_in_peft(qa_run: Any, run_cli: Any, tmp_path: Path) -> None:
    kept = [s for s in qa_run.settings if not s.startswith(("lora.", "trainer."))]
    more = ("strategy=prefix", "trainer.max_steps=1", "run.dir=p", "--quiet")
    assert run_cli("train", *kept, *more, cwd=tmp_path).code == 0
    card = (tmp_path / "p" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "PeftModel" not in card
    assert "answer as if there were no prefix" in card
    done = run_cli("export", "p", "format=peft", cwd=tmp_path)
    assert done.code == 2
    assert "error[export.not-peft]" in done.err


@pytest.mark.parametrize(
    ("setting", "id_"),
    [
        ("task.stride=20", "task.stride"),
        ("task.max_length=65", "task.max-length"),
        ("task.data.answers_column=context", "data.bad-answers"),
        ("task.data.tokens_column=x", "config.not-read"),
    ],
)
def test_what_cannot_be_is_refused(
    qa_run: Any, run_cli: Any, tmp_path: Path, setting: str, id_: str
) -> None:
    kept = [s for s in qa_run.settings if s.partition("=")[0] != setting.partition("=")[0]]
    done = run_cli("train", *kept, setting, "run.dir=b", cwd=tmp_path)
    assert done.code == 2
    assert f"error[{id_}]" in done.err
    assert not (tmp_path / "b").exists()
