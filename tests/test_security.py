"""Who can reach the pipeline, who is let in, and what a worker that sends nonsense costs."""

import asyncio
import re
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from common.dynamo.network import ServersMissing, check_access
from tests.fake_processor import ENDLESS, GARBAGE
from tests.processes import DYNAMO, Infra, Pipeline, Process, accepts, new_pipeline, running, wait_until
from tests.raw_http import CHAT

SECRETS = ("n4tsPass", "t0kenOfNats", "etcdPass5", "wr0ngSecret")
NATS_USER = {"NATS_AUTH_USERNAME": "pipeline", "NATS_AUTH_PASSWORD": "n4tsPass"}
NATS_TOKEN = {"NATS_AUTH_TOKEN": "t0kenOfNats"}
ETCD_USER = {"ETCD_AUTH_USERNAME": "root", "ETCD_AUTH_PASSWORD": "etcdPass5"}


def listening(pipeline: Pipeline) -> list[tuple[str, int]]:
    """The addresses and ports on which the processes of a pipeline listen, with their children."""
    parents = [psutil.Process(process.pid) for process in pipeline.processes]
    family = [process for parent in parents for process in (parent, *parent.children(recursive=True))]
    connections = [connection for process in family for connection in process.net_connections("tcp")]
    return [tuple(each.laddr) for each in connections if each.status == psutil.CONN_LISTEN]


def assert_all_on_loopback(pipeline: Pipeline, at_least: int) -> None:
    addresses = listening(pipeline)
    assert len(set(addresses)) >= at_least
    assert not [address for address in addresses if not address[0].startswith(("127.", "::1", "::ffff:127."))]


@pytest.mark.process
@pytest.mark.skipif(DYNAMO.startswith("0."), reason="answers come in on a routable address: docs/dynamo-releases.md")
def test_everything_listens_on_loopback(fake_pipeline: Pipeline, fake_client: httpx.Client) -> None:
    assert fake_client.post("/v1/chat/completions", json=CHAT).status_code == 200
    # The frontend's HTTP; the response streams of the frontend and of the processor.
    assert_all_on_loopback(fake_pipeline, at_least=3)


@pytest.mark.pipeline
def test_everything_of_sglang_listens_on_loopback(
    pipeline: Pipeline, client: httpx.Client, embedded_model: str
) -> None:
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert_all_on_loopback(pipeline, at_least=3)


