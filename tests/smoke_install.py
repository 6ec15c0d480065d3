"""Build Atlas-RL as it would be released, install it into empty environments, and use it there: `make test-release`.

The wheel is built from the sdist. Both must hold every file of the repository that belongs to them, and no other. One environment
gets the wheel with its core dependencies alone, later with the extra `tasks`, and is used both ways. Commands run in an empty
folder, so that nothing of the repository is within reach. Other Pythons (`--also python3.12`) get the wheel without torch, for
what works without it. The exit code is 1 where something fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIP = ("-m", "pip", "--disable-pip-version-check", "install", "-qq")
NOT_RELEASED = (".ci/", ".gitignore", "MANIFEST.in")
ONE_LINE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from atlas_rl import AtlasRolloutGenerator
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
prompt = torch.arange(5, 25)[None]
options = dict(do_sample=False, max_new_tokens=16, min_new_tokens=16)
expected = model.generate(prompt, **options)
with AtlasRolloutGenerator().attach(model) as atlas:
    assert torch.equal(model.generate(prompt, **options), expected)
    assert atlas.stats.completion_tokens == 16
"""
WITHOUT_TORCH = """
import atlas_rl, atlas_rl.config
assert atlas_rl.AtlasConfig.from_dict({"lookahead": 3}).lookahead == 3
assert "max_steps" in atlas_rl.config.read_yaml(atlas_rl.config.find_config("quickstart"))
"""


class Environment:
    """An empty virtual environment, and an empty folder to use it in."""

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        self.python, self.work = folder / "bin" / "python", folder / "work"
        subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
        self.work.mkdir()
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        self.env = {name: value for name, value in os.environ.items() if name not in hidden}
        self.env |= {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        self.env |= {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}

    def install(self, *words: object) -> None:
        subprocess.run([self.python, *PIP, *map(str, words)], cwd=self.work, env=self.env, check=True)

    def run(self, *words: str, code: int = 0, says: Sequence[str] = (), **env: str) -> None:
        """Runs a command, and expects its exit code and words of its output."""
        print("$", *(word.strip().partition("\n")[0] for word in words), *env, flush=True)
        command = [str(self.python), *words[1:]] if words[0] == "python" else words
        done = subprocess.run(
            command, cwd=self.work, env=self.env | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        missing = [word for word in says if word not in done.stdout]
        if done.returncode != code or missing:
            print(done.stdout)
            raise SystemExit(f"exit code {done.returncode} where {code} was expected; not said: {missing}")


def build(out: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], check=True, stdout=subprocess.DEVNULL
    )
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    tracked = {name for name in listed if not name.startswith(NOT_RELEASED) and name != "atlas_rl/configs"}
    linked = {f"atlas_rl/{name}" for name in tracked if name.startswith("configs/")}
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive if not member.isdir()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in held if ".egg-info/" in name)}
    compare("sdist", held - made - {"MANIFEST.in"}, tracked | linked)
    code = {name.removeprefix("kernels/") for name in tracked if name.startswith(("atlas_rl/", "kernels/"))}
    results = {name for name in code if name.startswith("atlas_rl/bench/results/")}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    compare("wheel", held, code - results | linked)


def compare(what: str, held: set[str], wanted: set[str]) -> None:
    if held != wanted:
        raise SystemExit(f"the {what} lacks {sorted(wanted - held)}, and should not hold {sorted(held - wanted)}")
    print(f"the {what} holds its {len(held)} files, and no other", flush=True)


def use_core(environment: Environment) -> None:
    """Without an extra: everything but the embedded tasks, which say what they need."""
    run = environment.run
    run("python", "-m", "pip", "check")
    run("atlas-rl", "--version", says=["atlas-rl 0."])
    run("atlas-rl", "--help", says=["--config quickstart"])
    for command in ("train", "bench", "drafter", "doctor"):
        run("atlas-rl", command, "--help", says=["example", "atlas-rl"] if command != "bench" else ["atlas-rl bench"])
    run("python", "-c", ONE_LINE)
    run("atlas-rl", "train", "--config", "quickstart", code=2, says=["pip install 'atlas-rl[tasks]'"])
    run("atlas-rl", "train", "--config", "quickstrt", code=2, says=["quickstrt does not exist", "quickstart"])
    run("atlas-rl", "drafter", "eval", shipped_drafter(environment), code=2, says=["pip install 'atlas-rl[tasks]'"])
    run("python", "-c", "import atlas_rl.deepspeed", code=1, says=["pip install 'atlas-rl[deepspeed]'"])


def use_tasks(environment: Environment) -> None:
    run = environment.run
    run("atlas-rl", "doctor", says=["Everything that Atlas-RL needs works here"])
    run("atlas-rl", "train", "--config", "quickstart", "--max_steps", "3", says=["tokens"])
    rows = (environment.work / "runs" / "quickstart" / "rollouts.jsonl").read_text().splitlines()
    assert sum('"kind": "step"' in row for row in rows) == 3, rows
    few = ("--num-prompts", "8", "--max-new-tokens", "64")
    run("atlas-rl", "drafter", "eval", shipped_drafter(environment), *few, says=["tokens"])
    no_compiler = {"CXX": "/nowhere/c++", "TORCH_EXTENSIONS_DIR": str(environment.work / "none")}
    run("python", "-c", ONE_LINE, **no_compiler)
    run("atlas-rl", "train", "--config", "quickstart", "--max_steps", "1", says=["tokens"], **no_compiler)


def use_another_python(environment: Environment, wheel: Path) -> None:
    """What needs no torch: every module compiles, commands explain themselves, configs are read."""
    environment.install("pyyaml", "dacite")
    environment.install(wheel, "--no-deps")
    run = environment.run
    (site,) = environment.python.parents[1].glob("lib/python*/site-packages")
    run("python", "-W", "error", "-m", "compileall", "-q", "-f", str(site / "atlas_rl"), str(site / "atlas_kernels"))
    run("python", "-c", WITHOUT_TORCH)
    run("atlas-rl", "--help", says=["--config quickstart"])
    run("atlas-rl", "train", "--help", says=["--accelerate_config"])
    run("atlas-rl", "train", "--config", "quickstrt", code=2, says=["quickstart"])


def shipped_drafter(environment: Environment) -> str:
    (site,) = environment.python.parents[1].glob("lib/python*/site-packages")
    return str(site / "atlas_rl" / "tasks" / "policy" / "drafter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--also", action="append", default=[], metavar="PYTHON", help="another Python, may be repeated")
    parser.add_argument("--dir", type=Path, help="keep wheel, sdist and environments here (2 GB; default: nowhere)")
    arguments = parser.parse_args()
    folder = arguments.dir.absolute() if arguments.dir else Path(tempfile.mkdtemp(prefix="atlas-rl-release-"))
    try:
        shutil.rmtree(folder / "dist", ignore_errors=True)
        sdist, wheel = build(folder / "dist")
        check_contents(sdist, wheel)
        for python in arguments.also:
            use_another_python(Environment(folder / Path(python).name, python), wheel)
        environment = Environment(folder / "env")
        constraints = ("-c", ROOT / "constraints.txt")
        environment.install(*constraints, wheel)
        use_core(environment)
        environment.install(*constraints, f"{wheel}[tasks]")
        use_tasks(environment)
    finally:
        if not arguments.dir:
            shutil.rmtree(folder)
    print(f"{wheel.name} and {sdist.name} install and work")


if __name__ == "__main__":
    main()
