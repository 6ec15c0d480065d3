"""Run the drop-in's tests on the oldest and newest releases that pyproject.toml admits: `make test-versions`.

Four cells, each with a virtual environment of its own: the oldest and newest TRL with the oldest and newest transformers. In the
`oldest` cell everything else is at its floor too; in the others pip chooses. torch is the one of constraints.txt in all of them:
older and newer ones exist on PyPI only with several GB of CUDA. A cell whose requirements contradict each other is shown with
pip's reason. The exit code is 1 where a test fails, or where the floors cannot be installed together.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from xml.etree import ElementTree

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
TESTS = [
    *(f"tests/integration/test_{n}.py" for n in "grpo generate_hook logprobs trainers tools resume train_cli".split()),
    *(f"tests/engine/test_{name}.py" for name in ("engine", "policy_view", "local_policy", "architectures")),
]
CELLS = {"oldest": (0, 0), "newest transformers": (0, -1), "newest trl": (-1, 0), "newest": (-1, -1)}
"""Which of the admitted releases of TRL and of transformers: the first, or the last."""
UNSTATED = ["requests"]
"""What TRL before 1.14 imports without requiring it. Older releases of transformers and datasets brought it along."""
SHOWN = ("trl", "transformers", "accelerate", "datasets", "peft", "deepspeed", "numpy", "torch")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


class NotInstallable(Exception):
    """pip's reason."""


def requirements(*extras: str) -> list[Requirement]:
    """Of the project and some extras, torch apart."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    found = [Requirement(line) for line in lines]
    return [r for r in found if r.name != "torch" and (r.marker is None or r.marker.evaluate())]


def admitted_releases(requirement: Requirement) -> list[str]:
    """Those on PyPI for this Python, oldest first."""
    command = [*PIP, "index", "versions", requirement.name]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    versions = said.partition("Available versions: ")[2].splitlines()[0].split(", ")
    return list(requirement.specifier.filter(reversed(versions)))


def pins_of_cells() -> dict[str, list[str]]:
    """By cell, the requirements that make it what it is; pip finds the rest."""
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    product = [requirement for requirement in requirements("peft", "deepspeed", "plots") if requirement.specifier]
    releases = {requirement.name: admitted_releases(requirement) for requirement in product}
    floors = [f"{name}=={versions[0]}" for name, versions in releases.items()]
    others = [str(requirement) for requirement in requirements("peft", "deepspeed", "plots", "test")]
    cells = {}
    for cell, (trl, transformers) in CELLS.items():
        pair = [f"trl=={releases['trl'][trl]}", f"transformers=={releases['transformers'][transformers]}"]
        cells[cell] = [*pair, torch, *(floors if cell == "oldest" else []), *(UNSTATED if trl == 0 else []), *others]
    return cells


def resolve(pins: list[str]) -> dict[str, str]:
    """Versions by name of everything that pip would install.

    Raises:
        NotInstallable: the requirements contradict each other.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [*PIP, "install", "--dry-run", "--ignore-installed", "--report", str(report), *pins]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            _, found, cause = done.stdout.partition("The conflict is caused by:\n")
            if not found:  # no network, no disk, …
                raise SystemExit(done.stdout)
            lines = cause.partition("\n\n")[0].splitlines()
            raise NotInstallable("; ".join(line.strip() for line in lines))
        packages = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    return {package["name"].lower(): package["version"] for package in packages}


def make_environment(folder: Path, versions: dict[str, str]) -> Path:
    """Its Python. Made anew only where other versions are in it."""
    python, stamp = folder / "bin" / "python", folder / "versions.txt"
    wanted = "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))
    if not stamp.is_file() or stamp.read_text() != wanted:
        venv.create(folder, clear=True)
        pip = [*PIP, "--python", str(python), "install", "-qq", "--no-deps", *wanted.split()]
        subprocess.run(pip, check=True)
        stamp.write_text(wanted)
    return python


def run_tests(python: Path, tests: list[str], report: Path) -> dict[str, int]:
    """How many passed, were skipped, failed. pytest's own output is the progress."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    report.unlink(missing_ok=True)
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths})
    if not report.is_file():
        return {"passed": 0, "skipped": 0, "failed": 1}
    suite = ElementTree.parse(report).getroot().find("testsuite").attrib
    total, skipped, *bad = (int(suite[name]) for name in ("tests", "skipped", "failures", "errors"))
    return {"passed": total - skipped - sum(bad), "skipped": skipped, "failed": sum(bad)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=TESTS, help="test files (default: those of the drop-in)")
    parser.add_argument("--cell", action="append", choices=CELLS, help="one cell, may be repeated (default: all)")
    parser.add_argument(
        "--dir", type=Path, default=ROOT / ".venvs", help="where the environments are kept, 1.5 GB each"
    )
    arguments = parser.parse_args()
    print("Asking PyPI for releases", flush=True)
    pins, lines, ok = pins_of_cells(), [], True
    for cell in arguments.cell or CELLS:
        start, folder = time.monotonic(), arguments.dir.absolute() / cell.replace(" ", "-")
        print(f"\n== {cell}: resolving", flush=True)
        try:
            versions = resolve(pins[cell])
        except NotInstallable as reason:
            lines.append(f"{cell}: {' '.join(pins[cell][:2])} not installable: {reason}")
            ok &= cell != "oldest"
            continue
        shown = " ".join(f"{name} {versions[name]}" for name in SHOWN)
        print(f"== {cell}: {shown}\n== {cell}: environment in {folder}", flush=True)
        python = make_environment(folder, versions)
        counts = run_tests(python, arguments.tests, folder / "report.xml")
        ok &= not counts["failed"] and counts["passed"] > 0
        told = ", ".join(f"{count} {what}" for what, count in counts.items())
        lines.append(f"{cell}: {shown}: {told}, {time.monotonic() - start:.0f} s")
    print("\n" + "\n".join(lines))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
