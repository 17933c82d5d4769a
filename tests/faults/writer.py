"""A process that writes as runs do, for strace to kill or to lie to. It never imports torch.

Usage: writer.py SCENARIO FOLDER [LIMIT]. What happens before the first and after the last look at
a file called "marker" is not counted. Exit code 74 stands for an error of the file system.
"""

import json
import resource
import sys
from pathlib import Path

from lora_cli.artifacts.commit import (
    clean_leftovers,
    commit_folder,
    put_in_place,
    remove_folder,
    replace_file,
    staged_beside,
    sync_path,
)


def step_files(step: int) -> dict[str, bytes]:
    return {
        "adapter.safetensors": bytes([step]) * 3000,
        "optimizer.safetensors": bytes([step, 7]) * 3000,
        "progress.json": json.dumps({"step": step}).encode(),
    }


def save(folder: Path, step: int) -> None:
    target = folder / "checkpoints" / f"step-{step:08d}"
    commit_folder(target, step_files(step), facts={"step": step})


def adapter_files(number: int) -> dict[str, bytes]:
    return {"adapter_model.safetensors": bytes([number]) * 5000, "README.md": b"%d" % number}


def save_adapter(folder: Path, number: int) -> None:
    commit_folder(folder / "adapter", adapter_files(number), facts={}, manifest=False)


def save_model(folder: Path, number: int) -> None:
    """Write file by file, as merging and exporting do."""
    with staged_beside(folder / "merged") as staged:
        (staged / "inner").mkdir()
        (staged / "inner" / "config.json").write_bytes(b"{}%d" % number)
        with (staged / "model.safetensors").open("wb") as file:
            for _ in range(3):
                file.write(bytes([number]) * 4000)
        put_in_place(staged, folder / "merged")


def log(folder: Path, step: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")


def prepare(scenario: str, folder: Path) -> None:
    """Make what is there before the writing that is looked at."""
    if scenario == "retention":
        for step in (1, 2):
            save(folder, step)
    elif scenario == "overwrite":
        save_adapter(folder, 1)
    elif scenario == "merge":
        save_model(folder, 1)
    elif scenario == "file":
        replace_file(folder / "result.json", b"old")


def write(scenario: str, folder: Path) -> None:
    """Write what is looked at."""
    if scenario == "first":
        save(folder, 1)
    elif scenario == "retention":
        log(folder, 3)
        sync_path(folder / "metrics.jsonl")
        save(folder, 3)
        remove_folder(folder / "checkpoints" / "step-00000001")
    elif scenario == "overwrite":
        save_adapter(folder, 2)
    elif scenario == "merge":
        save_model(folder, 2)
    elif scenario == "file":
        replace_file(folder / "result.json", b"new" * 1000)
    elif scenario == "start":
        clean_leftovers(folder)
        clean_leftovers(folder / "checkpoints")


SCENARIOS = ("first", "retention", "overwrite", "merge", "file")


def main() -> int:
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    limit = int(sys.argv[3]) if len(sys.argv) > 3 else None
    prepare(scenario, folder)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        Path("/marker").exists()
        write(scenario, folder)
    except OSError as error:
        sys.stdout.write(f"error: {error}\n")
        return 74
    finally:
        Path("/marker").exists()
    return 0


if __name__ == "__main__":
    sys.exit(main())
