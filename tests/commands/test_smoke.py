import json
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_cli.commands import smoke
from lora_cli.commands.models import suited_families
from lora_cli.config.groups import group_options, option_values, option_variant
from lora_cli.tasks.table import FAMILIES

BASE = ("train", "model=bert", "smoke=true")
# A model that has the head of a family, and what is said of it.
BERT = ("bert", "bert of 12 layers for google-bert/bert-base-uncased")
SOUNDS = ("wav2vec2-base", "wav2vec2 of 12 layers for facebook/wav2vec2-base")
OTHERS = {
    "AutoModelForAudioClassification": SOUNDS,
    "AutoModelForCTC": SOUNDS,
    "AutoModelForImageClassification": ("vit", "vit of 12 layers for google/vit-base-patch16-224"),
    "AutoModelForZeroShotImageClassification": (
        "siglip-base",
        "siglip of 12 layers for google/siglip-base-patch16-224",
    ),
    "AutoModelForSemanticSegmentation": ("segformer-b0", "segformer of 4 layers for nvidia/mit-b0"),
    "AutoModelForObjectDetection": ("yolos-tiny", "yolos of 12 layers for hustvl/yolos-tiny"),
    "AutoModelForImageTextToText": (
        "smolvlm-256m",
        "idefics3 of 30 layers for HuggingFaceTB/SmolVLM-256M-Instruct",
    ),
    "AutoModelForSpeechSeq2Seq": ("whisper-tiny", "whisper of 4 layers for openai/whisper-tiny"),
    "AutoModelForSeq2SeqLM": ("flan-t5-small", "t5 of 8 layers for google/flan-t5-small"),
    "AutoModelForCausalLM": ("gpt2", "gpt2 of 12 layers for openai-community/gpt2"),
}

# A task with a name of each kind of model; the first that suits is taken.
NAMED = {
    "text_classification": "sst2",
    "image_classification": "beans",
    "audio_classification": "esc50",
    "image_text_contrastive": "flickr8k",
    "semantic_segmentation": "sidewalk",
    "object_detection": "cppe5",
    "image_chat": "vqa_rad",
    "seq2seq": "multi30k_en_de",
}


def model_of(family: str) -> tuple[str, str]:
    return OTHERS.get(FAMILIES[family].auto_class, BERT)


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_goes_the_whole_way(
    run_cli: Callable[..., Any], tmp_path: Path, own_temporary_folder: Path, family: str
) -> None:
    place = tmp_path / "here"
    place.mkdir()
    model, told = model_of(family)
    task = (f"task={family}", "task.data.path=somebody/rows")
    done = run_cli("train", f"model={model}", "smoke=true", *task, "--json", cwd=place)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["smoke"] == "passed"
    assert set(result["stages"]) == {"train", "eval", "merge", "predict"}
    assert "rows are made up, since somebody/rows is on the hub, which is not asked" in done.err
    assert f"a narrow random {told}" in done.err
    assert "predict  4 rows" in done.err
    assert list(place.iterdir()) == []
    assert list(own_temporary_folder.glob("lora-cli-*")) == []


def named_tasks() -> list[str]:
    return [name for name in group_options("task") if name not in FAMILIES]


@pytest.mark.slow
@pytest.mark.parametrize("task", named_tasks())
def test_every_named_task(run_cli: Callable[..., Any], tmp_path: Path, task: str) -> None:
    model, _ = model_of(option_variant("task", task))
    done = run_cli("train", f"model={model}", f"task={task}", "smoke=true", cwd=tmp_path)
    assert done.code == 0, done.err


