"""What the documentation says: its fenced blocks, and how a command of it is run.

A block of `sh`, `bash` or `python` is a command. One of `text` or `json` right behind it is what it prints.
"""

import os
import re
import signal
import subprocess
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from tests.processes import BIN, ROOT, Infra, Pipeline, free_port, wait_until

README, CHAPTER_1 = ROOT / "README.md", ROOT / "docs" / "chapter-1" / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
COMMANDS = ("sh", "bash", "python")


class Block(NamedTuple):
    """A fenced block, and what follows it directly as its output, if anything does."""

    language: str
    text: str
    output: str | None

    @property
    def command(self) -> str:
        """Without comments."""
        return "\n".join(line for line in self.text.splitlines() if not line.startswith("# "))


def blocks(page: Path) -> list[Block]:
    fences = list(re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE))
    found = []
    for fence, following in zip_longest(fences, fences[1:]):
        output = None
        if following and following[1] in ("text", "json"):
            between = page.read_text()[fence.end() : following.start()].strip()
            if not between or (between.endswith(":") and "\n\n" not in between):
                output = following[2]
        found.append(Block(fence[1], fence[2].rstrip("\n"), output))
    return found


def block(page: Path, start: str, language: str = "sh", nth: int = 0) -> Block:
    return [b for b in blocks(page) if b.language == language and b.command.startswith(start)][nth]


def section(page: Path, title: str) -> str:
    return page.read_text().split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


MASKS = (
    (r"chatcmpl-[0-9a-f-]{32,36}", "chatcmpl-ID"),
    (r'"created": ?\d+', '"created":TIME'),
    (r'"cached_tokens": ?\d+', '"cached_tokens":N'),
    (r'"instance_id":\d+', '"instance_id":N'),
    (r"(?<=[-/])[0-9a-f]{10,16}\b", "LEASE"),
    (r"\s+[\d.]+ s\b", " N s"),
    (r"pid \d+", "pid N"),
    (r"(localhost|127\.0\.0\.1):\d+", "HOST"),
    (r" --endpoints \S+", ""),
    (r"logs in \S+", "logs in FOLDER"),
)
SAMPLED = ((r'"content": ".+"', "CONTENT"), (r'"(completion|total)_tokens": \d+', "N"), (r'"(stop|length)"', "END"))


def masked(text: str, *, is_sampled: bool = False) -> str:
    """Without ids, times and ports; with `is_sampled`, also without the model's words and how many they were."""
    for pattern, replacement in MASKS + (SAMPLED if is_sampled else ()):
        text = re.sub(pattern, replacement, text)
    return text


def assert_shows(shown: str, real: str, *, is_sampled: bool = False) -> None:
    """Every line of a page's output is in the real one, in that order; "..." stands for any number of lines."""
    lines = iter(masked(real, is_sampled=is_sampled).splitlines())
    for line in masked(shown, is_sampled=is_sampled).splitlines():
        assert line == "..." or line in lines, f"{line!r} is not in, or not in this order:\n{real}"


def sh(command: str, pipeline: Pipeline, *, timeout_s: float = 300, **environ: str) -> str:
    """Run as a reader would, in an activated environment, with the pipeline's ports for the usual ones."""
    command = command.replace("localhost:8080", f"localhost:{pipeline.http_port}")
    command = command.replace("127.0.0.1:8222", environ.get("MONITORING", "127.0.0.1:8222"))
    done = subprocess.run(
        ["bash", "-c", f"set -e\n{command}"], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s,
        env={**os.environ, **pipeline.env, **in_environment(pipeline.infra), **environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def in_environment(infra: Infra) -> dict[str, str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "ETCDCTL_ENDPOINTS": f"127.0.0.1:{infra.etcd_port}", "NO_PROXY": "localhost,127.0.0.1"}


class Launch:
    """`make run`, or one of its kind, as a reader has it in a terminal, with ports and a folder of its own."""

    def __init__(self, folder: Path, *command: str, **environ: str) -> None:
        self.folder, self.output = folder, folder / "terminal"
        ports = {f"{name}_PORT": str(free_port()) for name in ("NATS", "NATS_MONITORING", "ETCD", "HTTP")}
        place = {"DATA_DIR": str(folder), "NATS_SERVER": "", "ETCD_ENDPOINTS": ""}
        path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        # Not what `make test` tells the programs that it runs: a make among them would print more.
        ours = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        self.environ = ours | ports | place | path | environ
        with self.output.open("w") as file:
            self.popen = subprocess.Popen(
                command, cwd=ROOT, env=self.environ, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_for(self, text: str, timeout_s: float = 480) -> None:
        def is_said() -> bool:
            assert self.popen.poll() is None, self.output.read_text()
            return text in self.output.read_text()

        wait_until(is_said, timeout_s, text)

    def other_terminal(self, command: str) -> str:
        """Run what a reader types elsewhere, on this launch's ports and folder."""
        command = command.replace(".data/", f"{self.folder}/").replace("8080", self.environ["HTTP_PORT"])
        done = subprocess.run(
            ["bash", "-c", f"set -e\n{command}"], cwd=ROOT, capture_output=True, text=True, timeout=300,
            env=self.environ | {"ETCDCTL_ENDPOINTS": f"127.0.0.1:{self.environ['ETCD_PORT']}"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def stop(self) -> None:
        """Ctrl-C."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGINT)
            self.popen.wait(150)
