#!/usr/bin/env bash
# Fills .kit-extra/ (ignored by git) with what a machine without a network needs beyond the kit to run this pipeline:
# httptools and prometheus-client for Python 3.12, and this project's entry points, through which SGLang finds its plugins.
set -euo pipefail
cd "$(dirname "$0")/../.."
exclude=$(git rev-parse --git-path info/exclude)
grep -qx '/.kit-extra/' "$exclude" 2>/dev/null || echo '/.kit-extra/' >> "$exclude"
rm -rf .kit-extra && mkdir -p .kit-extra
wheels=$(mktemp -d)
for wheel in httptools==0.9.0 prometheus-client==0.26.0; do
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --abi cp312 --abi abi3 --abi none --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform manylinux_2_12_x86_64 --platform manylinux2010_x86_64 \
    -d "$wheels" "$wheel"
done
for wheel in "$wheels"/*.whl; do unzip -qo "$wheel" -d .kit-extra; done
rm -rf "$wheels"
python3 - <<'PYTHON'
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
info = Path(".kit-extra") / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
info.mkdir()
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
groups = [
    f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
    for group, entries in project["entry-points"].items()
]
(info / "entry_points.txt").write_text("\n".join(groups))
PYTHON
du -sh .kit-extra