@pytest.mark.slow
def test_a_quantized_base_may_give_other_numbers(
    run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    done = run_cli(*BASE, "task=sst2", "model.quantization=nf4", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "read back, and put into the base in full precision" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("model", group_options("model"))
def test_every_named_model(run_cli: Callable[..., Any], tmp_path: Path, model: str) -> None:
    kind = option_values("model", model)["model.architecture"]
    families = suited_families([kind])[kind]
    task = next(task for family, task in NAMED.items() if family in families)
    done = run_cli("train", f"model={model}", f"task={task}", "smoke=true", cwd=tmp_path)
    assert done.code == 0, done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [
        f"{group}={name}"
        for group in ("lora", "strategy", "optimizer", "scheduler", "trainer")
        for name in group_options(group)
        if name != "adamw_8bit"  # of a package that need not be there
    ],
)
def test_every_choice(run_cli: Callable[..., Any], tmp_path: Path, choice: str) -> None:
    done = run_cli(*BASE, "task=sst2", choice, cwd=tmp_path)
    assert done.code == 0, done.err


def test_own_model_and_rows_are_used(
    run_cli: Callable[..., Any], tiny_model_dir: Callable[..., Path], toy_reviews: Path
) -> None:
    recipe = toy_reviews.parent / "recipe.yaml"
    settings: dict[str, Any] = {
        "model": {"path": str(tiny_model_dir())},
        "task": {"data": {"path": toy_reviews.name}, "max_length": 32},
        "lora": {"layers": [1], "r": 4},
        "trainer": {"epochs": 50, "micro_batch_size": 4, "tf32": True},
        "distributed": {"num_processes": 2},
        "tracker": ["wandb"],
        "smoke": True,
    }
    recipe.write_text(yaml.safe_dump(settings))
    done = run_cli("train", recipe.name, cwd=toy_reviews.parent)
    assert done.code == 0, done.err
    assert f"data: at most 16 rows of {toy_reviews}" in done.err
    assert "model: a narrow random bert of 2 layers for" in done.err
    assert "with a tokenizer made" not in done.err
    assert "left out: tracker, distributed, trainer.tf32" in done.err
    assert not (toy_reviews.parent / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["lora.layers=[12]"], "lora."),
        (["lora.targets=[nothing]"], "lora.unmatched"),
        (["model.path=some/model"], "model.hub-unreachable"),
        (["model.path=no/such/folder"], "model.no-such-folder"),
        (["model.path=some/model", "model.architecture=robrta"], "model.unknown-architecture"),
        (["task.max_length=3"], "config."),
    ],
)
def test_what_is_wrong_is_found(
    run_cli: Callable[..., Any], tmp_path: Path, settings: list[str], problem: str
) -> None:
    done = run_cli(*BASE, "task=sst2", *settings, cwd=tmp_path)
    assert done.code == 2
    assert f"error[{problem}" in done.err
    if problem == "model.hub-unreachable":
        assert "model.architecture=TYPE" in done.err


def test_bad_rows_are_found(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\na,x\n,y\nb,x\nc,y\n" * 9)
    done = run_cli(*BASE, "task.data.path=rows.csv", cwd=tmp_path)
    assert done.code == 2
    assert "rows.csv row 2 (empty)" in done.err, done.err


def test_rows_of_many_to_a_user_with_dates_are_tried(
    run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"user": n // 120, "history": "h", "candidate": f"c {n}", "label": n % 3 % 2, "day": day}
        for n in range(360)
        for day in [date(2024, 1, 1 + n % 30)]
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    task = ("task=ranking", "task.data.path=rows.parquet", "task.data.time_column=day")
    done = run_cli(*BASE, *task, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "predict  4 rows" in done.err


def test_an_expected_architecture_is_compared_in_a_plain_run(
    run_cli: Callable[..., Any], tiny_model_dir: Callable[..., Path], toy_reviews: Path
) -> None:
    model, data = f"model.path={tiny_model_dir()}", f"task.data.path={toy_reviews}"
    wrong = ("model.architecture=roberta", "model.num_layers=3")
    done = run_cli("train", model, data, *wrong, cwd=toy_reviews.parent)
    assert done.code == 2
    assert "`model.architecture` must be that of the model, bert, but is roberta" in done.err
    assert "`model.num_layers` must be that of the model, 2, but is 3" in done.err


def test_an_adapter_that_is_read_back_wrongly_is_found(
    run_cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = smoke.evaluating.run

    def spoiled(composed: Any, options: Any, display: Any) -> int:
        code = evaluate(composed, options, display)
        display.found["adapter"]["loss"] += 1e-3
        return code

    monkeypatch.setattr(smoke.evaluating, "run", spoiled)
    done = run_cli(*BASE, "task=sst2", cwd=tmp_path)
    assert done.code == 1
    assert "error[smoke.other-metrics]" in done.err


def test_several_processes_are_refused(
    run_cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke, "world_size", lambda: 2)
    done = run_cli(*BASE, "task=sst2", cwd=tmp_path)
    assert done.code == 2
    assert "error[smoke.one-process]" in done.err
