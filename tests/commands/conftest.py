"""Runs to combine, the command that combines them, and a base to chat with."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from foreign_adapters import peft_adapter, write_llama
from trained_run import TrainedRun

COLOURS = {"grass": "green", "snow": "white", "coal": "black", "sky": "blue", "blood": "red"}
WORDS = ("user", "assistant", "system", "what", "colour", "is", "it", "now", "please", "so")
SPECIAL = ("<|im_start|>", "<|im_end|>", "</s>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def combining_runs(tiny_run: Any, run_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs on one base: "a" and "b" alike, "c" of another rank, strength and layers."""
    folder = tmp_path_factory.mktemp("combining")
    ignore = shutil.ignore_patterns("merged", "*.onnx", "checkpoints")
    shutil.copytree(tiny_run.path, folder / "a", ignore=ignore)
    for name, more in (
        ("b", ["seed=7", "lora.alpha=3"]),
        ("c", ["seed=8", "lora.r=2", "lora.targets=[query,dense]", "lora.rslora=true"]),
    ):
        changed = {setting.partition("=")[0] for setting in more}
        kept = [s for s in tiny_run.settings if s.partition("=")[0] not in changed]
        settings = [*kept, *more, f"run.dir={folder / name}"]
        finished = run_cli("train", *settings, "--quiet", cwd=folder)
        assert finished.code == 0, finished.err
        shutil.rmtree(folder / name / "checkpoints")
    return folder


@pytest.fixture
def merge_adapters(combining_runs: Path, run_cli: Any, tmp_path: Path) -> Callable[..., Any]:
    """Function: `merge_adapters("a", "b", "method=cat")` combines runs into `tmp_path / "out"`."""

    def run(*arguments: str, into: str = "adapter") -> Any:
        names = [
            str(combining_runs / name) for name in arguments if "=" not in name and name[0] != "-"
        ]
        rest = [argument for argument in arguments if "=" in argument or argument[0] == "-"]
        return run_cli(
            *("merge", f"adapters=[{','.join(names)}]", f"output={tmp_path / 'out'}"),
            *(f"into={into}", "--json", *rest),
            cwd=tmp_path,
        )

    return run


@pytest.fixture
def rows(tmp_path: Path, tiny_run: Any) -> Callable[..., Path]:
    """Function: a folder of new rows whose labels are replaced as asked."""

    def write(name: str = "new", **labels: str | None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for split in ("train", "validation"):
            text = (tiny_run.data / f"{split}.jsonl").read_text(encoding="utf-8")
            lines = [json.loads(x) for x in text.splitlines()][: 32 if split == "train" else 16]
            kept = [{**x, "label": labels.get(x["label"], x["label"])} for x in lines]
            text = "".join(json.dumps(x) + "\n" for x in kept if x["label"] is not None)
            (folder / f"{split}.jsonl").write_text(text)
        return folder

    return write


@dataclass(frozen=True)
class FamilyRun(TrainedRun):
    """A finished run of a task family, with its name and what it said."""

    name: str
    said: Any

    def lines(self, name: str) -> list[dict[str, Any]]:
        text = (self.path / "predictions" / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="session")
def train_family(
    run_cli: Any, tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., FamilyRun]:
    """Function: write files of rows, train a family on them, and return the run."""

    def train(name: str, files: Mapping[str, str], *settings: str) -> FamilyRun:
        cwd = tmp_path_factory.mktemp(name)
        data = cwd / "rows"
        data.mkdir()
        for file, text in files.items():
            (data / file).write_text(text)
        whole = (
            f"model.path={tiny_model_dir()}",
            f"task={name}",
            f"task.data.path={data}",
            "optimizer.lr=0.02",
            "lora.targets=[query,value]",
            "trainer.global_batch_size=16",
        )
        replaced = {setting.partition("=")[0] for setting in settings}
        kept = [setting for setting in whole if setting.partition("=")[0] not in replaced]
        whole = (*kept, *settings)
        finished = run_cli("train", *whole, "run.name=a", cwd=cwd)
        assert finished.code == 0, finished.err
        return FamilyRun(cwd / "runs" / "a", tiny_model_dir(), data, whole, name, finished)

    return train


@pytest.fixture(scope="session")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of words and the tokens and the template of ChatML."""
    import torch
    import transformers
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("chat-base")
    words = ["[UNK]", *WORDS, *COLOURS, *COLOURS.values()]
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in SPECIAL])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", eos_token="</s>", model_max_length=64
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, max_position_embeddings=64,
        initializer_range=0.2, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, to which adapters of other programs belong."""
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def written_by_peft(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on it that peft wrote."""
    return peft_adapter(llama, tmp_path_factory.mktemp("peft"))


@pytest.fixture
def convert(run_cli: Any, tmp_path: Path) -> Callable[..., Any]:
    """Function: `convert(folder, "r=4")` converts into `out`, and returns what was said."""

    def run(adapter: Path, *more: str) -> Any:
        output = f"output={tmp_path / 'out'}"
        return run_cli("convert", f"adapter={adapter}", output, "--json", *more, cwd=tmp_path)

    return run
