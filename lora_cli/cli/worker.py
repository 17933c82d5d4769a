"""One process of a run that `lora-cli train distributed.num_processes=N` has started."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from lora_cli.cli.main import as_error, logging_to_stderr, show_traceback
from lora_cli.cli.terminal import Terminal
from lora_cli.commands.launching import OUTCOME, STARTED, read_job
from lora_cli.ranks import as_record, own_rank, silence, write_note

_BUG = 70


def main(path: Path) -> int:
    """Run one job of `train`, and leave a note of how it ended.

    Returns 0 to the agent for all that another start would not change.

    Args:
        path: The job, as `lora_cli.commands.launching.write_job` has written it.
    """
    write_note(STARTED, {"pid": os.getpid()})
    silence()
    composed, options = read_job(path)
    record: dict[str, Any] = {"exit_code": 0, "problems": []}
    with logging_to_stderr(quiet=options.quiet):
        quiet = options.quiet and own_rank() == 0  # a log that says nothing is of no use
        terminal = Terminal(as_json=options.json, quiet=quiet)
        try:
            module = importlib.import_module(f"lora_cli.commands.{composed.command}")
            record["exit_code"] = int(module.run(composed, options, terminal))
        except KeyboardInterrupt as error:
            record = as_record(error)
        except Exception as error:  # noqa: BLE001  # whoever started this process shows it
            show_traceback(options.debug)
            record = as_record(as_error(error))
        finally:
            terminal.close()
    write_note(OUTCOME, record)
    return 1 if "lost" in record or record["exit_code"] == _BUG else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
