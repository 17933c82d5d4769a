"""The files and folders that the commands of tests/contract/test_error_texts.py are given."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from foreign_adapters import write_adapter

from lora_cli.artifacts.commit import document_sha256
from lora_cli.models.integrity import write_manifest


def write_data(folder: Path) -> None:
    texts = {
        "empty.jsonl": "",
        "header.csv": "text,label\n",
        "nolabel.csv": "text,stars_given\na,1\nb,2\n",
        "nocolumn.csv": "body_text,n\na,1\n",
        "oneclass.csv": "text,label\n" + "".join(f"text {n},pos\n" for n in range(20)),
        "nulls.csv": "text,label\na,sad\nb,joy\n",
        "nulls.jsonl": '{"text": null, "label": "x"}\n'
        + "".join(f'{{"text": "text {n}", "label": "{"xy"[n % 2]}"}}\n' for n in range(19)),
        "broken.jsonl": '{"text": "a", "label": "x"}\n{"text": "b" "label": "y"}\n',
        "flags.csv": "text,rude,toxic\na,1,0\nb,yes,0\nc,0,\n",
        "words.conll": "New B-LOC\nYork I-LOC\n\nyes O\nno\n",
        "unseen/train.csv": "text,label\n" + "".join(f"text {n},{'xy'[n % 2]}\n" for n in range(9)),
        "unseen/validation.csv": "text,label\nother,x\nanother,z\n",
        "broken.yaml": "lora: {r: 4\nseed: 1\n",
        "hydra.yaml": "defaults: [{task: sst2}]\nhydra: {job: {name: x}}\n",
        "target.yaml": "model: {_target_: os.system}\n",
        "package.yaml": "defaults: [{model@hydra.launcher: bert}]\n",
        "defaults.yaml": "defaults: [{override hydra/launcher: joblib}]\n",
        "unknown.yaml": "seed: 1\nlora:\n  rnak: 4\n",
        "taken/thesis.tex": "years of work",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def make_foreign(folder: Path) -> None:
    """Write adapters as other programs do, whole and not."""
    A, B = torch.ones(2, 3), torch.ones(5, 2)
    files = {
        "unclear": {"q.lora_a": A},
        "half": {"q.lora_A": A, "q.lora_B": B, "k.lora_A": A},
        "whole": {"model.layers.0.q_proj.lora_A": A, "model.layers.0.q_proj.lora_B": B},
    }
    for name, tensors in files.items():
        write_adapter(folder, tensors, name=f"{name}.safetensors")
    (folder / "lora.pt").write_bytes(b"")


def make_changed(folder: Path, tiny_run: Any) -> None:
    """Copy adapter, base and merged model, and change one file of each."""
    shutil.copytree(tiny_run.path / "adapter", folder / "changed")
    flip(folder / "changed" / "adapter_model.safetensors")
    shutil.copytree(tiny_run.base, folder / "reworded-base")
    path = folder / "reworded-base" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b'"movie"', b'"nevio"'))
    shutil.copytree(tiny_run.base, folder / "merged-wrong")
    write_manifest(folder / "merged-wrong")
    flip(folder / "merged-wrong" / "model.safetensors")
    for name in ("hurt", "half", "based", "reworded", "rowed"):
        shutil.copytree(tiny_run.path, folder / name)
        (folder / name / "result.json").unlink()
    for path in (folder / "hurt" / "checkpoints").iterdir():
        path.rename(path.with_name(f".corrupt-{path.name}-01234567"))
    (folder / "half" / "checkpoints" / "step-00000004" / "progress.json").write_bytes(b"{}")
    # As if the run had been started on something else.
    change_facts(folder / "based", base_sha256="0" * 64)
    change_facts(folder / "reworded", base_settings={"config.json": "0" * 64})
    change_facts(folder / "rowed", rows_sha256="0" * 64)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_facts(run: Path, **facts: Any) -> None:
    for path in (run / "checkpoints").glob("step-*/MANIFEST.json"):
        document = {**json.loads(path.read_bytes()), **facts}
        path.write_text(json.dumps({**document, "sha256": document_sha256(document)}))
