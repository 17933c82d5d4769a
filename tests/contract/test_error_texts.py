"""Every error of a user's own making, as printed: text, exit code 2, and nothing written.

The texts are in error_texts.txt, one block a case. After a change on purpose:
UPDATE_SNAPSHOTS=1 python -m pytest tests/contract/test_error_texts.py
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from error_folders import make_changed, make_foreign, write_data

from lora_cli.artifacts.commit import document_sha256

SNAPSHOT = Path(__file__).with_name("error_texts.txt")
RULER = "=" * 88
TASK = "train task=text_classification task.data.path=TOY"
TRAIN = "train model.path=MODEL task=text_classification task.max_length=32"
TOY = f"{TRAIN} task.data.path=TOY"

# Case: the command line, split at spaces. MODEL, TOY, RUN and BASE2 are folders; the other files
# are made by `folder`.
CASES = {
    "unknown command": "trian",
    "unknown flag": "train --jsn",
    "unknown key": f"{TOY} lora.rnak=4",
    "unknown group option": "train model=bret task=sst2",
    "unknown section": f"{TOY} lroa.r=4",
    "wrong type": f"{TOY} lora.r=eight",
    "rank below one": f"{TOY} lora.r=0",
    "entry of a mapping": f"{TOY} lora.rank_pattern={{query:0,dense:four}}",
    "setting that is not read": f"{TOY} strategy=full lora.r=4 optimizer=lora_plus",
    "setting of another variant": f"{TOY} lora=vera lora.alpha=32",
    "targets of a name": "targets bert",
    "targets of rows": "targets model.path=MODEL task.data.path=TOY model.sha256=00",
    "flag of another command": "merge RUN --resume",
    "flags that do not go together": f"{TOY} -m lora.r=4,8 --cfg job",
    "schedule of a schedule-free optimizer": f"{TOY} optimizer=schedule_free scheduler=cosine",
    "average of averages": f"{TOY} optimizer=schedule_free trainer.ema_decay=0.99",
    "recomputing with a prefix": f"{TOY} strategy=prefix trainer.gradient_checkpointing=true",
    "time limit that is no time": f"{TOY} trainer.max_time=soon",
    "unknown tracker": f"{TOY} tracker=[csv,tensorbord]",
    "name for no tracker": f"{TOY} tracking.name=x",
    "negative learning rate": f"{TOY} optimizer.lr=-1",
    "learning rate that is no number": f"{TOY} optimizer.lr=nan",
    "two problems": f"{TOY} lora.r=0 optimizer.lr=-1 seed=x",
    "nothing chosen": "train",
    "key twice": f"{TOY} lora.r=4 lora.r=8",
    "contradiction": f"{TOY} trainer.epochs=1 trainer.max_steps=3",
    "targets that match nothing": f"{TOY} lora.targets=[qurey,value]",
    "ranks that an earlier pattern decides": f"{TOY} lora.rank_pattern={{query:4,self.query:8}}",
    "bias in B of layers without one": f"{TOY} lora.lora_bias=true lora.targets=[word_embeddings]",
    "start with a rank too large": f"{TOY} lora=pissa lora.r=999",
    "start from a table": f"{TOY} lora=olora lora.targets=[word_embeddings]",
    "table with another variant": f"{TOY} lora=vera lora.targets=[word_embeddings]",
    "blocks that are not there": f"{TOY} lora.layers=[7]",
    "going on with another rank": "train adapter=RUN task.data.path=TOY lora.r=16",
    "rows longer than the model": f"{TASK} model.path=MODEL task.max_length=65",
    "missing text column": f"{TOY} task.data.text_column=txet",
    "missing label column": f"{TRAIN} task.data.path=nolabel.csv",
    "no data file": f"{TRAIN} task.data.path=none.jsonl",
    "empty data": f"{TRAIN} task.data.path=empty.jsonl",
    "header only": f"{TRAIN} task.data.path=header.csv",
    "one class": f"{TRAIN} task.data.path=oneclass.csv",
    "label unseen in train": f"{TRAIN} task.data.path=unseen",
    "null text": f"{TRAIN} task.data.path=nulls.jsonl",
    "broken row": f"{TRAIN} task.data.path=broken.jsonl",
    "label columns that are no flags": "train model.path=MODEL task=multi_label_classification"
    " task.data.path=flags.csv task.data.label_columns=[rude,toxic]",
    "words a line that do not fit": "train model.path=MODEL task=token_classification"
    " task.data.path=words.conll",
    "not a split": f"{TOY} task.data.validation_split=dev",
    "split used twice": f"{TOY} task.data.validation_split=test",
    "no data file of so long a name": f"{TRAIN} task.data.path={'x' * 300}.csv",
    "model folder missing": f"{TASK} model.path=./none",
    "model without config": f"{TASK} model.path=noconfig",
    "model without weights": f"{TASK} model.path=noweights",
    "model with pickled weights": f"{TASK} model.path=pickled",
    "model with other weights": f"{TASK} model.path=MODEL model.sha256=00",
    "model is an adapter": f"{TASK} model.path=RUN/adapter",
    "data and model": "train task=text_classification model.path=noconfig "
    "task.data.path=empty.jsonl",
    "model hub offline": f"{TASK} model=bert",
    "data hub offline": "train model.path=MODEL task=sst2",
    "data and model hub offline": "train model=bert task=sst2 lora.r=16",
    "run directory exists": f"{TOY} run.dir=taken",
    "run exists": f"{TOY} run.dir=RUN",
    "overwrite of something else": f"{TOY} run.dir=taken --overwrite",
    "run directory below a file": f"{TOY} run.dir=header.csv/a",
    "run name with a path": f"{TOY} run.name=../a",
    "resume of nothing": f"{TOY} run.name=new --resume",
    "resume with other settings": "train RUN/recipe.yaml run.dir=RUN --resume seed=7",
    "resume of a setting that is none": f"{TOY} trainer.resume=nowhere",
    "resume without a whole checkpoint": "train hurt/recipe.yaml run.dir=hurt --resume",
    "resume of a damaged checkpoint": "train half/recipe.yaml "
    "trainer.resume=half/checkpoints/step-00000004",
    "resume on another base": "train based/recipe.yaml run.dir=based --resume",
    "resume on another tokenizer": "train reworded/recipe.yaml run.dir=reworded --resume",
    "resume on other rows": "train rowed/recipe.yaml run.dir=rowed --resume",
    "TF32 without a GPU": f"{TOY} trainer.tf32=true",
    "several processes, of another number": f"{TOY} distributed.num_processes=4",
    "a shared base in one process": f"{TOY} distributed.shard_base=true",
    "a shared base of which all is trained": f"{TOY} distributed.num_processes=2"
    " distributed.shard_base=true strategy=full",
    "DeepSpeed": f"{TOY} trainer.max_steps=1",
    "several processes to evaluate": "eval RUN",
    "recipe missing": "train none.yaml",
    "recipe that is no YAML": "train broken.yaml",
    "recipe with a hydra section": "train hydra.yaml",
    "recipe with a target": "train target.yaml",
    "recipe with a package": "train package.yaml",
    "recipe with hydra in defaults": "train defaults.yaml",
    "recipe with unknown key": "train unknown.yaml",
    "eval of nothing": "eval",
    "eval of no run": "eval runs/none",
    "eval of a name that is too long": f"eval from={'x' * 300}",
    "eval of another base": "eval RUN base=BASE2",
    "eval of a damaged record": "eval damaged",
    "eval of an emptied record": "eval emptied",
    "eval of a changed adapter": "eval changed",
    "eval of another tokenizer": "eval RUN base=reworded-base",
    "eval of a changed merged model": "eval RUN merged=merged-wrong",
    "eval without a split": "eval RUN split=dev",
    "eval setting without rows": "eval RUN task.data.text_column=body",
    "eval of roles": "eval RUN task.data.path=TOY task.data.test_split=validation",
    "eval of no merged model and no export": "eval RUN merged=taken exported=none.onnx",
    "eval of other labels": "eval RUN task.data.path=nulls.csv",
    "merge over something": "merge RUN output=taken",
    "merge over something else": "merge RUN output=taken --overwrite",
    "merge over the adapter": "merge RUN output=RUN/adapter --overwrite",
    "merge of an adapter alone": "merge alone base=MODEL",
    "merge with too few weights": "merge adapters=[RUN,alone] weights=[1] output=new",
    "merge with a setting of another method": "merge adapters=[RUN,alone] density=0.5 output=new",
    "merge of adapters of another base": "merge adapters=[RUN,alone] base=BASE2 output=new",
    "export to an unknown format": "export RUN format=ggml",
    "export of a classifier for llama.cpp": "export RUN format=gguf",
    "status of nothing": "status",
    "status of no run": "status runs/none",
    "predict of no run": "predict runs/none",
    "predict of no input": "predict RUN input=none.jsonl",
    "predict of an empty input": "predict RUN input=empty.jsonl",
    "predict of the wrong columns": "predict RUN input=nocolumn.csv",
    "predict of a null text": "predict RUN input=nulls.jsonl",
    "predict over its input": "predict RUN input=nolabel.csv output=nolabel.csv --overwrite",
    "predict of two inputs": "predict RUN input=nolabel.csv text=x",
    "labels for a task without images": "eval RUN zero_shot.labels=[cat,dog]",
    "prompt without a place for the label": "predict RUN zero_shot.prompt=cat input=rows.jsonl",
    "one label to choose from": "train model=clip-base task=flickr8k task.zero_shot.labels=[cat]"
    " trainer.global_batch_size=8 trainer.micro_batch_size=3",
    "check of nothing": "check",
    "check for no program": "check RUN for=[]",
    "check against no model": "check RUN base=./none",
    "convert of nothing": "convert",
    "convert of a pickle": "convert adapter=foreign/lora.pt output=new",
    "convert of no known format": "convert adapter=foreign/unclear.safetensors output=new",
    "convert of half a pair": "convert adapter=foreign/half.safetensors base=MODEL alpha=8"
    " output=new",
    "convert without base and alpha": "convert adapter=foreign/whole.safetensors output=new",
    "convert of layers of another model": "convert adapter=foreign/whole.safetensors base=MODEL"
    " alpha=8 output=new",
    "convert with a strength that is known": "convert adapter=RUN alpha=8 output=new",
    "convert on another base": "convert adapter=RUN base=BASE2 output=new",
    "eval of an adapter of another program": "eval foreign/whole.safetensors",
}
# What else a case finds in its environment.
VARIABLES = {
    "several processes, of another number": {"WORLD_SIZE": "2"},
    "DeepSpeed": {"ACCELERATE_USE_DEEPSPEED": "true"},
    "several processes to evaluate": {"WORLD_SIZE": "2"},
}


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_run: Any, tiny_model_dir: Callable[..., Path]
) -> Path:
    """The folder that all cases run in; none of them may change it."""
    folder = tmp_path_factory.mktemp("errors")
    write_data(folder)
    shutil.copytree(tiny_run.path, folder / "run", ignore=shutil.ignore_patterns("*.onnx"))
    for name in ("noconfig", "noweights", "pickled"):
        shutil.copytree(tiny_run.base, folder / name)
    (folder / "noconfig" / "config.json").unlink()
    (folder / "noweights" / "model.safetensors").unlink()
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    for name in ("damaged", "emptied", "alone"):
        shutil.copytree(tiny_run.path / "adapter", folder / name)
    (folder / "damaged" / "lora_cli.json").write_text("{")
    record = folder / "emptied" / "lora_cli.json"
    document = {**json.loads(record.read_text()), "state": {}}
    record.write_text(json.dumps({**document, "sha256": document_sha256(document)}))
    make_changed(folder, tiny_run)
    make_foreign(folder / "foreign")
    return folder


@pytest.fixture(scope="module")
def run_case(
    folder: Path, tiny_run: Any, tiny_model_dir: Callable[..., Path], run_cli: Any
) -> Callable[[str], Any]:
    places = {
        "MODEL": str(tiny_run.base),
        "BASE2": str(tiny_model_dir(seed=1)),
        "TOY": str(tiny_run.data),
        "RUN": str(folder / "run"),
    }

    def run(case: str) -> tuple[int, str, str]:
        words = [word for word in CASES[case].split(" ") if word]
        for name, path in places.items():
            words = [word.replace(name, path) for word in words]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in VARIABLES.get(case, {}).items():
                patch.setenv(name, value)
            finished = run_cli(*words, cwd=folder)
        text = finished.err.replace(str(folder), "HERE")
        for name, path in places.items():
            text = text.replace(path, name)
        text = re.sub(r"\b[0-9a-f]{64}\b|\b[0-9a-f]{16}(?=\.\.\.)", "SHA256", text)
        start = text.find("error[")
        return finished.code, finished.out, text[max(start, 0) :]

    return run


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


def block(case: str, text: str) -> str:
    return f"{RULER}\n{case}\n$ lora-cli {CASES[case]}\n\n{text.rstrip()}\n\n"


def read_snapshot() -> dict[str, str]:
    if not SNAPSHOT.exists():
        return {}
    parts = SNAPSHOT.read_text(encoding="utf-8").split(f"{RULER}\n")[1:]
    return {part.split("\n", 1)[0]: f"{RULER}\n{part}" for part in parts}


@pytest.mark.parametrize("case", CASES)
def test_the_text_is_as_pinned_and_nothing_is_written(
    case: str, folder: Path, run_case: Any
) -> None:
    before = tree(folder)
    code, out, text = run_case(case)
    assert code == 2, text
    assert out == ""
    assert text.startswith("error["), text
    assert "Traceback" not in text
    assert tree(folder) == before
    found, blocks = block(case, text), read_snapshot()
    if os.environ.get("UPDATE_SNAPSHOTS"):
        blocks[case] = found
        ordered = [blocks[name] for name in CASES if name in blocks]
        SNAPSHOT.write_text("".join(ordered), encoding="utf-8")
    assert found == read_snapshot().get(case)


def test_the_file_holds_these_cases_and_no_others() -> None:
    assert list(read_snapshot()) == list(CASES)


def test_two_problems_are_two_messages() -> None:
    text = read_snapshot()["two problems"]
    assert text.count("error[") == 3
    for key in ("lora.r", "optimizer.lr", "seed"):
        assert f"`{key}`" in text


@pytest.mark.parametrize(
    "name", ["a=b", "data(1)", "it's", "with space", "a,b", "ünï", "[x]", "{x}", "a:b", "$x", "#1"]
)
def test_awkward_values_mean_what_they_say(
    name: str, tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    data = tmp_path / f"{name}.jsonl"
    lines = (tiny_run.data / "train.jsonl").read_text().splitlines()[:16]
    data.write_text("\n".join(lines) + "\n")
    others = ("task.data.path", "trainer.max_steps")
    settings = [text for text in tiny_run.settings if not text.startswith(others)]
    finished = run_cli(
        *("train", *settings, "trainer.max_steps=1", f"task.data.path={data}"),
        *(f"run.dir={tmp_path}/{name}", "--quiet"),
        cwd=tmp_path,
    )
    assert finished.code == 0, finished.err
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}.jsonl"}
    again = run_cli("train", tmp_path / name / "recipe.yaml", "run.dir=b", "--quiet", cwd=tmp_path)
    assert again.code == 0, again.err
    weights = [tmp_path / run / "adapter" / "adapter_model.safetensors" for run in (name, "b")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
