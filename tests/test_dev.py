"""launch/dev.py: which component a saved file restarts, and when it does not."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from launch import supervisor
from launch.dev import DEBOUNCE_MS, Source, restart_on_save
from launch.supervisor import Program, Supervisor
from tests.checkout import copy_checkout, use_fake_engine
from tests.processes import ROOT, free_port, wait_until

COMPONENTS = ("engine", "processor", "frontend")
MAX_DELAY_S = 60.0
"""From a save to what it changes, over HTTP. On an idle machine it is less than 3 s."""

SOURCES = {name: Source(ROOT / f"{name}.py", ROOT) for name in (*COMPONENTS, "router")}


@pytest.mark.parametrize(
    ("file", "components"),
    [
        ("frontend.py", {"frontend"}),
        ("common/page/live_page.py", {"frontend"}),
        ("common/page/live_page.html", {"frontend"}),
        ("common/http/__init__.py", {"frontend"}),
        ("common/text/choice.py", {"processor"}),
        ("common/sglang/engine.py", {"engine"}),
        ("common/sglang/sampler.py", {"engine"}),  # imported within a function
        ("common/dynamo/failover.py", {"frontend", "processor"}),
        ("common/routing/workers.py", {"router"}),
        ("common/wire.py", {"frontend", "processor", "engine", "router"}),
        ("launch/run.py", set()),
        ("README.md", set()),
    ],
)
def test_a_file_belongs_to_those_who_import_it(file: str, components: set[str]) -> None:
    assert (ROOT / file).is_file()
    assert {name for name, source in SOURCES.items() if ROOT / file in source.files} == components


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two scripts that stay up: `first` imports common.both and common.page.one, `second` only common.both."""
    stays_up = "import time\nprint('up', flush=True)\ntime.sleep(600)\n"
    files = {
        "first.py": "from common.page import one\nimport common.both\n" + stays_up,
        "second.py": "from common.both import BOTH\n" + stays_up,
        "common/__init__.py": "",
        "common/both.py": "BOTH = 1\n",
        "common/page/__init__.py": "",
        "common/page/one.py": "",
        "common/page/one.html": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "line"),
    [("x = (\n", 1), ("ok = 1\nreturn\n", 2), ("\0", None), ("ok = 1\nx = '\xff'\n", 2)],
)
def test_what_is_not_python_is_named_and_keeps_its_files(tree: Path, text: str, line: int | None) -> None:
    source = Source(tree / "first.py", tree)
    files = set(source.files)
    (tree / "first.py").write_bytes(text.encode("latin-1"))
    source.read()
    assert source.files == files
    assert source.error is not None
    assert source.error.filename == str(tree / "first.py")
    assert source.error.lineno == line


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.process
@pytest.mark.anyio
class TestRestartOnSave:
    @pytest.fixture
    def may_restart(self) -> asyncio.Event:
        event = asyncio.Event()
        event.set()
        return event

    @pytest.fixture
    async def pids(
        self, tree: Path, may_restart: asyncio.Event, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncIterator[Callable[[], dict[str, int]]]:
        """The pids of `first` and `second`, which run and are watched."""
        monkeypatch.setattr(supervisor, "MIN_LIFE_S", 0.0)
        scripts = {name: tree / f"{name}.py" for name in ("first", "second")}
        programs = [Program(name, [sys.executable, str(script)], os.environ) for name, script in scripts.items()]
        launch = Supervisor(tree / "run", programs)

        def pids() -> dict[str, int]:
            return {name: int((tree / "run" / f"{name}.pid").read_text()) for name in scripts}

        async with launch.running():
            watching = asyncio.create_task(restart_on_save(launch, may_restart, scripts, tree))
            await until(lambda: all("up" in launch.log_file(name).read_text() for name in scripts))
            yield pids
            watching.cancel()

    async def test_who_imports_the_file_restarts_with_the_reason_and_nobody_else(
        self, tree: Path, pids: Callable[[], dict[str, int]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = pids()
        (tree / "common/page/one.html").write_text("new")
        await until(lambda: pids()["first"] != before["first"])
        after = pids()
        assert after["second"] == before["second"]
        assert capsys.readouterr().out.splitlines() == [
            "dev: first restarts, because you saved common/page/one.html",
            f"supervisor: first started, pid {after['first']}",
        ]
        (tree / "common/other.py").write_text("")  # nobody's
        (tree / "common/new.py").write_text("BOTH = 2\n")
        (tree / "common/new.py").rename(tree / "common/both.py")  # as many an editor saves
        await until(lambda: pids()["first"] != after["first"] and pids()["second"] != after["second"])

    async def test_what_is_saved_too_early_restarts_later(
        self, tree: Path, pids: Callable[[], dict[str, int]], may_restart: asyncio.Event
    ) -> None:
        before = pids()
        may_restart.clear()
        for name in ("first", "second"):
            (tree / f"{name}.py").write_text((tree / f"{name}.py").read_text() + "# saved\n")
            await asyncio.sleep(3 * DEBOUNCE_MS / 1000)
        assert pids() == before
        may_restart.set()
        await until(lambda: pids()["first"] != before["first"] and pids()["second"] != before["second"])

    async def test_what_is_not_python_restarts_nobody_until_it_is_mended(
        self, tree: Path, pids: Callable[[], dict[str, int]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = pids()
        (tree / "common/both.py").write_text("BOTH = 1\nBOTH = (\n")
        said = "keeps running, not restarted: common/both.py, line 2: '(' was never closed: BOTH = ("
        output = ""

        def num_said(name: str) -> int:
            nonlocal output
            output += capsys.readouterr().out
            return output.count(f"dev: {name} {said}\n")

        await until(lambda: all(num_said(name) for name in before))
        (tree / "common/page/one.py").write_text("ONE = 1\n")  # first cannot start, whatever else is saved
        await until(lambda: num_said("first") == 2)
        assert pids() == before
        (tree / "common/both.py").write_text("BOTH = 3\n")
        await until(lambda: pids()["first"] != before["first"] and pids()["second"] != before["second"])

    async def test_what_fails_only_when_it_runs_shows_its_last_line_and_restarts_at_once_when_mended(
        self, tree: Path, pids: Callable[[], dict[str, int]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        output, good = "", (tree / "second.py").read_text()

        def is_told() -> bool:
            nonlocal output
            output += capsys.readouterr().out
            return "supervisor: its last line: NameError: name 'nonsense' is not defined" in output

        (tree / "second.py").write_text("nonsense\n")
        await until(is_told)
        assert re.search(r"^supervisor: second died \(exit status 1\); it is started again", output, re.MULTILINE)
        (tree / "second.py").write_text(good)
        await until(lambda: capsys.readouterr().out.startswith("dev: second restarts"))
        await until(lambda: "up" in (tree / "run/logs/second.log").read_text().splitlines()[-1])

    async def test_a_module_that_is_imported_only_now_is_watched_too(
        self, tree: Path, pids: Callable[[], dict[str, int]]
    ) -> None:
        before = pids()
        (tree / "added").mkdir()
        (tree / "added/__init__.py").write_text("")
        (tree / "second.py").write_text("import added\n" + (tree / "second.py").read_text())
        await until(lambda: pids()["second"] != before["second"])
        before = pids()
        async with asyncio.timeout(60):
            while pids()["second"] == before["second"]:  # nothing tells when the new folder is watched
                (tree / "added/__init__.py").write_text("ADDED = 1\n")
                await asyncio.sleep(0.5)


@pytest.fixture
def launched(tmp_path: Path, embedded_model: str) -> Iterator[tuple[Path, str]]:
    """A copy of the checkout where `make dev` runs, with an engine of made-up tokens, and the frontend's address.

    The processor has been saved all the time until the first answer, and restarted after it.
    """
    checkout = copy_checkout(tmp_path / "checkout")
    use_fake_engine(checkout)
    ports = {f"{name}_PORT": str(free_port()) for name in ("NATS", "NATS_MONITORING", "ETCD", "HTTP")}
    unset = "NATS_SERVER", "ETCD_ENDPOINTS", "MODEL", "RUN_ONCE", "DATA_DIR", "PYTHONDONTWRITEBYTECODE"
    cleared = dict.fromkeys(unset, "")
    with (checkout / "output").open("w") as file:
        command = [sys.executable, "-m", "launch", "dev"]
        dev = subprocess.Popen(command, cwd=checkout, env=os.environ | ports | cleared, stdout=file, stderr=file)

    def output() -> str:
        return (checkout / "output").read_text()

    def save_and_look() -> bool:
        with (checkout / "processor.py").open("a") as file:
            file.write("# saved\n")
        return "run: answered in" in output()

    try:
        wait_until(lambda: "dev: save a script" in output(), 60, "make dev to watch")
        wait_until(save_and_look, 180, "the first answer")
        wait_until(lambda: "supervisor: processor started" in output(), 60, "the processor that was saved")
        assert "supervisor: processor started" not in output().split("What happens meanwhile")[0]
        yield checkout, f"http://127.0.0.1:{ports['HTTP_PORT']}"
    finally:
        dev.send_signal(signal.SIGINT)
        dev.wait(100)


def edit(file: Path, old: str, new: str) -> float:
    """When it was saved."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    return time.time()


@pytest.mark.process
def test_the_real_frontend_and_processor_serve_what_was_saved(launched: tuple[Path, str]) -> None:
    checkout, url = launched

    def process(name: str) -> psutil.Process:
        return psutil.Process(int((checkout / f".data/run/{name}.pid").read_text()))

    def shows(path: str, text: str) -> bool:
        try:
            return text in httpx.get(url + path, timeout=5).text
        except httpx.TransportError:
            return False

    def wait_for(what: str, path: str, text: str, saved_at: float) -> None:
        wait_until(lambda: shows(path, text), MAX_DELAY_S, what)
        print(f"{what} served {time.time() - saved_at:.2f} s after it was saved; load {os.getloadavg()[0]:.0f}")

    before = {name: process(name).pid for name in COMPONENTS}
    saved_at = edit(checkout / "common/page/live_page.html", "</body>", "<!-- saved --></body>")
    wait_for("the new frontend", "/", "<!-- saved -->", saved_at)
    saved_at = edit(checkout / "processor.py", "(args.model_names,", '([*args.model_names, "saved"],')
    wait_for("the new processor", "/v1/models", '"saved"', saved_at)
    wait_until(lambda: all(process(name).pid != before[name] for name in ("processor", "frontend")), 60, "the new pids")
    after = {name: process(name).pid for name in COMPONENTS}
    assert after["engine"] == before["engine"]

    line = (checkout / "common/text/choice.py").read_text().splitlines().index("import math") + 1
    edit(checkout / "common/text/choice.py", "import math", "import math(")
    where = f"common/text/choice.py, line {line}"
    said = f"dev: processor keeps running, not restarted: {where}: invalid syntax: import math("
    wait_until(lambda: said in (checkout / "output").read_text(), 60, "the error")
    edit(checkout / "common/text/choice.py", "import math(", "import math\nmeth.pi")
    said = "supervisor: its last line: NameError: name 'meth' is not defined"
    wait_until(lambda: said in (checkout / "output").read_text(), 60, "the other error")
    saved_at = edit(checkout / "common/text/choice.py", "\nmeth.pi", "")
    wait_for("the mended processor", "/v1/models", '"saved"', saved_at)
    body = {"model": "saved", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).status_code == 200
    assert {name: process(name).pid for name in ("engine", "frontend")} == {
        name: after[name] for name in ("engine", "frontend")
    }
