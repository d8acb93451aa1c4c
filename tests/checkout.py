"""A copy of the checkout, for tests that change files of it."""

import shutil
from pathlib import Path

from tests.processes import ROOT

_COPIED = (
    "engine.py",
    "processor.py",
    "frontend.py",
    "router.py",
    "common",
    "launch",
    "tests",
    "docs",
    "pyproject.toml",
)
_FAKE_ENGINE = """\
import runpy, sys
sys.argv[1:] = ["--token-ids", "1000,1001"]
runpy.run_module("tests.fake_engine", run_name="__main__")
"""


def copy_checkout(folder: Path) -> Path:
    """Without what is made, such as .venv; the model is linked."""
    folder.mkdir(parents=True)
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    (folder / "models").symlink_to(ROOT / "models")
    return folder


def use_fake_engine(checkout: Path) -> None:
    """Its engine.py becomes tests/fake_engine.py, on whatever command line."""
    (checkout / "engine.py").write_text(_FAKE_ENGINE)
