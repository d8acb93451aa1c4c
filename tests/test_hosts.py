"""The pipeline on five hosts, which meet over a network and nothing else; one of them loses its cable."""

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import httpx
import pytest

from tests.hosts import INTERFACE, Host, Hosts, why_no_hosts
from tests.load import Load, chat, streamed_text
from tests.processes import MODEL, SHORT_LEASE, Infra, Pipeline, Process, free_port, running, wait_until
from tests.raw_http import open_request

pytestmark = [pytest.mark.hosts, pytest.mark.process, pytest.mark.timed, pytest.mark.needs("ip", "ss")]

ENGINES = ("engine-0", "engine-1")
VARIABLE = "DYN_TCP_RESPONSE_STREAM_HOST"
NOTICED_S = 13  # keepalive finds a dead host after 9 s


@dataclass
class Deployment:
    hosts: Hosts
    by_name: dict[str, Host]
    pipeline: Pipeline
    engines: dict[str, Process]

    def start(self, name: str, script: str, *args: str, **env: str) -> Process:
        self.pipeline.launcher = self.by_name[name].launcher
        return self.pipeline.script(script, *args, env=env)

    def engine_keys(self) -> list[str]:
        return self.pipeline.infra.instance_keys("engine/generate")

    def busy(self, *, requests: int) -> str:
        """The engine that runs so many."""

        def is_running(name: str) -> bool:
            return f"running {requests}" in self.engines[name].log.splitlines()[-1]

        wait_until(lambda: any(map(is_running, ENGINES)), 20, "an engine to be busy")
        return next(filter(is_running, ENGINES))


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Deployment]:
    """NATS and etcd, a frontend, a processor and two engines, each on a host of its own."""
    if reason := why_no_hosts():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    with ExitStack() as cleanup:
        hosts = Hosts()
        cleanup.callback(hosts.stop)
        hosts.start()
        by_name = {name: hosts.add(name) for name in ("infra", "frontend", "processor", *ENGINES)}
        infra = Infra(folder / "infra", launcher=by_name["infra"].launcher, address=by_name["infra"].address)
        cleanup.enter_context(running(infra))
        infra.start()
        address = by_name["frontend"].address
        pipeline = Pipeline(infra, folder / "scripts", env={VARIABLE: INTERFACE, **SHORT_LEASE}, address=address)
        cleanup.enter_context(running(pipeline))
        deployment = Deployment(hosts, by_name, pipeline, {})
        pipeline.launcher = by_name["frontend"].launcher
        pipeline.frontend()
        pipeline.launcher = by_name["processor"].launcher
        pipeline.processor()
        for name in ENGINES:
            pipeline.launcher = by_name[name].launcher
            deployment.engines[name] = pipeline.fake_engine("--token-interval-ms", "30")
        pipeline.wait_ready(engines=2)
        yield deployment


def test_requests_cross_five_hosts(deployment: Deployment) -> None:
    answers = [chat(deployment.pipeline) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200] * 4
    text = answers[0].json()["choices"][0]["message"]["content"]
    assert [streamed_text(deployment.pipeline) for _ in range(4)] == [text] * 4
    wait_until(lambda: [each.log.count("stopped") for each in deployment.engines.values()] == [4, 4], 5, "the ends")


def test_answers_come_in_on_the_interface_that_was_named(deployment: Deployment) -> None:
    """On the address that the route to others leaves from, though the interface has a link-local one, too."""
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(chat, deployment.pipeline, max_tokens=100)
        engine = deployment.by_name[deployment.busy(requests=1)]
        for name, caller in (("frontend", deployment.by_name["processor"]), ("processor", engine)):
            host = deployment.by_name[name]
            assert "inet6 fe80" in host.run("ip", "address", "show", INTERFACE)
            listening = re.findall(r"^LISTEN +\d+ +\d+ +(\S+):(\d+)", host.run("ss", "-tln"), re.MULTILINE)
            ports = [port for address, port in listening if int(port) != deployment.pipeline.http_port]
            assert {address for address, _ in listening} == {host.address}
            connected = host.run("ss", "-tn", "state", "established", "dst", caller.address)
            assert any(f"{host.address}:{port}" in connected for port in ports), connected
        assert answer.result(60).status_code == 200


def test_a_host_without_its_cable_costs_no_request_that_it_was_answering(deployment: Deployment) -> None:
    pipeline, hosts = deployment.pipeline, deployment.hosts
    expected = chat(pipeline, max_tokens=100).json()["choices"][0]["message"]["content"]
    has_begun = threading.Event()
    with ThreadPoolExecutor(4) as threads:
        streams = [threads.submit(streamed_text, pipeline, has_begun, 60, max_tokens=100) for _ in range(2)]
        wholes = [threads.submit(chat, pipeline, max_tokens=100) for _ in range(2)]
        assert has_begun.wait(20)
        lost = deployment.by_name[deployment.busy(requests=2)]
        hosts.cut_off(lost)
        try:
            started = time.monotonic()
            assert [stream.result(60) for stream in streams] == [expected] * 2
            texts = [whole.result(60).json()["choices"][0]["message"]["content"] for whole in wholes]
            assert texts == [expected] * 2
            took_s = time.monotonic() - started
        finally:
            hosts.reconnect(lost)
    print(f"all complete {took_s:.1f} s after the cable was pulled, of which an answer takes 3 s")
    assert took_s < NOTICED_S + 5 + 5
    wait_until(lambda: len(deployment.engine_keys()) == 2, 60, "the engine to be back")
    pipeline.wait_ready(engines=2)


