import time
from pathlib import Path

import pytest

from lora_cli.config.scan import MAX_BYTES, read_text, scan
from lora_cli.errors import UserError

BOMB = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {run: {dir: x}}",
        "lora: {hydra: 1}",
        "model: {_target_: os.system, command: x}",
        "x: [{_args_: [1]}]",
        "x: {_partial_: true}",
        "x: {_recursive_: true}",
        "x: {_convert_: all}",
        "seed: ${oc.env:HOME}",
        "seed: ${lora.${x}}",
        "seed: ${hydra.runtime.cwd}",
        "seed: ${oc.decode:1}",
        "seed: ${",
        "'${x:1}': 1",
        "seed: !!python/object/apply:os.system [x]",
        "seed: !!int 1",
        "seed: &x 1",
        "seed: 1\nseed: 2",
        "lora: {r: 1, r: 2}",
        "<<: {a: 1}",
        "? [a]\n: 1",
        "- a",
        "just text",
        "a: 1\n---\nb: 2",
        "# @package _global_\na: 1",
        "a: [1",
        "a: b: c",
        "x: " + "[" * 30 + "]" * 30,
        BOMB,
        "x: [" + "1," * 30_000 + "]",
        "".join(f"k{n}: ${{seed}}\n" for n in range(17)),
    ],
)
def test_what_is_refused_is_refused_at_once(text: str) -> None:
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        scan(text, "x.yaml")
    # 100 ms is the promise; a busy machine gets some more.
    assert time.process_time() - start < 0.5
    assert caught.value.problems[0].id in {"recipe.refused", "recipe.bad-yaml"}
    assert str(caught.value.problems[0].where).startswith("x.yaml")


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "a: 1", "a: ${b}", "a: ${b.c}-${.d}", "a: 'x: y'", "__x: 1"]
)
def test_what_is_harmless_passes(text: str) -> None:
    scan(text, "x.yaml")


def test_every_fault_of_a_tree_is_reported() -> None:
    with pytest.raises(UserError) as caught:
        scan("hydra: 1\nx: {_target_: y}\n", "x.yaml")
    assert [problem.where for problem in caught.value.problems] == ["x.yaml:1", "x.yaml:2"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\xff\xfe\x00", "not text"), (b"#" * (MAX_BYTES + 1), "bytes long"), (None, "a folder")],
)
def test_unreadable_files(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "x"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_text(path, "x")
