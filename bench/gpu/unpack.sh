# On the GPU machine: source this. Unpacks the parts in $PARTS to $SITE, once, and sets the environment.
PARTS=${PARTS:-/tmp/kit} SITE=${SITE:-/tmp/site}
if [ ! -e "$SITE/.complete" ]; then
  rm -rf "$SITE"
  mkdir -p "$SITE"
  cat "$PARTS"/part.* | xz --decompress --threads=0 | tar -C "$SITE" -x
  # A PyTorch looks for CUDA's libraries beside itself; those of the machine's own PyTorch fit.
  python3 - "$SITE/nvidia" <<'PYTHON'
import sys
from pathlib import Path

ours = Path(sys.argv[1])
ours.mkdir(exist_ok=True)
for theirs in (Path(entry) / "nvidia" for entry in sys.path):
    for library in theirs.iterdir() if theirs.is_dir() else ():
        if not (ours / library.name).exists():
            (ours / library.name).symlink_to(library)
PYTHON
  touch "$SITE/.complete"
fi
export PYTHONPATH=$SITE:$PWD PATH=$SITE/bin:$PATH HF_HUB_OFFLINE=1 DYN_LOG=error
