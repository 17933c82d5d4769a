"""Runs the suites of faults and prints what they found as one table: `make faults`."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
# Suites of several minutes are in parts, and whoever has nothing left to do takes from the other.
WORKERS = ("-n", "2", "--dist", "worksteal")
COLUMNS = ("trials", "lost", "wrong_resumes", "undetected", "tracebacks")
HEADINGS = (
    *("suite", "trials", "committed checkpoints lost", "wrong resumes", "undetected corruptions"),
    *("tracebacks", "mutants killed of planted"),
)


def total(lines: Iterable[str]) -> dict[str, dict[str, int]]:
    """Add up the counts of each suite, in the order of their names."""
    rows: dict[str, dict[str, int]] = {}
    for line in lines:
        counts = json.loads(line)
        row = rows.setdefault(counts.pop("suite"), dict.fromkeys(counts, 0))
        for name, count in counts.items():
            row[name] += count
    return dict(sorted(rows.items(), key=lambda item: (int(item[0].split()[0]), item[0])))


def table(rows: dict[str, dict[str, int]]) -> str:
    """Lay the counts out as Markdown, with a line for all of them."""
    every = {name: sum(row[name] for row in rows.values()) for name in (*COLUMNS, "mutants")}
    every["killed"] = sum(row["killed"] for row in rows.values())
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    for suite, row in [*rows.items(), ("all", every)]:
        mutants = f"{row['killed']} of {row['mutants']}" if row["mutants"] else ""
        cells = [suite, *(str(row[name]) for name in COLUMNS), mutants]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = Path(folder) / "tally.jsonl"
        tally.touch()
        environment = {**os.environ, "FAULTS_TALLY": str(tally), "OMP_NUM_THREADS": "1"}
        # The short forms are part of the long ones.
        command = [sys.executable, "-m", "pytest", "-q", "-m", "faults", *WORKERS, str(HERE)]
        command += sys.argv[1:]
        code = subprocess.run(command, check=False, env=environment).returncode
        rows = total(tally.read_text(encoding="utf-8").splitlines())
    sys.stdout.write(f"\n{table(rows)}\n\n{time.monotonic() - began:.0f} seconds\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
