"""`make dev`: `make run`, and a component is restarted when its script, or a module that it imports, is saved.

Where one of these files is not Python, its process is left alone.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from watchfiles import awatch

from launch.programs import component_programs
from launch.run import run
from launch.settings import ROOT, Settings, say
from launch.supervisor import Supervisor

DEBOUNCE_MS = 400
"""An editor saves in several steps, git several files at once: what comes within this time is one save."""


class _Finder(ModuleFinder):
    """files: of all modules that it came to. error: why one of them is not Python."""

    def __init__(self, root: Path) -> None:
        super().__init__([str(root)])
        self.files: set[Path] = set()
        self.error: SyntaxError | None = None

    def load_module(self, fqname: str, fp: Any, pathname: str, file_info: Any) -> Any:
        if pathname and pathname.endswith(".py"):  # else built in, or the folder of a package
            self.files.add(Path(pathname))
        try:
            return super().load_module(fqname, fp, pathname, file_info)
        except SyntaxError as error:
            error.filename = pathname  # Python leaves it out where it could not even read the text
            self.error = error
            raise


class Source:
    """What a script consists of.

    files: itself, the modules below `root` that it imports, those that they import, and what else is in their packages,
    such as a page. error: why one of them is not Python.
    """

    def __init__(self, script: Path, root: Path) -> None:
        self.script, self.root = script, root
        self.files: set[Path] = set()
        self.read()

    def read(self) -> None:
        """As it is now on the disk. A broken module still consists of what it imported before."""
        finder = _Finder(self.root)
        with suppress(SyntaxError, FileNotFoundError):  # an editor replaces a file at this moment
            finder.run_script(str(self.script))
        packages = {file.parent for file in finder.files if file.name == "__init__.py"}
        data = {file for folder in packages for file in folder.iterdir() if file.is_file() and file.suffix != ".py"}
        self.error = finder.error
        self.files = {self.script} | finder.files | data | (self.files if self.error else set())


async def restart_on_save(
    supervisor: Supervisor, may_restart: asyncio.Event, scripts: Mapping[str, Path], root: Path = ROOT
) -> None:
    """Until cancelled. scripts: by the program's name. A program whose files are not all Python is left alone."""
    sources = {name: await asyncio.to_thread(Source, script, root) for name, script in scripts.items()}
    say(f"dev: save a script or a module, and what imports it restarts: {', '.join(sources)}")
    while True:
        known = _files(sources)
        folders = {file.parent for file in known}
        # Folders and not files: an editor puts another file in the old one's place.
        async for changes in awatch(*folders, recursive=False, debounce=DEBOUNCE_MS):
            await may_restart.wait()  # what is saved meanwhile comes with the next changes
            saved = {Path(path) for _, path in changes}
            for name, source in sources.items():
                if saved & source.files or saved - known:  # a new file may be what somebody imports by now
                    await _restart_if_changed(supervisor, name, source, saved)
            known = _files(sources)
            if not {file.parent for file in known} <= folders:
                break


def _files(sources: Mapping[str, Source]) -> set[Path]:
    return {file for source in sources.values() for file in source.files}


async def _restart_if_changed(supervisor: Supervisor, name: str, source: Source, saved: set[Path]) -> None:
    """Where one of its files was saved, and all are Python. Tells why, or why not."""
    old_files = source.files
    await asyncio.to_thread(source.read)
    if not (changed := sorted(saved & (old_files | source.files))):
        return
    if error := source.error:
        where = f"{_shown(error.filename, source.root)}, line {error.lineno or 1}"
        say(f"dev: {name} keeps running, not restarted: {where}: {error.msg}: {(error.text or '').strip()}")
    else:
        say(f"dev: {name} restarts, because you saved {', '.join(_shown(file, source.root) for file in changed)}")
        supervisor.restart(name)


def _shown(file: Path | str | None, root: Path) -> str:
    return str(file).removeprefix(f"{root}/")


async def dev(settings: Settings) -> None:
    programs = [each for each in component_programs(settings) if each.name != "router" or settings.has_router]
    scripts = {each.name: ROOT / each.command[1] for each in programs}
    await run(settings, lambda supervisor, all_is_shown: restart_on_save(supervisor, all_is_shown, scripts))
