"""Programs that some tests need and pip does not bring: python -m tests.programs prints the Debian packages to install.

A test says `@pytest.mark.needs("slowhttptest")`. Where the program is missing the test is skipped, and the last line
of the run says what was skipped and how to get it; where REQUIRE_PROGRAMS is set, as in .ci/run, the test fails.
"""

import os
import shutil
from collections.abc import Iterable

_CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _CHROMIUMS)), None)
ARE_REQUIRED = bool(os.environ.get("REQUIRE_PROGRAMS"))
PACKAGES = {
    "chromium": "chromium",
    "curl": "curl",
    "ip": "iproute2",
    "node": "nodejs",
    "npm": "npm",
    "openssl": "openssl",
    "slowhttptest": "slowhttptest",
    "ss": "iproute2",
}


def is_installed(program: str) -> bool:
    return (CHROMIUM if program == "chromium" else shutil.which(program)) is not None


def packages(programs: Iterable[str]) -> str:
    """Debian's packages that bring the programs which are not installed."""
    return " ".join(sorted({PACKAGES[program] for program in programs if not is_installed(program)}))


if __name__ == "__main__":
    print(packages(PACKAGES))