def with_etcd_users(infra: Infra, *tls: str) -> None:
    password = ETCD_USER["ETCD_AUTH_PASSWORD"]
    for words in (f"user add root:{password}", "user grant-role root root", "auth enable"):
        infra.etcdctl(*tls, *words.split())


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, which signed server.pem for 127.0.0.1 and client.pem for a user named root, and other-ca.pem."""
    folder = tmp_path_factory.mktemp("certificates")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE"]
    for name, subject, more in (
        ("ca", "ca", []),
        ("other-ca", "other-ca", []),
        ("server", "server", [*signed, "-addext", "subjectAltName=IP:127.0.0.1"]),
        ("client", "root", signed),
    ):
        command = ["openssl", "req", "-x509", *key, "-keyout", f"{name}.key", "-out", f"{name}.pem"]
        subprocess.run([*command, "-subj", f"/CN={subject}", *more], cwd=folder, capture_output=True, check=True)
    return folder


def use_tls(infra: Infra, certificates: Path) -> dict[str, str]:
    """Have etcd speak TLS and ask for certificates, before it starts; returns the variables that clients need."""
    url = f"https://127.0.0.1:{infra.etcd_port}"
    infra.etcd_args = [
        "--listen-client-urls", url, "--advertise-client-urls", url,
        "--cert-file", str(certificates / "server.pem"), "--key-file", str(certificates / "server.key"),
        "--client-cert-auth", "--trusted-ca-file", str(certificates / "ca.pem"),
    ]  # fmt: skip
    infra.forget()
    return {
        "ETCD_ENDPOINTS": url,
        "ETCD_AUTH_CA": str(certificates / "ca.pem"),
        "ETCD_AUTH_CLIENT_CERT": str(certificates / "client.pem"),
        "ETCD_AUTH_CLIENT_KEY": str(certificates / "client.key"),
    }


def assert_no_secrets(*processes: Process) -> None:
    for process in processes:
        assert not [secret for secret in SECRETS if secret in process.log]


@pytest.mark.process
def test_users_and_passwords_all_the_way(tmp_path: Path, embedded_model: str) -> None:
    with new_pipeline(
        tmp_path,
        nats_args=["--user", "pipeline", "--pass", NATS_USER["NATS_AUTH_PASSWORD"]],
        env={**NATS_USER, **ETCD_USER},
    ) as pipeline:
        with_etcd_users(pipeline.infra)
        pipeline.frontend()
        pipeline.processor()
        pipeline.fake_engine()
        pipeline.wait_ready()
        assert httpx.post(f"{pipeline.url}/v1/chat/completions", json=CHAT, timeout=60).status_code == 200
        assert [process.terminate() for process in pipeline.processes] == [0, 0, 0]
        assert_no_secrets(*pipeline.processes)


def all_the_way(pipeline: Pipeline) -> None:
    """A question and its answer, by the frontend and a small processor."""
    pipeline.frontend()
    pipeline.script("tests/fake_processor.py")
    pipeline.fake_engine()
    pipeline.wait_ready()
    answer = httpx.post(f"{pipeline.url}/v1/chat/completions", json=CHAT, timeout=60).json()
    assert answer["choices"][0]["message"]["content"] == "Hello from afar."
    assert_no_secrets(*pipeline.processes)


@pytest.mark.process
def test_a_nats_token_all_the_way(tmp_path: Path) -> None:
    with new_pipeline(tmp_path, nats_args=["--auth", NATS_TOKEN["NATS_AUTH_TOKEN"]], env=NATS_TOKEN) as pipeline:
        all_the_way(pipeline)


@pytest.mark.process
@pytest.mark.needs("openssl")
@pytest.mark.parametrize("has_users", [False, True])
def test_etcd_with_tls_and_client_certificates_all_the_way(tmp_path: Path, certificates: Path, has_users: bool) -> None:
    infra = Infra(tmp_path / "infra")
    tls = use_tls(infra, certificates)
    pipeline = Pipeline(infra, tmp_path / "scripts", env=tls)
    with running(infra.start()), running(pipeline):
        if has_users:
            ca, certificate, key = list(tls.values())[1:]
            with_etcd_users(
                infra, "--endpoints", tls["ETCD_ENDPOINTS"], "--cacert", ca, "--cert", certificate, "--key", key
            )
        all_the_way(pipeline)


def refusal(infra: Infra, folder: Path, env: Mapping[str, str], script: str) -> str:
    """The one line that a script says before it ends with 1, soon."""
    with running(pipeline := Pipeline(infra, folder, env=env)):
        process = pipeline.frontend() if script == "frontend.py" else pipeline.script(script)
        assert process.running.wait(60) == 1
        assert_no_secrets(process)
        (line,) = process.log.splitlines()
        return line


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Infra]:
    """NATS and etcd with users."""
    folder = tmp_path_factory.mktemp("guarded")
    infra = Infra(folder, nats_args=["--user", "pipeline", "--pass", NATS_USER["NATS_AUTH_PASSWORD"]])
    with running(infra.start()):
        with_etcd_users(infra)
        yield infra


WRONG = "wr0ngSecret"


@pytest.mark.process
@pytest.mark.parametrize("script", ["frontend.py", "tests/fake_engine.py"])
@pytest.mark.parametrize(
    ("env", "words"),
    [
        (ETCD_USER, "NATS at .* refused us .*: look at NATS_AUTH_USERNAME and NATS_AUTH_PASSWORD"),
        (ETCD_USER | NATS_USER | {"NATS_AUTH_PASSWORD": WRONG}, "NATS at .* refused us"),
        (ETCD_USER | {"NATS_AUTH_TOKEN": WRONG}, "NATS at .* refused us"),
        (NATS_USER, "etcd at .* refused us .*user name is empty.*: look at ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD"),
        (NATS_USER | ETCD_USER | {"ETCD_AUTH_PASSWORD": WRONG}, "etcd at .* refused us .*authentication failed"),
        (NATS_USER | {"ETCD_AUTH_USERNAME": "nobody", "ETCD_AUTH_PASSWORD": WRONG}, "etcd at .* refused us"),
    ],
)
def test_wrong_credentials_are_one_line_and_no_start(
    guarded: Infra, tmp_path: Path, env: Mapping[str, str], words: str, script: str
) -> None:
    assert re.match(f"error: {words}", refusal(guarded, tmp_path, env, script))


@pytest.mark.process
@pytest.mark.needs("openssl")
def test_wrong_tls_settings_are_one_line_and_no_start(tmp_path: Path, certificates: Path) -> None:
    infra = Infra(tmp_path / "infra")
    tls = use_tls(infra, certificates)
    wrong = {
        "certificate verify failed|unable to get local issuer": {
            **tls, "ETCD_AUTH_CA": str(certificates / "other-ca.pem"),
        },
        "speaks TLS: write https://": {"ETCD_ENDPOINTS": tls["ETCD_ENDPOINTS"].replace("https", "http")},
        "ETCD_AUTH_CLIENT_KEY for it, all three, and no ETCD_AUTH_USERNAME": {**tls, "ETCD_AUTH_CLIENT_CERT": ""},
        "cannot use ETCD_AUTH_CA": {**tls, "ETCD_AUTH_CA": "/no/such/file"},
    }  # fmt: skip
    with running(infra.start()):
        for number, (words, env) in enumerate(wrong.items()):
            line = refusal(infra, tmp_path / str(number), env, "frontend.py")
            assert line.startswith("error: ")
            assert re.search(words, line), line


@pytest.mark.process
def test_tls_with_a_server_that_has_none_is_one_line_and_no_start(infra: Infra, tmp_path: Path) -> None:
    env = {"ETCD_ENDPOINTS": infra.env["ETCD_ENDPOINTS"].replace("http", "https")}
    assert "no TLS with etcd" in refusal(infra, tmp_path, env, "frontend.py")


def test_a_server_without_tls_that_resets_a_connection_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(server: socket.socket) -> None:
        for is_reset in (True, False):
            with server.accept()[0] as client:
                assert client.recv(10_000)
                if is_reset:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as thread:
        server.settimeout(5)
        monkeypatch.setenv("ETCD_ENDPOINTS", f"https://127.0.0.1:{server.getsockname()[1]}")
        serving = thread.submit(serve, server)
        with pytest.raises(ServersMissing, match="no TLS with etcd"):
            asyncio.run(check_access())
        serving.result(5)


@pytest.fixture(scope="module")
def nonsense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A frontend before a processor that sends garbage when it is asked to."""
    with new_pipeline(tmp_path_factory.mktemp("nonsense")) as pipeline:
        pipeline.frontend()
        pipeline.script("tests/fake_processor.py")
        wait_until(lambda: accepts(pipeline.http_port), 30, "the frontend")
        wait_until(lambda: bool(pipeline.infra.instance_keys("processor/process")), 30, "the processor")
        yield pipeline
        assert pipeline.processes[1].terminate() == 0


