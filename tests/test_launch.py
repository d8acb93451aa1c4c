"""launch/: the model folder, ports, supervisord, NATS and etcd, and what a person at the terminal reads."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from launch import first_question, model, supervisor_config, watch
from launch.engine_log import current_phase
from launch.logs import LogTail, last_lines
from launch.model_folder import CONVERSION_VERSION, MANIFEST_FILE, find_flaw, write_manifest
from launch.ports import PortTaken, require_free
from launch.processes import session
from launch.settings import Port, Settings, SettingsError
from launch.supervisor import Supervisor, SupervisorError
from launch.supervisor_config import Program
from tests.processes import ROOT, accepts, free_port, wait_until

TICKS = "import os, time\nprint('up', os.getpid(), flush=True)\ntime.sleep(600)\n"


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    write_manifest(folder, source="a test")
    return folder


class TestModelFolder:
    def test_a_finished_folder_has_no_flaw(self, model_folder: Path) -> None:
        assert find_flaw(model_folder) is None

    def test_a_folder_without_a_manifest_is_half_written(self, model_folder: Path) -> None:
        (model_folder / MANIFEST_FILE).unlink()
        assert find_flaw(model_folder) == "manifest.json is missing"

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"conversion_version": 1}', '{"files": 3}'])
    def test_an_unreadable_manifest_is_noticed(self, model_folder: Path, text: str) -> None:
        (model_folder / MANIFEST_FILE).write_text(text)
        assert find_flaw(model_folder) == "manifest.json is not readable"

    def test_a_missing_file_is_noticed(self, model_folder: Path) -> None:
        (model_folder / "config.json").unlink()
        assert find_flaw(model_folder) == "config.json is missing"

    def test_a_truncated_file_is_noticed(self, model_folder: Path) -> None:
        (model_folder / "model.safetensors").write_bytes(b"weights" * 999)
        assert find_flaw(model_folder) == "model.safetensors has 6993 bytes instead of 7000"

    def test_a_changed_byte_is_noticed(self, model_folder: Path) -> None:
        (model_folder / "model.safetensors").write_bytes(b"weightS" + b"weights" * 999)
        assert find_flaw(model_folder) == "model.safetensors has changed"

    def test_a_folder_of_another_conversion_is_noticed(self, model_folder: Path) -> None:
        manifest = json.loads((model_folder / MANIFEST_FILE).read_text())
        (model_folder / MANIFEST_FILE).write_text(json.dumps(manifest | {"conversion_version": 0}))
        assert find_flaw(model_folder) == f"made by conversion 0, this one is {CONVERSION_VERSION}"

    def test_a_broken_folder_is_replaced_whole(
        self, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def convert(gguf: Path, target: Path, progress: object) -> None:
            target.mkdir()
            (target / "config.json").write_text('{"new": true}')

        monkeypatch.setattr(model, "fetch", lambda target, progress: target / "a.gguf")
        monkeypatch.setattr(model, "convert", convert)
        monkeypatch.setattr(model, "try_out", lambda folder, progress: None)
        (model_folder / "model.safetensors").unlink()
        model.build(model_folder)
        assert find_flaw(model_folder) is None
        assert sorted(path.name for path in model_folder.iterdir()) == ["config.json", MANIFEST_FILE]
        assert "model.safetensors is missing" in capsys.readouterr().out

    def test_a_build_that_fails_leaves_no_folder_and_no_scratch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fetch(target: Path, progress: object) -> Path:
            target.mkdir()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(model, "fetch", fetch)
        with pytest.raises(model.ModelError, match="No space left on device"):
            model.build(tmp_path / "model")
        assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]

    def test_a_hub_model_is_not_converted(self, capsys: pytest.CaptureFixture[str]) -> None:
        model.ensure_model("Qwen/Qwen2.5-0.5B-Instruct")
        assert "nothing to convert" in capsys.readouterr().out


class TestSettings:
    def test_defaults_are_the_chapters_ports(self) -> None:
        settings = Settings.from_environ({})
        assert (settings.nats_server, settings.etcd_endpoints) == ("nats://127.0.0.1:4222", "http://127.0.0.1:2379")
        assert settings.frontend_url == "http://localhost:8080"
        assert settings.model == model.EMBEDDED_MODEL

    def test_a_moved_port_moves_what_the_components_are_told(self) -> None:
        settings = Settings.from_environ({"NATS_PORT": "5222", "ETCD_PORT": "3379", "HTTP_PORT": "9080"})
        assert (settings.nats_server, settings.etcd_endpoints) == ("nats://127.0.0.1:5222", "http://127.0.0.1:3379")
        assert settings.frontend_url == "http://localhost:9080"

    def test_servers_of_the_environment_are_used_as_they_are(self) -> None:
        settings = Settings.from_environ({"NATS_SERVER": "tls://a:1", "ETCD_ENDPOINTS": "http://b:2,http://c:3"})
        assert (settings.nats_server, settings.etcd_endpoints) == ("tls://a:1", "http://b:2,http://c:3")

    @pytest.mark.parametrize("environ", [{"HTTP_PORT": "http"}, {"NATS_PORT": "0"}, {"ETCD_PORT": "65536"}])
    def test_a_wrong_port_is_refused_by_name(self, environ: dict[str, str]) -> None:
        with pytest.raises(SettingsError, match=f"{next(iter(environ))}=.* is not a port"):
            Settings.from_environ(environ)


class TestPorts:
    def test_a_taken_port_names_itself_its_purpose_its_holder_and_the_way_out(self) -> None:
        port = free_port()
        server = ThreadingHTTPServer(("127.0.0.1", port), BaseHTTPRequestHandler)
        try:
            with pytest.raises(PortTaken) as caught:
                require_free([Port(port, "the frontend", "HTTP_PORT")])
        finally:
            server.server_close()
        message = str(caught.value)
        assert f"port {port}, for the frontend, is taken by python" in message
        assert f"(pid {os.getpid()})" in message
        assert "HTTP_PORT" in message
        assert "\n" not in message
        require_free([Port(port, "the frontend", "HTTP_PORT")])


def launch(module: str, environ: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module],
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
    @pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGTERM])
    def test_real_servers_start_and_stop_without_leftovers(
        self, own_ports: dict[str, str], stop_signal: signal.Signals
    ) -> None:
        infra = launch("launch.infra", own_ports)
        wait_for_line(infra, "Ctrl-C stops both")
        children = psutil.Process(infra.pid).children(recursive=True)
        names = {child.name() for child in children}
        ports = [int(own_ports[name]) for name in ("NATS_PORT", "NATS_MONITORING_PORT", "ETCD_PORT")]
        assert all(map(accepts, ports))
        assert {"nats-server", "etcd"} <= names

        infra.send_signal(stop_signal)
        assert infra.communicate(timeout=30)[1] == ""
        assert infra.returncode == 0
        assert not any(map(accepts, ports))
        assert psutil.wait_procs(children, timeout=1)[1] == []

    def test_a_kill_9_of_the_launcher_stops_the_servers(self, own_ports: dict[str, str]) -> None:
        infra = launch("launch.infra", own_ports)
        wait_for_line(infra, "Ctrl-C stops both")
        children = psutil.Process(infra.pid).children(recursive=True)
        infra.kill()
        infra.communicate()
        assert psutil.wait_procs(children, timeout=20)[1] == []

    def test_nats_is_as_configured_and_its_folder_is_its_own(self, own_ports: dict[str, str]) -> None:
        infra = launch("launch.infra", own_ports)
        monitoring = f"http://127.0.0.1:{own_ports['NATS_MONITORING_PORT']}/varz"
        try:
            wait_for_line(infra, "Ctrl-C stops both")
            with first_question.local_opener().open(monitoring) as response:
                facts = json.load(response)
            other_ports = {name: str(free_port()) for name in own_ports if name.endswith("_PORT")}
            second = launch("launch.infra", own_ports | other_ports)
            _, errors = second.communicate(timeout=20)
        finally:
            infra.terminate()
            infra.communicate()
        assert facts["max_payload"] == 8 * 1024 * 1024
        assert facts["jetstream"]["config"]["store_dir"].startswith(own_ports["DATA_DIR"])
        assert second.returncode == 1
        assert f"is in use by another launch (pid {infra.pid})" in errors

    @pytest.mark.parametrize(
        ("module", "variable"),
        [("launch.infra", "ETCD_PORT"), ("launch.run", "HTTP_PORT"), ("launch.run", "NATS_PORT")],
    )
    def test_a_taken_port_ends_a_launch_with_one_line(
        self, own_ports: dict[str, str], module: str, variable: str
    ) -> None:
        server = ThreadingHTTPServer(("127.0.0.1", int(own_ports[variable])), BaseHTTPRequestHandler)
        try:
            process = launch(module, own_ports)
            output, errors = process.communicate(timeout=20)
        finally:
            server.server_close()
        assert process.returncode == 1
        assert output == ""
        assert errors.count("\n") == 1
        assert own_ports[variable] in errors
        assert variable in errors

    def test_a_named_server_that_is_not_there_ends_the_run_with_one_line(self, own_ports: dict[str, str]) -> None:
        process = launch("launch.run", own_ports | {"NATS_SERVER": f"nats://127.0.0.1:{free_port()}"})
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 1
        last_line = errors.splitlines()[-1]
        assert last_line.startswith("run: NATS at 127.0.0.1:")
        assert "NATS_SERVER" in last_line
        assert "Traceback" not in errors


def supervise(folder: Path, scripts: Mapping[str, str]) -> Supervisor:
    programs = []
    for priority, (name, text) in enumerate(scripts.items()):
        script = folder / f"{name}.py"
        script.write_text(text)
        programs.append(Program(name=name, command=[sys.executable, str(script)], priority=priority))
    return Supervisor(folder / "state", programs, environ=os.environ, directory=folder)


def pids(supervisor: Supervisor) -> dict[str, int]:
    return {name: state.pid for name, state in supervisor.states().items()}


def all_said_up(supervisor: Supervisor) -> bool:
    return all(last_lines(supervisor.log_file(program.name), 1) for program in supervisor.programs)


@pytest.mark.process
class TestSupervisor:
    def test_a_program_that_dies_comes_back_and_the_others_are_left_alone(self, tmp_path: Path) -> None:
        with supervise(tmp_path, {"first": TICKS, "second": TICKS, "third": TICKS}) as supervisor:
            wait_until(lambda: all_said_up(supervisor), 10, "all programs run")
            before = pids(supervisor)
            supervisor.events()
            os.kill(before["second"], signal.SIGKILL)
            wait_until(lambda: pids(supervisor)["second"] not in (0, before["second"]), 10, "a new process")
            after = pids(supervisor)
            events = [text for event in supervisor.events() if (text := watch.in_words(event))]
        assert (after["first"], after["third"]) == (before["first"], before["third"])
        assert supervisor.num_deaths == {"second": 1}
        assert events[0].startswith("second died (terminated by SIGKILL")
        assert events[1] == f"second started, pid {after['second']}"

    def test_a_program_that_keeps_dying_is_named_with_its_last_words(self, tmp_path: Path) -> None:
        supervisor = supervise(tmp_path, {"good": TICKS, "bad": "raise SystemExit('no such model')"})
        last_words = r"(?s)bad keeps dying.*bad\.log.*no such model"
        with supervisor, pytest.raises(SupervisorError, match=last_words):
            wait_until(lambda: supervisor.require_alive() is not None, 20, "it gives up")

    def test_nothing_survives_not_even_children_that_ignore_sigterm(self, tmp_path: Path) -> None:
        parent = (
            "import subprocess, sys, time\n"
            "child = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'\n"
            "subprocess.Popen([sys.executable, '-c', child])\n"
            "print('up', flush=True)\n"
            "time.sleep(600)\n"
        )
        with supervise(tmp_path, {"parent": parent}) as supervisor:
            wait_until(lambda: last_lines(supervisor.log_file("parent"), 1) == ["up"], 10, "the child")
            family = psutil.Process(pids(supervisor)["parent"])
            session_id = os.getsid(family.pid)
            assert len(session(session_id)) == 3  # supervisord, the parent, its child
        assert session(session_id) == set()

    def test_a_program_gets_the_time_to_drain(self, tmp_path: Path) -> None:
        drains = (
            "import signal, sys, time\n"
            "def stop(*_):\n"
            "    time.sleep(1.5)\n"
            "    print('drained', flush=True)\n"
            "    sys.exit(0)\n"
            "signal.signal(signal.SIGTERM, stop)\n"
            "print('up', flush=True)\n"
            "time.sleep(600)\n"
        )
        with supervise(tmp_path, {"drains": drains}) as supervisor:
            wait_until(lambda: last_lines(supervisor.log_file("drains"), 1) == ["up"], 10, "it is up")
        assert last_lines(supervisor.log_file("drains"), 1) == ["drained"]

    def test_supervisorctl_restarts_one_program(self, tmp_path: Path) -> None:
        with supervise(tmp_path, {"first": TICKS, "second": TICKS}) as supervisor:
            wait_until(lambda: all_said_up(supervisor), 10, "both run")
            before = pids(supervisor)
            control = [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(supervisor.config_file)]
            subprocess.run([*control, "restart", "first"], check=True, capture_output=True)
            after = pids(supervisor)
            supervisor.events()
        assert after["first"] != before["first"]
        assert after["second"] == before["second"]
        assert supervisor.num_deaths == {}

    def test_a_long_path_does_not_stop_it(self, tmp_path: Path) -> None:
        folder = tmp_path / ("long" * 25) / "100%"
        folder.mkdir(parents=True)
        with supervise(folder, {"first": TICKS}) as supervisor:
            wait_until(lambda: all_said_up(supervisor), 10, "it is up")
        assert len(str(supervisor_config.socket_file(folder))) < 100


class TestLogs:
    def test_each_line_comes_once_without_colours_and_only_when_it_is_whole(self, tmp_path: Path) -> None:
        log = tmp_path / "a.log"
        tail = LogTail(log)
        assert tail.new_lines() == []
        log.write_bytes(b"one\n\x1b[32mtwo\x1b[0m\n\nthr")
        assert tail.new_lines() == ["one", "two"]
        with log.open("ab") as file:
            file.write(b"ee\n")
        assert tail.new_lines() == ["three"]
        log.write_bytes(b"new\n")  # rotated
        assert tail.new_lines() == ["new"]

    def test_the_engines_phase_is_the_last_line_that_tells(self) -> None:
        assert current_phase([]) == "importing SGLang"
        assert current_phase(["Load weight begin. avail mem=20 GB", "a warning"]) == "loading the weights"
        assert current_phase(["Fetching 9 files:  33%|###  | 3/9 [00:01"]) == "Fetching 9 files:  33%|###  | 3/9 [00:01"

    def test_batches_stay_in_the_log_and_requests_are_shown(self) -> None:
        shown = "2026-01-01T00:00:00Z  INFO engine.generate: request req-1: 31 prompt tokens, 5 output tokens"
        assert watch.worth_showing("engine", shown) == shown
        assert watch.worth_showing("engine", "INFO scheduler: Decode batch, #running-req: 1") is None


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


@pytest.fixture
def frontend_settings(tmp_path: Path) -> Iterator[Settings]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeFrontend)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield Settings.from_environ({"HTTP_PORT": str(server.server_port), "MODEL": "it's a model"})
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class TestFirstQuestion:
    @pytest.fixture(params=["with curl", "without curl"], autouse=True)
    def _curl(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        if request.param == "without curl":
            monkeypatch.setattr(first_question.shutil, "which", lambda name: None)
        elif first_question.shutil.which("curl") is None:
            pytest.skip("this machine has no curl")

    def test_an_answer_is_returned(self, frontend_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        answer = {"choices": [{"message": {"content": "Hello!"}}]}
        monkeypatch.setattr(FakeFrontend, "body", json.dumps(answer).encode())
        assert first_question.ask(frontend_settings) == answer

    @pytest.mark.parametrize(
        ("status", "body"),
        [
            (503, b'{"error": {"message": "no engine"}}'),
            (200, b'{"choices": [{"message": {"content": ""}}], "x": "no engine"}'),
            (200, b"no engine"),
        ],
    )
    def test_what_is_no_answer_is_an_error_that_shows_it(
        self, frontend_settings: Settings, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes
    ) -> None:
        monkeypatch.setattr(FakeFrontend, "status", status)
        monkeypatch.setattr(FakeFrontend, "body", body)
        with pytest.raises(first_question.WrongAnswer, match="no engine"):
            first_question.ask(frontend_settings)

    def test_nobody_there_is_an_error(self, frontend_settings: Settings) -> None:
        nobody = dataclasses.replace(frontend_settings, http_port=Port(free_port(), "the frontend", "HTTP_PORT"))
        with pytest.raises(first_question.WrongAnswer, match="the request failed"):
            first_question.ask(nobody)


def test_the_curl_is_the_chapters() -> None:
    assert first_question.curl_command(Settings.from_environ({"MODEL": "Qwen/Qwen2.5-0.5B-Instruct"})) == (
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
        (checkout / "pyproject.toml").touch()
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

    def test_requirements_name_no_host_and_no_path(self) -> None:
        text = (ROOT / "requirements.txt").read_text()
        assert "://" not in text
        assert not re.search(r"(^|\s)(/|file:|--index|--find|-e )", text)

    def test_requirements_hold_what_pyproject_pins(self) -> None:
        pins = re.findall(r'^ +"([\w.-]+==[\w.]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        locked = set(re.findall(r"^([\w.-]+==[\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
        assert len(pins) > 20
        assert set(pins) <= locked


@pytest.mark.pipeline
def test_make_run_ends_in_an_answer_and_two_instances(own_ports: dict[str, str]) -> None:
    process = launch("launch.run", own_ports | {"RUN_ONCE": "1"})
    output, errors = process.communicate(timeout=280)
    assert (process.returncode, errors) == (0, "")
    assert "$ curl -X POST" in output
    assert '"content": "' in output
    for instance in first_question.EXPECTED_INSTANCES:
        assert f"v1/instances/{instance}/" in output
    assert "nats_tcp" in output
