"""Constructs that would let a file from a stranger run code, or reach out of its folder."""

import ast
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "lora_cli").rglob("*.py"))

BANNED_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"} | {
    "marshal",
    "zipfile",
    "tarfile",
}
BANNED_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "instantiate",
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "evaluate.load",
    "os.system",
    "os.popen",
    "numpy.load",
    "np.load",
    "pd.read_pickle",
    "runpy.run_path",
}
BANNED_KEYWORDS = {"trust_remote_code", "shell", "allow_pickle"}
# tarfile: the review sentences come inside a source archive that has a pinned sha256.
# zipfile: a program of torch.export is an archive, whose names and checksums are read; nothing is
# extracted.
ALLOWED = {
    ("lora_cli/data/movie_reviews.py", "tarfile"),
    ("lora_cli/artifacts/exporters/torch_export.py", "zipfile"),
}

# The first releases without known holes that this program could be reached through.
FLOORS = {"hydra-core": "1.3.8", "torch": "2.10", "transformers": "5.3"}


def dotted_name(node: ast.expr) -> str:
    """`a.b.c` for a chain of attributes on a name, and `*.c` for one on anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted_name(node.value)
        return f"{owner}.{node.attr}" if owner else f"*.{node.attr}"
    return ""


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        return [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return []


def violations(source: str) -> list[str]:
    """Return the name of every banned construct of a module, in no particular order."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for name in _imported(node):
            if name.split(".")[0] in BANNED_MODULES:
                found.append(name.split(".")[0])
            if name in BANNED_CALLS or name.endswith(".instantiate"):
                found.append(name)
        if isinstance(node, ast.Call):
            name = dotted_name(node.func)
            if name in BANNED_CALLS or name.endswith(".instantiate"):
                found.append(name)
            found += [
                f"{keyword.arg}="
                for keyword in node.keywords
                if keyword.arg in BANNED_KEYWORDS
                and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            ]
        if isinstance(node, ast.Dict):
            found += [
                f"{key.value}:"
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
                and key.value in BANNED_KEYWORDS
                and not (isinstance(value, ast.Constant) and value.value is False)
            ]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_uses_a_banned_construct(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    found = [
        item for item in violations(path.read_text(encoding="utf-8")) if (name, item) not in ALLOWED
    ]
    assert found == []


def test_there_are_modules_to_check() -> None:
    assert len(MODULES) > 20


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import tarfile",
        "import zipfile as z",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "eval(text)",
        "exec(text)",
        "hydra.utils.instantiate(config)",
        "from hydra.utils import instantiate",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=flag)",
        "options = {'trust_remote_code': True}",
    ],
)
def test_the_scan_finds(source: str) -> None:
    assert violations(source) != []


@pytest.mark.parametrize(
    "source",
    ["model.eval()", "safe_load(text)", "f(trust_remote_code=False)", "torch.load_state = 1"],
)
def test_the_scan_lets_pass(source: str) -> None:
    assert violations(source) == []


@pytest.mark.parametrize("package", FLOORS)
def test_dependencies_have_floors(package: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = {item.name: item.specifier for item in map(Requirement, project["dependencies"])}
    floors = [
        Version(part.version) for part in requirements[package] if part.operator in (">=", "==")
    ]
    assert floors
    assert max(floors) >= Version(FLOORS[package])


def test_constraints_respect_the_floors() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    for package, floor in FLOORS.items():
        assert Version(pinned[package]) >= Version(floor)