@pytest.mark.process
@pytest.mark.parametrize("kind", [*GARBAGE, *ENDLESS])
def test_a_processor_that_sends_garbage_costs_one_502(nonsense: Pipeline, kind: str) -> None:
    frontend = psutil.Process(nonsense.processes[0].pid)
    before = frontend.memory_info().rss
    answer = httpx.post(f"{nonsense.url}/v1/chat/completions", json=CHAT | {"user": kind}, timeout=60)
    assert answer.status_code == 502, answer.text
    assert answer.json()["error"]["message"]
    assert "internal text" not in answer.text
    assert len(answer.content) < 1000
    assert frontend.memory_info().rss < before + 250_000_000
    assert "Traceback" not in nonsense.processes[0].log
    assert httpx.get(f"{nonsense.url}/health", timeout=10).status_code == 200
    assert httpx.post(f"{nonsense.url}/v1/chat/completions", json=CHAT, timeout=10).status_code == 200


@pytest.mark.process
@pytest.mark.parametrize("kind", ["huge-junk", "huge-list", "endless-nothing"])
def test_an_engine_that_sends_too_much_costs_one_502(fake_pipeline: Pipeline, kind: str) -> None:
    engine = fake_pipeline.fake_engine("--garbage", kind)
    processor = psutil.Process(next(p.pid for p in fake_pipeline.processes if p.name == "processor.py"))
    before = processor.memory_info().rss
    try:
        fake_pipeline.wait_ready(engines=2)
        chats = [httpx.post(f"{fake_pipeline.url}/v1/chat/completions", json=CHAT, timeout=60) for _ in range(4)]
        assert sorted(answer.status_code for answer in chats) == [200, 200, 502, 502]
        assert processor.memory_info().rss < before + 400_000_000
    finally:
        engine.terminate()
        fake_pipeline.processes.remove(engine)
