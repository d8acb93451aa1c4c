"""launch/: the model folder, ports, the supervisor, NATS and etcd, and what a person at the terminal reads."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from common.environment import DRAIN_TIMEOUT_S
from launch import logs, model, questions, supervisor
from launch.model import MANIFEST_FILE
from launch.programs import component_programs
from launch.run import show_what_next, wait_until_logged
from launch.settings import LaunchError, Settings
from launch.supervisor import Program, Supervisor
from tests.processes import ROOT, Infra, accepts, free_port, running


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / MANIFEST_FILE).write_text(json.dumps(model.manifest(folder)))
    return folder


class TestModel:
    def test_a_finished_folder_is_whole(self, model_folder: Path) -> None:
        assert model.is_whole(model_folder)

    @pytest.mark.parametrize("name", ["config.json", MANIFEST_FILE])
    def test_a_folder_without_one_of_its_files_is_not(self, model_folder: Path, name: str) -> None:
        (model_folder / name).unlink()
        assert not model.is_whole(model_folder)

    @pytest.mark.parametrize("weights", [b"weights" * 999, b"weightS" + b"weights" * 999])
    def test_nor_one_with_a_truncated_or_changed_file(self, model_folder: Path, weights: bytes) -> None:
        (model_folder / "model.safetensors").write_bytes(weights)
        assert not model.is_whole(model_folder)

    @pytest.mark.parametrize("text", ["", "[]", '{"files": 3}'])
    def test_nor_one_with_an_unreadable_manifest(self, model_folder: Path, text: str) -> None:
        (model_folder / MANIFEST_FILE).write_text(text)
        assert not model.is_whole(model_folder)

    def test_nor_one_that_another_conversion_made(self, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(model, "CONVERSION_VERSION", model.CONVERSION_VERSION + 1)
        assert not model.is_whole(model_folder)

    def test_a_broken_folder_is_replaced_whole(self, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def convert(gguf: Path, target: Path) -> None:
            target.mkdir()
            (target / "config.json").write_text('{"new": true}')

        monkeypatch.setattr(model, "fetch", lambda target: target / "a.gguf")
        monkeypatch.setattr(model, "convert", convert)
        (model_folder / "model.safetensors").unlink()
        model.build(model_folder)
        assert model.is_whole(model_folder)
        assert sorted(path.name for path in model_folder.iterdir()) == ["config.json", MANIFEST_FILE]

    def test_a_build_that_fails_leaves_no_folder_and_no_scratch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fetch(target: Path) -> Path:
            target.mkdir()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(model, "fetch", fetch)
        with pytest.raises(OSError, match="No space left on device"):
            model.build(tmp_path / "model")
        assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]

    def test_a_hub_model_is_not_converted(self, capsys: pytest.CaptureFixture[str]) -> None:
        model.ensure_model("Qwen/Qwen2.5-0.5B-Instruct")
        assert "nothing to convert" in capsys.readouterr().out


class TestSettings:
    @pytest.mark.parametrize(
        ("environ", "nats", "etcd", "frontend"),
        [
            ({}, "nats://127.0.0.1:4222", "http://127.0.0.1:2379", "http://localhost:8080"),
            ({"NATS_PORT": "1", "ETCD_PORT": "2"}, "nats://127.0.0.1:1", "http://127.0.0.1:2", "http://localhost:8080"),
            ({"HTTP_PORT": "3"}, "nats://127.0.0.1:4222", "http://127.0.0.1:2379", "http://localhost:3"),
            (
                {"NATS_SERVER": "tls://a:1", "ETCD_ENDPOINTS": "b:2,c:3"},
                "tls://a:1",
                "b:2,c:3",
                "http://localhost:8080",
            ),
        ],
    )
    def test_where_everything_is(self, environ: dict[str, str], nats: str, etcd: str, frontend: str) -> None:
        settings = Settings.from_environ(environ)
        assert (settings.nats_server, settings.etcd_endpoints, settings.frontend_url) == (nats, etcd, frontend)

    @pytest.mark.parametrize("variable", ["HTTP_PORT=http", "NATS_PORT=0", "ETCD_PORT=65536", "READY_TIMEOUT_S=soon"])
    def test_a_wrong_value_is_refused_by_name(self, variable: str) -> None:
        with pytest.raises(LaunchError, match=f"^{variable}: Input should be"):
            Settings.from_environ(dict([variable.split("=")]))


def test_with_a_router_engines_tell_what_they_have_cached_and_the_router_comes_last() -> None:
    programs = component_programs(Settings.from_environ({"ROUTER": "1", "ENGINES": "2"}))
    assert [each.name for each in programs] == ["engine", "engine-2", "processor", "frontend", "router"]
    assert ["--kv-events" in each.command for each in programs] == [True, True, False, False, False]


def test_without_one_there_is_one_engine_and_it_tells_nothing() -> None:
    engine, *_ = component_programs(Settings.from_environ({}))
    assert engine.name == "engine"
    assert "--kv-events" not in engine.command


@pytest.mark.parametrize(("num_cpus", "num_hints"), [(2, 0), (64, 1)])
def test_a_machine_with_many_cpus_is_told_what_would_use_them(
    num_cpus: int, num_hints: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: num_cpus)
    show_what_next(Settings.from_environ({}))
    assert capsys.readouterr().out.count(f"{num_cpus} CPUs; docs/deployment.md") == num_hints


def test_a_taken_port_names_itself_its_program_its_holder_and_the_way_out() -> None:
    port = free_port()
    frontend = Program("frontend", [], {}, {"HTTP_PORT": port})
    with ThreadingHTTPServer(("127.0.0.1", port), BaseHTTPRequestHandler), pytest.raises(LaunchError) as caught:
        frontend.require_free_ports()
    holder = rf"{re.escape(psutil.Process().name())} \(pid {os.getpid()}\)"
    way_out = "stop that, or choose another port with HTTP_PORT"
    assert re.fullmatch(f"port {port}, for frontend, is taken by {holder}: {way_out}", str(caught.value))
    frontend.require_free_ports()


def launch(command: str, environ: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch", command],
        cwd=ROOT,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def own_ports(tmp_path: Path) -> dict[str, str]:
    names = ("NATS_PORT", "NATS_MONITORING_PORT", "ETCD_PORT", "HTTP_PORT")
    cleared = {"NATS_SERVER": "", "ETCD_ENDPOINTS": "", "MODEL": "", "RUN_ONCE": ""}
    return {name: str(free_port()) for name in names} | cleared | {"DATA_DIR": str(tmp_path / "data")}


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"ended without saying {text!r}: {process.stderr and process.stderr.read()}")


@pytest.mark.process
class TestInfra:
    def test_real_servers_as_configured_start_and_stop_without_leftovers(self, own_ports: dict[str, str]) -> None:
        infra = launch("infra", own_ports)
        wait_for_line(infra, "Ctrl-C stops both")
        children = psutil.Process(infra.pid).children(recursive=True)
        assert {"nats-server", "etcd"} == {child.name() for child in children}
        ports = [int(own_ports[name]) for name in ("NATS_PORT", "NATS_MONITORING_PORT", "ETCD_PORT")]
        assert all(map(accepts, ports))
        facts = json.loads(questions.fetch(f"http://127.0.0.1:{ports[1]}/varz", timeout_s=5)[1])
        assert facts["max_payload"] == 8 * 1024 * 1024
        assert facts["jetstream"]["config"]["store_dir"].startswith(own_ports["DATA_DIR"])

        second = launch("infra", own_ports | {name: str(free_port()) for name in own_ports if "PORT" in name})
        assert f"is in use by another launch (pid {infra.pid})" in second.communicate(timeout=60)[1]
        assert second.returncode == 1

        infra.send_signal(signal.SIGINT)
        assert infra.communicate(timeout=60)[1] == ""
        assert infra.returncode == 0
        assert psutil.wait_procs(children, timeout=1)[1] == []

    def test_a_kill_9_of_the_launcher_stops_the_servers(self, own_ports: dict[str, str]) -> None:
        infra = launch("infra", own_ports)
        wait_for_line(infra, "Ctrl-C stops both")
        children = psutil.Process(infra.pid).children(recursive=True)
        infra.kill()
        infra.communicate()
        assert psutil.wait_procs(children, timeout=20)[1] == []

    @pytest.mark.parametrize(("command", "variable"), [("infra", "ETCD_PORT"), ("run", "HTTP_PORT")])
    def test_a_taken_port_ends_a_launch_with_one_line(
        self, own_ports: dict[str, str], command: str, variable: str
    ) -> None:
        with ThreadingHTTPServer(("127.0.0.1", int(own_ports[variable])), BaseHTTPRequestHandler):
            process = launch(command, own_ports)
            output, errors = process.communicate(timeout=60)
        assert (process.returncode, output, errors.count("\n")) == (1, "", 1)
        assert re.search(rf"port {own_ports[variable]}, .* {variable}$", errors)

    def test_a_named_server_that_is_not_there_ends_the_run_with_one_line(self, own_ports: dict[str, str]) -> None:
        process = launch("run", own_ports | {"NATS_SERVER": f"nats://127.0.0.1:{free_port()}"})
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert re.match(r"run: NATS at 127.0.0.1:\d+ \(NATS_SERVER\) did not answer", errors.splitlines()[-1])
        assert "Traceback" not in errors


UP = "print('up', flush=True)\n"
SLEEPS = "import time; time.sleep(600)\n"


@asynccontextmanager
async def supervised(folder: Path, **scripts: str) -> AsyncIterator[Supervisor]:
    """Programs that run these lines of Python, once each has printed its first line."""
    programs = [Program(name, [sys.executable, "-c", text], os.environ) for name, text in scripts.items()]
    launch = Supervisor(folder, programs)
    async with launch.running():
        for name in scripts:
            await until(lambda name=name: logs.last_lines(launch.log_file(name), 1) != [])  # type: ignore[misc]
        yield launch


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


async def launch_to_its_end(data_folder: Path, *arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "launch", *arguments]
    environ = {**os.environ, "DATA_DIR": str(data_folder)}
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def pids(folder: Path) -> dict[str, int | None]:
    return {name: process and process.pid for name, process in supervisor.find(folder).items()}


@pytest.mark.process
@pytest.mark.anyio
class TestSupervisor:
    @pytest.fixture(autouse=True)
    def _short_waits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("MIN_LIFE_S", "MAX_PAUSE_S", "GRACE_S"):
            monkeypatch.setattr(supervisor, name, 0.5)

    async def test_a_program_that_dies_comes_back_and_the_others_are_left_alone(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async with supervised(tmp_path, first=UP + SLEEPS, second=UP + SLEEPS):
            before = pids(tmp_path)
            await asyncio.sleep(supervisor.MIN_LIFE_S)
            assert before["second"]
            os.kill(before["second"], signal.SIGKILL)
            await until(lambda: pids(tmp_path)["second"] not in (None, before["second"]))
            after = pids(tmp_path)
        assert after["first"] == before["first"]
        assert capsys.readouterr().out.splitlines() == [
            "supervisor: second died (terminated by SIGKILL); it is started again, the others are left alone",
            f"supervisor: second started, pid {after['second']}",
        ]
        assert "supervisor: engine died (terminated by SIGKILL); it is started" in (ROOT / "README.md").read_text()
        assert pids(tmp_path) == {}

    async def test_a_program_that_keeps_dying_is_named_with_its_last_words(self, tmp_path: Path) -> None:
        last_words = r"(?s)bad keeps dying.*bad\.log.*no such model"
        async with supervised(tmp_path, good=UP + SLEEPS, bad="raise SystemExit('no such model')") as programs:
            with pytest.raises(LaunchError, match=last_words):
                await until(lambda: programs.require_alive() is not None)

    async def test_nobody_waits_for_the_words_of_a_program_that_keeps_dying(self, tmp_path: Path) -> None:
        async with supervised(tmp_path, bad="raise SystemExit('no such model')") as programs, asyncio.timeout(60):
            with pytest.raises(LaunchError, match=r"(?s)bad keeps dying.*no such model"):
                await wait_until_logged(programs, "bad", "serving")

    async def test_waiting_for_a_programs_words_can_be_cancelled(self, tmp_path: Path) -> None:
        async with supervised(tmp_path, good=UP + SLEEPS) as programs:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await wait_until_logged(programs, "good", "serving")

    async def test_each_may_drain_and_the_last_is_stopped_first(self, tmp_path: Path) -> None:
        drains = (
            "import os, signal, time\n"
            "def stop(*_):\n"
            "    time.sleep(0.5)\n"
            "    open('{log}', 'a').write('{name} drained, ')\n"
            "    os._exit(0)\n"
            "signal.signal(signal.SIGTERM, stop)\n"
        )
        log = tmp_path / "order"
        scripts = {name: drains.format(log=log, name=name) + UP + SLEEPS for name in ("first", "second")}
        async with supervised(tmp_path, **scripts):
            pass
        assert log.read_text() == "second drained, first drained, "

    def test_there_is_time_for_a_scripts_whole_drain(self) -> None:
        assert supervisor.STOP_S > DRAIN_TIMEOUT_S + 10

    async def test_nothing_survives_not_even_children_that_ignore_sigterm(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + UP + SLEEPS
        has_child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {stubborn!r}])\n" + SLEEPS
        monkeypatch.setattr(supervisor, "STOP_S", 0.5)
        others = set(psutil.Process().children(recursive=True))
        async with supervised(tmp_path, stubborn=stubborn, has_child=has_child):
            family = [child for child in psutil.Process().children(recursive=True) if child not in others]
            assert len(family) == 3
        assert psutil.wait_procs(family, timeout=5)[1] == []

    async def test_one_program_is_restarted_on_demand_and_one_that_does_not_come_back_is_told(
        self, tmp_path: Path
    ) -> None:
        once = f"import os, sys\nos.path.exists('{tmp_path}/ran') and sys.exit(1)\nopen('{tmp_path}/ran', 'w')\n"
        async with supervised(tmp_path / "run", once=once + UP + SLEEPS, first=UP + SLEEPS, second=UP + SLEEPS):
            before = pids(tmp_path / "run")
            restarts = [await launch_to_its_end(tmp_path, "restart", name) for name in ("first", "once", "third")]
            after = pids(tmp_path / "run")
            _, status, _ = await launch_to_its_end(tmp_path, "status")
        assert restarts[0] == (0, "first: stopped\nfirst: started\n", "")
        assert restarts[1][0] == 1
        assert re.fullmatch(r"launch: once does not stay up: see .*logs/once.log\n", restarts[1][2])
        assert restarts[2] == (1, "", "launch: no third runs here; first, once, second does\n")
        assert after["first"] not in (None, before["first"])
        assert after["second"] == before["second"]
        assert re.search(rf"^second +RUNNING +pid {after['second']}, uptime 0:00:\d\d$", status, re.MULTILINE)

    async def test_a_long_log_begins_anew(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(supervisor, "MAX_LOG_BYTES", 1000)
        writes = "import time\nwhile True: print('x' * 99, flush=True); time.sleep(0.01)\n"
        async with supervised(tmp_path, first=writes) as programs:
            await until((tmp_path / "logs" / "first.log.1").exists)
            assert programs.log_file("first").stat().st_size < 10_000


class TestLogs:
    @pytest.mark.anyio
    async def test_new_lines_are_shown_once_without_colours_and_when_they_are_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log, shown = tmp_path / "a.log", list[str]()
        monkeypatch.setattr(logs, "say", shown.append)
        log.write_bytes(b"x: request 0\n")
        showing = asyncio.create_task(logs.show_new_lines("a", log))
        await asyncio.sleep(0)
        with log.open("ab", buffering=0) as file:
            file.write(b"\x1b[32mx: request 1\x1b[0m\n\nx: requ")
            await until(lambda: len(shown) == 1)
            file.write(b"est 2\n")
            await until(lambda: len(shown) == 2)
        log.write_bytes(b"x: request 3\n")  # begun anew
        await until(lambda: len(shown) == 3)
        assert shown == [f"a: x: request {number}" for number in (1, 2, 3)]
        showing.cancel()

    @pytest.mark.parametrize(
        ("log", "phase"),
        [
            ("", "importing SGLang"),
            ("Load weight begin. avail mem=20 GB\na warning\n", "loading the weights"),
            ("Fetching 9 files:  33%|###  | 3/9 [00:01\r", "Fetching 9 files:  33%|###  | 3/9 [00:01"),
        ],
    )
    def test_the_engines_phase_is_the_last_line_that_tells(self, tmp_path: Path, log: str, phase: str) -> None:
        (tmp_path / "engine.log").write_text(log)
        assert logs.current_phase(tmp_path / "engine.log") == phase

    def test_batches_stay_in_the_log_and_requests_are_shown(self) -> None:
        shown = "2026-01-01T00:00:00Z  INFO engine.generate: request req-1: 31 prompt tokens, 5 output tokens"
        assert logs.worth_showing("engine", shown) == shown
        assert logs.worth_showing("engine", "INFO scheduler: Decode batch, #running-req: 1") is None


class FakeFrontend(BaseHTTPRequestHandler):
    """Answers every POST with the class's status and body."""

    status = 200
    body = b""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class TestFirstQuestion:
    @pytest.fixture
    def ask(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, bytes], object]]:
        """Asks a frontend that answers with this status and body."""
        with ThreadingHTTPServer(("127.0.0.1", 0), FakeFrontend) as server:
            threading.Thread(target=server.serve_forever, args=(0.02,)).start()
            settings = Settings.from_environ({"HTTP_PORT": str(server.server_port), "MODEL": "it's a model"})

            def ask(status: int, body: bytes) -> object:
                monkeypatch.setattr(FakeFrontend, "status", status)
                monkeypatch.setattr(FakeFrontend, "body", body)
                return questions.ask(settings)

            yield ask
            server.shutdown()

    def test_an_answer_is_returned(self, ask: Callable[[int, bytes], object]) -> None:
        answer = {"choices": [{"message": {"content": "Hello!"}}]}
        assert ask(200, json.dumps(answer).encode()) == answer

    @pytest.mark.parametrize(
        ("status", "body"),
        [
            (503, b'{"error": {"message": "no engine"}}'),
            (200, b'{"choices": [{"message": {"content": ""}}], "x": "no engine"}'),
            (200, b"no engine"),
        ],
    )
    def test_what_is_no_answer_is_an_error_that_shows_it(
        self, ask: Callable[[int, bytes], object], status: int, body: bytes
    ) -> None:
        with pytest.raises(LaunchError, match="no engine"):
            ask(status, body)

    def test_nobody_there_is_an_error(self) -> None:
        with pytest.raises(LaunchError, match="the request failed"):
            questions.ask(Settings.from_environ({"HTTP_PORT": str(free_port())}))


