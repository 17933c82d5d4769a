"""Sequence to sequence through every command, on tiny models that learn to translate words."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from trained_run import TrainedRun

WORDS = {"good": "bad", "film": "city", "warm": "dull", "story": "night", "music": "scene"}


def make_row(draw: random.Random) -> dict[str, Any]:
    """Each word has a translation of its own."""
    words = draw.choices(list(WORDS), k=draw.randint(1, 2))
    return {"translation": {"en": " ".join(words), "xx": " ".join(WORDS[w] for w in words)}}


def train(run_cli: Any, cwd: Path, base: Path, *more: str) -> TrainedRun:
    data, draw = cwd / "rows", random.Random(5)
    data.mkdir()
    for split, count in (("train", 120), ("validation", 24), ("test", 24)):
        lines = [json.dumps(make_row(draw)) + "\n" for _ in range(count)]
        (data / f"{split}.jsonl").write_text("".join(lines))
    settings = (
        f"model.path={base}",
        "task=seq2seq",
        f"task.data.path={data}",
        "task.data.source_column=translation.en",
        "task.data.target_column=translation.xx",
        "task.max_length=16",
        "task.max_target_length=16",
        "task.generation.max_new_tokens=6",
        "lora.targets=all-linear",
        "lora.r=16",
        "trainer.global_batch_size=24",
        *more,
    )
    finished = run_cli("train", *settings, "run.name=a", "--quiet", cwd=cwd)
    assert finished.code == 0, finished.err
    return TrainedRun(cwd / "runs" / "a", base, data, settings)


@pytest.fixture(scope="module")
def pair_run(
    run_cli: Any, tiny_language_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> TrainedRun:
    more = ("trainer.epochs=30", "trainer.eval_steps=75", "optimizer.lr=0.01")
    cwd = tmp_path_factory.mktemp("seq2seq")
    return train(run_cli, cwd, tiny_language_dir("bart"), *more)


QUICK = ("trainer.max_steps=2", "optimizer.lr=0.01")


def test_it_learns_to_translate(pair_run: TrainedRun) -> None:
    base, adapter = pair_run.result["base"], pair_run.result["adapter"]
    assert set(adapter) == {
        *("perplexity", "token_accuracy", "loss", "bleu", "chrf"),
        *("rouge1", "rouge2", "rougeL", "exact_match", "ended"),
    }
    assert adapter["ended"] > 0.9
    assert base["chrf"] < 10 < 45 < adapter["chrf"]
    assert base["exact_match"] < 0.1 < 0.4 < adapter["exact_match"]
    assert pair_run.result["merged"] == pytest.approx(adapter, abs=1e-3)
    assert pair_run.result["metric"]["name"] == "chrf"
    config = json.loads((pair_run.path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    card = (pair_run.path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForSeq2SeqLM" in card


def test_all_forms_write_the_same(pair_run: TrainedRun, run_cli: Any, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    done = run_cli("merge", pair_run.path, f"output={merged}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.lines[0]["max_abs_difference"] < 1e-3
    done = run_cli("eval", pair_run.path, f"merged={merged}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    found = done.lines[0]
    assert found["split"] == "test"
    assert found["merged"] == pytest.approx(found["adapter"], abs=1e-3)
    assert found["adapter"]["chrf"] > 45 > found["base"]["chrf"]
    listed = (pair_run.path / "predictions" / "test.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in listed]
    exact = sum(line["output"] in line["references"] for line in lines) / len(lines)
    assert exact == pytest.approx(found["adapter"]["exact_match"])
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(merged).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    rows = [json.loads(x) for x in (pair_run.data / "test.jsonl").read_text().splitlines()]
    for row, line in zip(rows, lines, strict=True):
        ids = tokenizer(row["translation"]["en"], return_tensors="pt")["input_ids"]
        told = model.generate(ids, max_new_tokens=6, num_beams=1, do_sample=False)
        assert tokenizer.decode(told[0], skip_special_tokens=True) == line["output"]


def test_rows_are_translated(pair_run: TrainedRun, run_cli: Any, tmp_path: Path) -> None:
    assert run_cli("eval", pair_run.path, "--quiet", cwd=tmp_path).code == 0
    listed = (pair_run.path / "predictions" / "test.jsonl").read_text().splitlines()
    known = {line["references"][0]: line["output"] for line in map(json.loads, listed)}
    stdin = (pair_run.data / "test.jsonl").read_bytes()
    done = run_cli("predict", pair_run.path, "batch_size=5", cwd=tmp_path, stdin=stdin)
    assert done.code == 0, done.err
    for line in done.lines:
        assert line["output"] == known[line["translation"]["xx"]]
        assert "references" not in line
    row = json.loads((pair_run.data / "test.jsonl").read_text().splitlines()[0])["translation"]
    alone = run_cli("predict", pair_run.path, f"text={row['en']}", cwd=tmp_path)
    assert alone.code == 0, alone.err
    assert alone.lines[0]["output"] == known[row["xx"]]
    flat = json.dumps({"translation.en": row["en"]}).encode()
    done = run_cli("predict", pair_run.path, cwd=tmp_path, stdin=flat)
    assert done.lines[0]["output"] == known[row["xx"]]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_writes_the_same(pair_run: TrainedRun, run_cli: Any, tmp_path: Path) -> None:
    auto = transformers.AutoModelForSeq2SeqLM
    base = auto.from_pretrained(pair_run.base)
    loaded = peft.PeftModel.from_pretrained(base, pair_run.path / "adapter").eval()
    assert type(loaded) is peft.PeftModelForSeq2SeqLM
    done = run_cli(
        *("export", pair_run.path, "format=hf", f"output={tmp_path / 'hf'}", "--quiet"),
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    merged = auto.from_pretrained(tmp_path / "hf").eval()
    ids = torch.tensor([[10, 11, 12, 3]])
    inputs = {"input_ids": ids, "decoder_input_ids": torch.tensor([[3, 14, 15]])}
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(**inputs).logits, merged(**inputs).logits, atol=1e-3, rtol=1e-3
        )


def test_an_adapter_is_trained_on(pair_run: TrainedRun, run_cli: Any, tmp_path: Path) -> None:
    kept = [s for s in pair_run.settings if not s.startswith(("lora.", "trainer.", "optimizer."))]
    more = (*QUICK, f"adapter={pair_run.path}", "run.dir=again", "--quiet")
    done = run_cli("train", *kept, *more, cwd=tmp_path)
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "again" / "result.json").read_text())
    assert result["start"] == pytest.approx(pair_run.result["adapter"], abs=1e-3)


def test_onnx_is_refused(pair_run: TrainedRun, run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("export", pair_run.path, "format=onnx", "output=m.onnx", cwd=tmp_path)
    assert done.code == 2
    assert "error[export.no-onnx]" in done.err
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("kind", ["t5", "marian", "bert2bert"])
def test_other_architectures_train(
    run_cli: Any, tiny_language_dir: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    more = (*QUICK, "task.metric=loss")
    if kind == "bert2bert":
        more = (*more, "lora.exclude=[encoder.pooler.dense]")
    run = train(run_cli, tmp_path, tiny_language_dir(kind), *more)
    result = run.result
    assert result["adapter"]["loss"] < result["base"]["loss"]
    assert result["merged"]["loss"] == pytest.approx(result["adapter"]["loss"], rel=1e-3)
    done = run_cli("predict", run.path, "text=good film", cwd=tmp_path)
    assert done.code == 0, done.err
    assert set(done.lines[0]) == {"id", "output", "ended", "text"}


def test_beams_and_draws_on_request(pair_run: TrainedRun, run_cli: Any, tmp_path: Path) -> None:
    def outputs(*settings: str) -> list[str]:
        stdin = (pair_run.data / "test.jsonl").read_bytes()
        done = run_cli("predict", pair_run.path, *settings, cwd=tmp_path, stdin=stdin)
        assert done.code == 0, done.err
        return [line["output"] for line in done.lines]

    plain = outputs()
    drawn = ("generation.do_sample=true", "generation.temperature=3")
    assert outputs("generation.num_beams=1") == plain
    assert all(len(text.split()) <= 1 for text in outputs("generation.max_new_tokens=1"))
    assert outputs(*drawn) != plain
    assert (
        outputs(*drawn) == outputs(*drawn, "batch_size=3") != outputs(*drawn, "generation.seed=1")
    )


@pytest.mark.parametrize(
    ("setting", "id_"),
    [
        ("task.max_length=65", "task.max-length"),
        ("task.max_target_length=65", "task.max-length"),
        ("task.source_language=en_XX", "task.no-languages"),
        ("task.generate_in_eval=false", "task.needs-texts"),
        ("task.generation.temperature=2", "config.not-read"),
        ("task.generation.length_penalty=2", "config.not-read"),
        ("task.data.target_column=translation.yy", "data.missing-column"),
        ("task.data.target_column=translation", "data.missing-column"),
        ("task.data.text_column=x", "config.not-read"),
    ],
)
def test_what_cannot_be_is_refused(
    pair_run: TrainedRun, run_cli: Any, tmp_path: Path, setting: str, id_: str
) -> None:
    kept = [s for s in pair_run.settings if s.partition("=")[0] != setting.partition("=")[0]]
    done = run_cli("train", *kept, setting, "run.dir=b", cwd=tmp_path)
    assert done.code == 2
    assert f"error[{id_}]" in done.err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("settings", "id_"),
    [
        (("generation.temperature=2",), "config.not-read"),
        (("generation.num_beams=2", "generation.do_sample=true"), "config.contradiction"),
    ],
)
def test_settings_that_do_nothing_are_refused(
    pair_run: TrainedRun, run_cli: Any, tmp_path: Path, settings: tuple[str, ...], id_: str
) -> None:
    done = run_cli("predict", pair_run.path, "text=good", *settings, cwd=tmp_path)
    assert done.code == 2
    assert f"error[{id_}]" in done.err


def test_families_that_do_not_write_refuse_to(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("predict", tiny_run.path, "text=good", "generation.num_beams=2", cwd=tmp_path)
    assert done.code == 2
    assert "error[predict.no-generation]" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_several_processes_write_what_one_writes(
    run_cli: Any, tiny_language_dir: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    """Each writes other rows, of other lengths; with a base that is spread over them as well."""
    found = {}
    for name, more in (
        ("one", ()),
        ("two", ("distributed.num_processes=2",)),
        ("sharded", ("distributed.num_processes=2", "distributed.shard_base=true")),
    ):
        cwd = tmp_path / name
        cwd.mkdir()
        settings = ("trainer.max_steps=1", "optimizer.lr=1e-9", "trainer.eval_batch_size=5", *more)
        run = train(run_cli, cwd, tiny_language_dir(kind), *settings)
        lines = (run.path / "metrics.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        found[name] = [one["metrics"] for one in events if one["event"] == "eval"]
    assert found["one"][0]["chrf"] > 0
    for name in ("two", "sharded"):
        for metrics, wanted in zip(found[name], found["one"], strict=True):
            assert metrics == pytest.approx(wanted, rel=1e-4)
