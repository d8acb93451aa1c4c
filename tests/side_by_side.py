"""`make test`: three runs of pytest side by side, each with a part of the tests.

Most of their time tests wait, for a process to start or for a lease to end: one run alone leaves two cores idle for
three quarters of its time. The arguments are pytest's.
"""

import re
import subprocess
import sys
from contextlib import suppress
from threading import Thread

import pytest

NUM_PARTS = 3
_PROGRESS = re.compile(r"tests/test_\w+\.py |[.sFExX]+ +\[")


class Run:
    """Shows its progress as it comes, and the rest of what it prints when it is asked to."""

    def __init__(self, part: int, args: list[str]) -> None:
        command = [sys.executable, "-m", "pytest", f"--part={part}/{NUM_PARTS}", *args]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.report: list[str] = []
        self.following = Thread(target=self._follow)
        self.following.start()

    def _follow(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if _PROGRESS.match(line):
                print(line, end="", flush=True)
            else:
                self.report.append(line)

    def end(self) -> int:
        """Wait for it; its exit status."""
        self.following.join()
        print("".join(self.report), flush=True)
        return self.process.wait()


def main() -> int:
    runs = [Run(part, sys.argv[1:]) for part in range(1, NUM_PARTS + 1)]
    with suppress(KeyboardInterrupt):  # they were interrupted, too, and clear up
        for run in runs:
            run.following.join()
    statuses = [run.end() for run in runs]
    failures = [status for status in statuses if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)]
    return max(failures, default=min(statuses))


if __name__ == "__main__":
    sys.exit(main())
