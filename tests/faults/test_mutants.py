"""Suite 16: guards against results that are wrong and nobody notices, each with a planted bug.

Each bug goes into a copy of the package; the test that watches over the guard must then fail. The
classes are those that other tools have shipped: see docs/reliability.md.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tally import Tally

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    """A bug: in this file this text becomes that one, and this test must fail."""

    name: str
    file: str
    text: str
    planted: str
    test: str


MUTANTS = (
    Mutant(
        "a changed byte of a checkpoint is not seen",
        "artifacts/commit.py",
        'if found != entry["sha256"]:',
        "if not found:",
        "tests/artifacts/test_commit.py::test_every_changed_byte_is_found",
    ),
    Mutant(
        "a changed manifest is not seen",
        "artifacts/commit.py",
        "if document_sha256(manifest) != manifest[_OWN_HASH]:",
        "if not manifest[_OWN_HASH]:",
        "tests/artifacts/test_commit.py::test_a_bad_manifest_is_found",
    ),
    Mutant(
        "a changed adapter is not seen",
        "artifacts/adapter.py",
        "            check_file(folder, name, entry)",
        "            entry",
        "tests/faults/test_corruption.py::test_a_damaged_adapter",
    ),
    Mutant(
        "a run goes on with another configuration",
        "artifacts/checkpoint.py",
        "if manifest.get(key) != facts.get(key)",
        "if key not in manifest and key in facts",
        "tests/artifacts/test_checkpoint.py::test_another_configuration_base_or_data_is_refused",
    ),
    Mutant(
        "the best checkpoint is rotated away",
        "artifacts/checkpoint.py",
        "if step in keep_besides:",
        "if step is None:",
        "tests/artifacts/test_checkpoint.py::test_the_newest_and_the_best_are_kept",
    ),
    Mutant(
        "checkpoints of other runs are rotated away",
        "artifacts/checkpoint.py",
        'return bool(manifest.get("run_id") == facts.get("run_id"))',
        "return bool(manifest) or not facts",
        "tests/artifacts/test_checkpoint.py::"
        "test_checkpoints_of_other_runs_are_neither_used_nor_deleted",
    ),
    Mutant(
        "two processes write into one run directory",
        "artifacts/lock.py",
        "fcntl.flock(descriptor, operation | fcntl.LOCK_NB)",
        "fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        "tests/artifacts/test_lock.py::"
        "test_the_lock_holds_between_processes_and_goes_with_the_process",
    ),
    Mutant(
        "another base is taken",
        "commands/locating.py",
        'if source.sha256 != record.base.get("sha256"):',
        "if not source.sha256:",
        "tests/commands/test_eval.py::test_another_base_is_refused_and_a_moved_one_is_found",
    ),
    Mutant(
        "a tensor that the file lacks is left as it is",
        "lora/state.py",
        "[n for n in live if n not in state]",
        "[n for n in live if n not in live]",
        "tests/lora/test_state.py::test_each_lost_renamed_reshaped_or_broken_tensor_is_an_error",
    ),
    Mutant(
        "a tensor that the model lacks is left out",
        "lora/state.py",
        "[n for n in state if n not in live]",
        "[n for n in state if n not in state]",
        "tests/lora/test_state.py::test_all_faults_are_listed_together",
    ),
    Mutant(
        "evaluation with dropout on",
        "training/evaluation.py",
        "model.eval()",
        "model.train(model.training)",
        "tests/training/test_evaluation.py::test_modes_are_given_back_module_by_module",
    ),
    Mutant(
        "training after evaluation with dropout off",
        "training/evaluation.py",
        "module.training = mode",
        "module.training = mode and not modes",
        "tests/training/test_evaluation.py::test_modes_are_given_back_module_by_module",
    ),
    Mutant(
        "every epoch in the same order",
        "training/order.py",
        "SeedSequence([seed, epoch])",
        "SeedSequence([seed, 0 * epoch])",
        "tests/training/test_order.py::"
        "test_an_epoch_is_a_permutation_that_depends_on_its_arguments_alone",
    ),
    Mutant(
        "the rows of a short last step are dropped",
        "training/order.py",
        "return -(-num_rows // global_batch_size)",
        "return num_rows // global_batch_size",
        "tests/training/test_order.py::test_steps_cover_every_row_once_an_epoch",
    ),
    Mutant(
        "the gradient is not divided",
        "training/gradients.py",
        "parameter.grad.mul_(factor)",
        "parameter.grad.mul_(factor if factor > 1 else 1.0)",
        "tests/training/test_loop.py::test_one_step_equals_plain_torch",
    ),
    Mutant(
        "dropout draws something else after a resume",
        "training/runtime.py",
        'f"{seed}/{step}/{rank}"',
        'f"{seed}/{torch.rand(1)}/{rank}"',
        "tests/training/test_loop.py::test_a_resumed_run_is_bit_equal",
    ),
    Mutant(
        "a loss that is not a number goes on",
        "training/gradients.py",
        "if math.isfinite(loss_sum) and (math.isfinite(grad_norm) or may_overflow):",
        "if not math.isinf(loss_sum) and not math.isinf(grad_norm):",
        "tests/training/test_gradients.py::test_only_finite_steps_go_on",
    ),
    Mutant(
        "the learning rate jumps down after the warm-up",
        "training/schedule.py",
        "(step - warmup) / max(1, total_steps - warmup)",
        "step / max(1, total_steps)",
        "tests/training/test_schedule.py::test_the_fall_is_that_of_transformers",
    ),
    Mutant(
        "labels in the order of the rows",
        "data/columns.py",
        "else tuple(sorted(labels))",
        "else tuple(dict.fromkeys(labels))",
        "tests/tasks/test_text_classification.py::"
        "test_label_order_does_not_depend_on_the_order_of_rows",
    ),
    Mutant(
        "a merge that changes nothing passes",
        "lora/merge.py",
        "    if not names:\n",
        "    if names is None:\n",
        "tests/lora/test_merge.py",
    ),
    Mutant(
        "what is put in place is not on disk yet",
        "artifacts/commit.py",
        "    if sync:\n        _sync_tree(staged)\n",
        "",
        "tests/faults/test_power_loss.py::test_a_power_cut_at_every_operation",
    ),
    Mutant(
        "a target that matches no layer is passed over",
        "lora/targets.py",
        "[pattern for pattern, names in found.items() if not names]",
        "[pattern for pattern, names in found.items() if names is None]",
        "tests/lora/test_targets.py::"
        "test_every_unmatched_pattern_is_reported_with_the_nearest_name",
    ),
    Mutant(
        "a weight that another layer shares gets an adapter",
        "lora/targets.py",
        "    _check_untied(model, kept)\n",
        "",
        "tests/lora/test_targets.py::test_tied_weight_is_refused",
    ),
    Mutant(
        "moments go to parameters by position",
        "training/optim.py",
        "        parameter = parameters[name]\n",
        "        names = list(dict.fromkeys(k.rpartition('/')[0] for k in state))\n"
        "        parameter = list(parameters.values())[names.index(name)]\n",
        "tests/training/test_optim.py::test_state_by_name_continues_bit_equal_whatever_the_order",
    ),
    Mutant(
        "texts of train in other splits are not told",
        "data/repeats.py",
        "if _normalise(row, columns) in seen)",
        "if row in splits['train'])",
        "tests/data/test_repeats.py::test_planted_repeats_are_found_exactly",
    ),
    Mutant(
        "rows with nothing to learn from are trained on",
        "commands/data_report.py",
        'if split == "train" and not supervised:',
        'if split == "train" and not rows:',
        "tests/commands/test_data_report.py::test_nothing_to_learn_from_is_an_error",
    ),
    Mutant(
        "padding is learned",
        "tasks/token_classification.py",
        'torch.full_like(inputs["input_ids"], _IGNORED)',
        'torch.zeros_like(inputs["input_ids"])',
        "tests/tasks/test_token_classification.py::test_a_word_is_learned_at_its_first_token",
    ),
    Mutant(
        "a merge tensor by tensor leaves the update out",
        "lora/updates.py",
        "        delta.mul_(self.scale)\n",
        "        delta.mul_(0)\n",
        "tests/lora/test_updates.py::test_rows_in_parts",
    ),
    Mutant(
        "a tensor that differs passes the comparison",
        "artifacts/merge_check.py",
        "return self.largest <= 1 and self.mean <= 1",
        "return True",
        "tests/artifacts/test_merge_check.py::test_a_wrong_update_is_told",
    ),
    Mutant(
        "a merge tensor by tensor takes another base",
        "commands/streaming.py",
        "    check_base_weights(source, request.record, request.subject)\n",
        "",
        "tests/commands/test_streaming.py::test_other_weights_are_refused_and_nothing_is_left",
    ),
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutants")
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache")
    for name in ("lora_cli", "configs", "recipes", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run_test(folder: Path, test: str) -> subprocess.CompletedProcess[str]:
    """Run one test; the folder comes first among the places that Python imports from."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("FAULTS_TALLY", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.faults
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_noticed(copy: Path, mutant: Mutant) -> None:
    path = copy / "lora_cli" / mutant.file
    sound = path.read_text(encoding="utf-8")
    assert sound.count(mutant.text) == 1, "the guard has changed: change its mutant as well"
    path.write_text(sound.replace(mutant.text, mutant.planted), encoding="utf-8")
    try:
        done = run_test(copy, mutant.test)
    finally:
        path.write_text(sound, encoding="utf-8")
    # 1 is a failed test; anything else would be a test that could not run.
    assert done.returncode in (0, 1), done.stdout + done.stderr
    tally = Tally("16 planted bugs that would give wrong results silently", mutants=1)
    tally.killed += done.returncode
    tally.check()


@pytest.mark.faults
def test_without_a_bug_the_tests_pass(copy: Path) -> None:
    done = run_test(copy, "tests/artifacts/test_commit.py")
    assert done.returncode == 0, done.stdout + done.stderr
    probe = [sys.executable, "-c", "import lora_cli.errors as e; print(e.__file__)"]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    found = subprocess.run(probe, cwd=copy, env=environment, capture_output=True, text=True)
    assert found.stdout.startswith(str(copy))


def test_every_mutant_still_fits_the_code() -> None:
    for mutant in MUTANTS:
        text = (ROOT / "lora_cli" / mutant.file).read_text(encoding="utf-8")
        assert text.count(mutant.text) == 1, mutant.name
        assert (ROOT / mutant.test.partition("::")[0]).is_file()