def test_a_host_without_its_cable_fails_no_request_and_serves_again_with_it(deployment: Deployment) -> None:
    pipeline = deployment.pipeline
    lost, engine = deployment.by_name[ENGINES[0]], deployment.engines[ENGINES[0]]
    pid = engine.pid
    with Load(pipeline, num_clients=6) as load:
        deployment.hosts.cut_off(lost)
        try:
            wait_until(lambda: len(deployment.engine_keys()) == 1, 20, "etcd to forget the engine")
            load.wait_for(30)
        finally:
            deployment.hosts.reconnect(lost)
        back_s = wait_until(lambda: len(deployment.engine_keys()) == 2, 60, "the engine to be back")
        num_answered = engine.log.count("stopped False")
        wait_until(lambda: engine.log.count("stopped False") > num_answered + 5, 20, "requests for it")
    print(f"back {back_s:.1f} s after its cable, the same process")
    assert set(load.outcomes) == {"200"}
    assert load.slowest_s < NOTICED_S + 5
    assert engine.pid == pid
    assert engine.is_alive


def test_nothing_stays_booked_for_a_processor_without_its_cable(deployment: Deployment) -> None:
    pipeline, lost = deployment.pipeline, deployment.by_name["processor"]
    port = free_port()
    router = deployment.start("infra", "router.py", DYN_SYSTEM_PORT=str(port), DYN_SYSTEM_HOST="0.0.0.0")
    metrics_url = f"http://{deployment.by_name['infra'].address}:{port}/metrics"

    def num_booked() -> float:
        text = httpx.get(metrics_url, timeout=2).text
        return sum(map(float, re.findall(r"^dynamo_chat_requests_in_flight{.*} (\S+)$", text, re.MULTILINE)))

    wait_until(lambda: "serving inference/router" in router.log, 60, "the router")
    with ExitStack() as client:
        for is_last in (False, False, False, False, True):  # a busy processor does without the router
            client.enter_context(open_request(pipeline, max_tokens=1000))  # 30 s; nobody waits for the last ones
            with suppress(*[] if is_last else [TimeoutError]):
                wait_until(lambda: num_booked() == 1, 4, "a booking")
                break
            client.close()
        deployment.hosts.cut_off(lost)
        try:
            took_s = wait_until(lambda: num_booked() == 0, NOTICED_S + 2, "no bookings")
        finally:
            deployment.hosts.reconnect(lost)
    print(f"not booked {took_s:.1f} s after the cable was pulled")
    assert router.terminate() == 0
    pipeline.processes.remove(router)
    pipeline.wait_ready(engines=2)


def test_an_interface_that_dynamo_cannot_use_is_refused_with_a_way_out(deployment: Deployment) -> None:
    """A second interface, where no default route says which of its addresses is meant."""
    host = deployment.by_name["processor"]
    host.run("ip", "link", "add", "side", "type", "veth", "peer", "name", "edis")
    host.run("ip", "address", "add", "198.19.255.1/24", "dev", "side")
    for interface in ("side", "edis"):
        host.run("ip", "link", "set", interface, "up")
    wait_until(lambda: "tentative" not in host.run("ip", "address", "show", "side"), 10, "its IPv6 address")
    refused = deployment.start("processor", "processor.py", "--model", MODEL, **{VARIABLE: "side"})
    assert refused.running.wait(60) == 1
    assert "error: DYN_TCP_RESPONSE_STREAM_HOST=side: Dynamo would listen on fe80" in refused.log
    (way_out,) = re.findall(r"\((ip address add \S+) dev side label (\S+)\)", refused.log)
    assert way_out == ("ip address add 198.19.255.1/...", "side:chat")
    host.run("ip", "address", "del", "198.19.255.1/24", "dev", "side")
    host.run("ip", "address", "add", "198.19.255.1/24", "dev", "side", "label", "side:chat")
    named = {VARIABLE: "side:chat", "DYN_TCP_RESPONSE_STREAM_PORT": "18080"}
    taken = deployment.start("processor", "processor.py", "--model", MODEL, **named)
    wait_until(lambda: "serving inference/processor/process" in taken.log, 60, "the processor")
    assert "198.19.255.1:18080" in host.run("ss", "-tln")
    assert taken.terminate() == 0
    deployment.pipeline.processes = [p for p in deployment.pipeline.processes if p not in (refused, taken)]


def test_a_processor_that_others_cannot_answer_says_so(deployment: Deployment) -> None:
    deaf = deployment.start("processor", "processor.py", "--model", MODEL, **{VARIABLE: "lo"})
    wait_until(lambda: "serving inference/processor/process" in deaf.log, 60, "the processor")
    warning = "answers come back on loopback only: to have inference/engine/generate on another machine, set"
    assert f"{warning} {VARIABLE}" in deaf.log
    assert deaf.terminate() == 0
    deployment.pipeline.processes.remove(deaf)
