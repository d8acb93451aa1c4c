"""Run a script with the fake engine: `python -m bench.fake_sglang SCRIPT [ARGUMENTS]`."""

import runpy
import sys
import types
from pathlib import Path

from bench.fake_sglang.engine import Engine, SignalHandler


def _stand_in(name: str, **contents: object) -> None:
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module


if __name__ == "__main__":
    _stand_in("sglang.srt.entrypoints.engine", Engine=Engine)
    _stand_in("sglang.srt.managers.tokenizer_manager", SignalHandler=SignalHandler)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as Python does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")
