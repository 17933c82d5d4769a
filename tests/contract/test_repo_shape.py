"""The rules of size and place that keep the code easy to find one's way in."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lora_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))
CODE = sorted([*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])

TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "Makefile",
    "lora_cli",
    "configs",
    "recipes",
    "tests",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "constraints.txt",
    ".pre-commit-config.yaml",
    ".ci",
    ".gitignore",
    "docs",
    "benchmarks",
    "LICENSE",
}

COVERED_ELSEWHERE = {
    "__main__.py": "one call; every test that starts `python -m lora_cli` runs it",
    "log.py": "one line; nothing to test",
    "errors.py": "tests/contract/test_error_texts.py pins every error as printed",
    "tasks/contract.py": "a protocol; tests/tasks shows that the family keeps it",
    "training/events.py": "plain values without behaviour",
}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_code_to_check() -> None:
    assert len(MODULES) > 20
    assert len(CODE) > 40


@pytest.mark.parametrize("path", CODE, ids=_name)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350, "a file holds at most 350 lines"
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > 60
    ]
    assert not long, "a function holds at most 60 lines"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=_name)
def test_init_files_are_empty(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == ""


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.name != "__init__.py"], ids=_name
)
def test_every_module_has_a_test_file(path: Path) -> None:
    module = path.relative_to(PACKAGE)
    test = ROOT / "tests" / module.parent / f"test_{module.name}"
    if str(module) in COVERED_ELSEWHERE:
        assert not test.exists(), f"take {module} off the list of modules covered elsewhere"
    else:
        assert test.is_file(), f"write {test.relative_to(ROOT)}"


@pytest.mark.parametrize("module", COVERED_ELSEWHERE)
def test_modules_covered_elsewhere_exist(module: str) -> None:
    assert (PACKAGE / module).is_file()


def test_packages_are_packages() -> None:
    folders = {path.parent for path in MODULES}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_top_level_is_fixed() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("this is not a git checkout")
    names = {line.split("/")[0] for line in listing.stdout.splitlines()}
    assert names, "git lists no files"
    assert names - TOP_LEVEL == set()
