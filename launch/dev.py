"""`make dev`: `make run`, and a component is restarted when its script, or a module that it imports, is saved.

The new process of a frontend, a processor or a router starts beside the old one, which is stopped once the new one
serves: so nothing is ever down, also when what was saved does not run. An engine is stopped first, because two may not
fit into the memory.
"""

from __future__ import annotations

import ast
import asyncio
import os
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from watchfiles import awatch

from launch.command import run_command, say
from launch.model import ROOT
from launch.run import component_programs, run
from launch.settings import Settings
from launch.supervisor import Supervisor

DEBOUNCE_MS = 400
"""An editor saves in several steps, git several files at once: what comes within this time is one save."""


class Source:
    """What a script consists of.

    files: itself, the modules below `root` that it imports, those that they import, and what else is in their packages,
    such as a page. error: why one of them is not Python.
    """

    def __init__(self, script: Path, root: Path) -> None:
        self.script, self.root = script, root
        self.files: set[Path] = set()
        self.error: SyntaxError | None = None
        self.read()

    def read(self) -> None:
        """As it is now on the disk. A broken module still consists of what it imported before."""
        files, unread, self.error = {self.script}, [self.script], None
        while unread:
            file = unread.pop()
            try:
                names = _imports(file, file.stat().st_mtime_ns)
            except FileNotFoundError:  # an editor replaces it at this moment
                names = ()
            except SyntaxError as error:
                error.filename = str(file)  # Python leaves it out where it could not even read the text
                names, self.error = (), error
            new = {file for name in names for file in _files_of(name, self.root)} - files
            unread += [file for file in new if file.suffix == ".py"]
            files |= new
        self.files = files | self.files if self.error else files


@cache
def _imports(file: Path, _saved_at_ns: int) -> tuple[str, ...]:
    """The names that a module imports, also within a function: a.b of `from a import b`, be b a module or not.

    Raises:
        SyntaxError: it is not Python.
    """
    tree, names = ast.parse(file.read_bytes(), file), list[str]()
    compile(tree, file, "exec")  # finds what only looks like Python, such as a return outside of a function
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(names)


def _files_of(name: str, root: Path) -> Iterator[Path]:
    """The module `name`, the packages that it is in, and what is in their folders but no module."""
    folder = root
    for part in name.split("."):
        module, folder = folder / f"{part}.py", folder / part
        if module.is_file():
            yield module
        if (folder / "__init__.py").is_file():
            yield folder / "__init__.py"
            yield from (file for file in folder.iterdir() if file.is_file() and file.suffix != ".py")


async def restart_on_save(supervisor: Supervisor, scripts: Mapping[str, Path], root: Path = ROOT) -> None:
    """Until cancelled. scripts: by the program's name. A program whose files are not all Python is left alone."""
    sources = {name: await asyncio.to_thread(Source, script, root) for name, script in scripts.items()}
    replacing: dict[str, asyncio.Task[None]] = {}
    say(f"dev: save a script or a module, and what imports it restarts: {', '.join(sources)}")
    try:
        while True:
            folders = _folders(sources)
            # Folders and not files: an editor puts another file in the old one's place.
            async for changes in awatch(*folders, recursive=False, debounce=DEBOUNCE_MS):
                saved = {Path(path) for _, path in changes}
                for name, source in sources.items():
                    if await _is_to_restart(name, source, saved):
                        if name in replacing:  # by what has been saved before
                            replacing[name].cancel()
                        replacing[name] = asyncio.create_task(supervisor.replace(name))
                if not _folders(sources) <= folders:
                    break
    finally:
        for task in replacing.values():
            task.cancel()


def _folders(sources: Mapping[str, Source]) -> set[Path]:
    return {file.parent for source in sources.values() for file in source.files}


async def _is_to_restart(name: str, source: Source, saved: set[Path]) -> bool:
    """Whether one of its files was saved, and all are Python. Tells why, or why not."""
    old_files = source.files
    await asyncio.to_thread(source.read)
    if not (changed := sorted(saved & (old_files | source.files))):
        return False
    if error := source.error:
        where = f"{_shown(error.filename, source.root)}, line {error.lineno or 1}"
        say(f"dev: {name} keeps running, not restarted: {where}: {error.msg}: {(error.text or '').strip()}")
    else:
        say(f"dev: {name} restarts, because you saved {', '.join(_shown(file, source.root) for file in changed)}")
    return source.error is None


def _shown(file: Path | str | None, root: Path) -> str:
    return str(file).removeprefix(f"{root}/")


async def main() -> None:
    """`python -m launch.dev`, behind `make dev`."""
    settings = Settings.from_environ(os.environ)
    programs = [each for each in component_programs(settings) if each.name != "router" or settings.has_router]
    scripts = {each.name: ROOT / each.command[1] for each in programs}
    await run(settings, lambda supervisor: restart_on_save(supervisor, scripts))


if __name__ == "__main__":
    sys.exit(run_command("dev", main()))
