"""What a suite of faults found, as one line of JSON for the table of `make faults`."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Tally:
    """Counts of one suite; a count of what went wrong is 0 in a tool that keeps its promises.

    Attributes:
        suite: Name of the row.
        trials: Kills, errors, signals or damaged files that were tried.
        lost: Committed checkpoints that did not verify, or were not found, afterwards.
        wrong_resumes: Resumed runs that ended with other bytes than the uninterrupted one.
        undetected: Damaged files that were taken as sound.
        tracebacks: Python tracebacks that a user would have seen.
        mutants: Planted bugs.
        killed: Planted bugs that a test noticed.
    """

    suite: str
    trials: int = 0
    lost: int = 0
    wrong_resumes: int = 0
    undetected: int = 0
    tracebacks: int = 0
    mutants: int = 0
    killed: int = 0

    def report(self) -> None:
        """Append the counts to the file named by FAULTS_TALLY, if that is set."""
        target = os.environ.get("FAULTS_TALLY")
        if target:
            # One line is one write at the end of the file, so that several workers can share it.
            with Path(target).open("ab", buffering=0) as file:
                file.write(json.dumps(asdict(self)).encode() + b"\n")

    def check(self) -> None:
        """Report, and fail if anything was lost, wrong or undetected, or a planted bug survived."""
        self.report()
        bad = (self.lost, self.wrong_resumes, self.undetected, self.tracebacks)
        assert bad == (0, 0, 0, 0), self
        assert self.killed == self.mutants, self
        assert self.trials + self.mutants > 0, self