@pytest.mark.process
def test_a_readers_own_etcdctl_variable_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCDCTL_ENDPOINTS", "127.0.0.1:1")
    infra = Infra(tmp_path)
    with running(infra.start()), pytest.raises(LaunchError, match="etcd knows no instance"):
        questions.instances(Settings.from_environ({"ETCD_ENDPOINTS": infra.env["ETCD_ENDPOINTS"]}))


def test_the_curl_is_the_chapters() -> None:
    assert questions.curl_command(Settings.from_environ({"MODEL": "Qwen/Qwen2.5-0.5B-Instruct"})) == (
        "curl -X POST http://localhost:8080/v1/chat/completions \\\n"
        '  -H "Content-Type: application/json" \\\n'
        "  -d '{\n"
        '    "model": "Qwen/Qwen2.5-0.5B-Instruct",\n'
        '    "messages": [{"role": "user", "content": "Hello!"}],\n'
        '    "max_tokens": 25\n'
        "  }'"
    )


FAKE_UV = """#!/bin/sh
echo "$*" >>calls
case "$1" in
cache) echo uv-cache ;;
venv) mkdir -p .venv/bin && ln -sf "$PYTHON" .venv/bin/python ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder where `make setup` finds what it reads, and a uv that only writes down what it is asked."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    uv = tmp_path / ".uv" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text(FAKE_UV)
    uv.chmod(0o755)
    return tmp_path


def make_setup(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "setup", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)


def uv_calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


class TestSetup:
    def test_make_says_in_one_line_that_no_python_fits(self) -> None:
        done = make_setup(ROOT, "--dry-run", "--always-make", "PYTHON_CANDIDATES=python2.6 no-such-python")
        assert done.returncode == 2
        assert re.fullmatch(r"Makefile:\d+: \*\*\* Python 3\.11 or 3\.12 is needed, and none of .*\n", done.stderr)

    def test_an_environment_is_made_once_and_then_brought_up_to_date(self, checkout: Path) -> None:
        assert make_setup(checkout).returncode == 0
        assert [line.split()[:2] for line in uv_calls(checkout)] == [
            ["cache", "dir"], ["venv", "--quiet"], ["pip", "sync"], ["pip", "install"],
        ]  # fmt: skip
        assert make_setup(checkout).stdout == "make: Nothing to be done for 'setup'.\n"
        installed = (checkout / ".venv" / "installed").stat()
        os.utime(checkout / "pyproject.toml", ns=(installed.st_mtime_ns + 10**9, installed.st_mtime_ns + 10**9))
        assert make_setup(checkout).returncode == 0
        assert [line.split()[:2] for line in uv_calls(checkout)[4:]] == [
            ["cache", "dir"], ["pip", "sync"], ["pip", "install"],
        ]  # fmt: skip
        (checkout / ".venv" / "installed").unlink()  # as an interrupted setup leaves it
        assert make_setup(checkout).returncode == 0
        assert "venv --quiet --no-config --clear" in uv_calls(checkout)[8]

    def test_a_full_disk_is_one_line_before_anything_is_written(self, checkout: Path) -> None:
        done = make_setup(checkout, "MIN_FREE_GB=1000000")
        assert done.returncode == 2
        assert re.match(r"setup: the disk that holds \. has \d+ GB free, .*`MIN_FREE_GB=0 make setup`\n", done.stderr)
        assert len(uv_calls(checkout)) == 1

    def test_what_make_starts_keeps_its_bytecode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        done = subprocess.run(["make", "--eval", "shown: ; @env", "shown"], cwd=ROOT, capture_output=True, text=True)
        assert "PATH=" in done.stdout
        assert "PYTHONDONTWRITEBYTECODE" not in done.stdout

    def test_requirements_name_no_host_and_no_path(self) -> None:
        text = (ROOT / "requirements.txt").read_text()
        assert "://" not in text
        assert not re.search(r"(^|\s)(/|file:|--index|--find|-e )", text)

    def test_requirements_hold_what_pyproject_pins(self) -> None:
        pins = re.findall(r'^ +"([\w.-]+==[\w.]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        locked = set(re.findall(r"^([\w.-]+==[\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
        assert len(pins) > 20
        assert set(pins) <= locked
