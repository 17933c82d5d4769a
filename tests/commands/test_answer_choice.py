"""Choice among answers through every command, on tiny decoders."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from trained_run import TrainedRun

ANSWERS = 'task.answers={negative: "very bad", positive: good}'


@pytest.fixture(scope="module")
def choice_run(
    run_cli: Any,
    tiny_run: Any,
    tiny_language_dir: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> TrainedRun:
    cwd, base = tmp_path_factory.mktemp("answers"), tiny_language_dir("llama")
    settings = (
        f"model.path={base}",
        "task=answer_choice",
        f"task.data.path={tiny_run.data}",
        "task.prompt={text} it was",
        ANSWERS,
        "task.max_length=24",
        "lora.targets=all-linear",
        "lora.r=8",
        "optimizer.lr=0.01",
        "trainer.epochs=10",
        "trainer.global_batch_size=16",
    )
    finished = run_cli("train", *settings, "run.name=a", "--quiet", cwd=cwd)
    assert finished.code == 0, finished.err
    return TrainedRun(cwd / "runs" / "a", base, tiny_run.data, settings)


def test_it_learns(choice_run: TrainedRun) -> None:
    base, adapter = choice_run.result["base"], choice_run.result["adapter"]
    assert set(adapter) == {"accuracy", "macro_f1", "matthews_correlation", "loss"}
    assert adapter["accuracy"] > 0.8 > base["accuracy"]
    assert adapter["loss"] < base["loss"] / 2
    assert choice_run.result["merged"] == pytest.approx(adapter, abs=1e-3)
    config = json.loads((choice_run.path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert "AutoModelForCausalLM" in (choice_run.path / "adapter" / "README.md").read_text()


def test_all_forms_choose_the_same(choice_run: TrainedRun, run_cli: Any, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    done = run_cli("merge", choice_run.path, f"output={merged}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.lines[0]["max_abs_difference"] < 1e-3
    done = run_cli("eval", choice_run.path, f"merged={merged}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    found = done.lines[0]
    assert found["merged"] == pytest.approx(found["adapter"], abs=1e-3)
    done = run_cli("export", choice_run.path, "format=onnx", "output=m.onnx", cwd=tmp_path)
    assert done.code == 2
    assert "error[export.no-onnx]" in done.err


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_predictions_are_those_of_peft(
    choice_run: TrainedRun, run_cli: Any, tmp_path: Path
) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(choice_run.base)
    model = peft.PeftModel.from_pretrained(base, choice_run.path / "adapter").eval()
    assert type(model) is peft.PeftModelForCausalLM
    tokenizer = transformers.AutoTokenizer.from_pretrained(choice_run.base)
    text = "the film was good and warm"
    done = run_cli("predict", choice_run.path, f"text={text}", cwd=tmp_path)
    assert done.code == 0, done.err
    (line,) = done.lines
    scores = []
    for answer in ("very bad", "good"):
        prompt = tokenizer(f"{text} it was")["input_ids"]
        ids = torch.tensor([tokenizer(f"{text} it was {answer}")["input_ids"]])
        with torch.no_grad():
            said = model(input_ids=ids).logits[0].log_softmax(-1)
        places = range(len(prompt), ids.shape[1])
        scores.append(sum(float(said[n - 1, ids[0, n]]) for n in places) / len(places))
    wanted = torch.tensor(scores).softmax(-1).tolist()
    names = ("negative", "positive")
    assert line["probabilities"] == pytest.approx(dict(zip(names, wanted, strict=True)), abs=1e-4)
    assert line["label"] == names[int(wanted[1] > wanted[0])]


def test_an_adapter_is_trained_on(choice_run: TrainedRun, run_cli: Any, tmp_path: Path) -> None:
    kept = [s for s in choice_run.settings if not s.startswith(("lora.", "trainer."))]
    more = ("trainer.max_steps=1", f"adapter={choice_run.path}", "run.dir=again", "--quiet")
    done = run_cli("train", *kept, *more, cwd=tmp_path)
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "again" / "result.json").read_text())
    assert result["start"] == pytest.approx(choice_run.result["adapter"], abs=1e-3)


def test_recommendations_are_yes_or_no(
    run_cli: Any, tiny_language_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Who likes a good film likes another good one; the columns are put into the prompt."""
    good, bad = ("good", "great", "warm", "fine"), ("bad", "awful", "dull", "poor")
    rows = [
        {"history": [a, b], "candidate": c, "click": int((a in good) == (c in good))}
        for pair in (good, bad)
        for a, b in pairwise(pair)
        for c in (*good, *bad)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_cli(
        "train", f"model.path={tiny_language_dir('gpt2')}", "task=answer_choice",
        f"task.data.path={data}", "task.data.text_column=candidate",
        "task.data.label_column=click", 'task.answers={"0": no, "1": "yes"}',
        "task.prompt=person likes {history} . watch {text} ?", "trainer.max_steps=2",
        "optimizer.lr=0.01", "task.max_length=32", "run.dir=r", "--quiet", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    stdin = json.dumps({"history": ["good", "fine"], "candidate": "warm"}).encode()
    done = run_cli("predict", "r", cwd=tmp_path, stdin=stdin)
    assert done.code == 0, done.err
    assert set(done.lines[0]["probabilities"]) == {"0", "1"}
    done = run_cli("predict", "r", cwd=tmp_path, stdin=b'{"candidate": "warm"}')
    assert done.code == 2
    assert "error[data.bad-prompt-value]" in done.err


@pytest.mark.parametrize(
    ("setting", "id_"),
    [
        ("task.prompt=it was", "task.bad-prompt"),
        ("task.prompt={text} {nothing}", "data.bad-prompt-value"),
        ("task.answers={negative: bad}", "task.bad-answers"),
        ("task.max_length=65", "task.max-length"),
        ("trainer.label_smoothing=0.1", "config.not-read"),
    ],
)
def test_what_cannot_be_is_refused(
    choice_run: TrainedRun, run_cli: Any, tmp_path: Path, setting: str, id_: str
) -> None:
    kept = [s for s in choice_run.settings if s.partition("=")[0] != setting.partition("=")[0]]
    done = run_cli("train", *kept, setting, "run.dir=b", cwd=tmp_path)
    assert done.code == 2
    assert f"error[{id_}]" in done.err
    assert not (tmp_path / "b").exists()


def test_an_encoder_and_a_decoder_choose(
    run_cli: Any, tiny_run: Any, tiny_language_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_language_dir("bart")
    done = run_cli(
        "train", f"model.path={base}", "task=answer_choice_seq2seq",
        f"task.data.path={tiny_run.data}", "task.prompt={text} it was", ANSWERS,
        "task.max_length=24", "lora.targets=all-linear", "lora.r=8", "optimizer.lr=0.01",
        "trainer.max_steps=30", "trainer.global_batch_size=16", "run.dir=r", "--quiet",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["adapter"]["accuracy"] > result["base"]["accuracy"]
    assert result["merged"] == pytest.approx(result["adapter"], abs=1e-3)
    config = json.loads((tmp_path / "r" / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    done = run_cli("predict", "r", "text=the film was good", cwd=tmp_path)
    assert done.code == 0, done.err
    assert set(done.lines[0]["probabilities"]) == {"negative", "positive"}
