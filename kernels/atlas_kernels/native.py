"""C++ compiled on first use for the processor at hand (about two seconds, then kept), and called through ctypes.

It runs on torch's own OpenMP threads: `torch.set_num_threads` holds for it too, and no second set spins beside torch's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

from torch.utils import cpp_extension

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")


class Library:
    """The functions of one C++ source, none of which returns anything unless `restypes` says so.

    Args:
        source: may include the headers beside this module. signatures: argument types of each function.
    """

    def __init__(self, source: Path, signatures: dict[str, list], restypes: dict[str, type] | None = None) -> None:
        self.source, self.signatures, self.restypes = source, signatures, restypes or {}

    @functools.cached_property
    def functions(self) -> ctypes.CDLL:
        path = self._path()
        if not path.exists():
            self._compile(path)
        # torch's own OpenMP runtime, made visible to us: a second one would bring threads that compete with torch's
        ctypes.CDLL(_openmp_runtime(), mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(path))
        for name, argtypes in self.signatures.items():
            function = getattr(library, name)
            function.argtypes, function.restype = argtypes, self.restypes.get(name)
        return library

    @functools.cached_property
    def unavailable_reason(self) -> str | None:
        """Why it cannot be used on this machine; None where it can."""
        try:
            _ = self.functions
        except (OSError, subprocess.SubprocessError, RuntimeError) as error:
            return str(error) or type(error).__name__
        return None

    def _path(self) -> Path:
        """Where torch keeps the extensions that it compiles; named after the code, the flags and the processor, since a home
        directory may be shared by different machines."""
        code = b"".join(path.read_bytes() for path in [self.source, *sorted(FOLDER.glob("*.h"))])
        made_of = hashlib.sha256(code + " ".join(FLAGS).encode() + _processor().encode()).hexdigest()[:16]
        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
        return root / "atlas_rl" / f"{self.source.stem}_{made_of}.so"

    def _compile(self, path: Path) -> None:
        """Written beside and renamed into place: other processes may be doing the same."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            # not linked with an OpenMP runtime: the symbols are those of the one that torch has loaded
            steps = (
                [*FLAGS, f"-I{FOLDER}", "-c", str(self.source), "-o", f"{made}.o"],
                ["-shared", f"{made}.o", "-o", str(made)],
            )
            compiler = cpp_extension.get_cxx_compiler()
            for arguments in steps:
                done = subprocess.run([compiler, *arguments], capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{compiler} failed: {done.stderr.strip()[-300:]}")
            os.replace(made, path)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return platform.machine() + line
    return platform.machine()


def _openmp_runtime() -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.rsplit("/", 1)[-1].startswith(("libgomp", "libiomp5", "libomp")):
            return line[line.index("/") :]
    raise RuntimeError("torch has loaded no OpenMP runtime")
