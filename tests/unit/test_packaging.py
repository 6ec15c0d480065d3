"""The tree as a package: its folder `kernels/` must never stand in for Hugging Face's package of that name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import yaml

import atlas_rl
from atlas_rl.cli.launching import find_accelerate_config
from atlas_rl.config import find_config

ROOT = Path(__file__).parents[2]


def run_at_root(code: str, **env: str) -> str:
    """With `python -c`, the current folder is the first place that imports look at."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_imports_at_the_root_where_kernels_is_installed(tmp_path):
    """Both import orders that matter: our folder comes first on sys.path, the installed package must win."""
    installed = tmp_path / "kernels"
    installed.mkdir()
    (installed / "__init__.py").write_text("__version__ = '0.0.1'\nNAME = 'the installed one'\n")
    code = "import kernels; from transformers import LlamaForCausalLM; import atlas_kernels; print(kernels.NAME)"
    assert run_at_root(code, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT / 'kernels'}") == "the installed one"


def test_transformers_imports_at_the_root_where_kernels_is_not_installed():
    code = "from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)"
    assert run_at_root(code) == "LlamaForCausalLM"


def test_atlas_kernels_does_not_know_atlas_rl():
    code = "import sys, atlas_kernels; print('atlas_rl' in sys.modules)"
    assert run_at_root(code, PYTHONPATH=str(ROOT / "kernels")) == "False"


def test_import_is_light():
    assert run_at_root("import sys, atlas_rl; print('torch' in sys.modules)") == "False"


def test_the_version_is_semantic_and_the_same_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+", atlas_rl.__version__)
    newest = re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == atlas_rl.__version__
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == atlas_rl.__version__


def test_package_data_covers_every_file():
    """What is no module and matches no pattern would be missing from the wheel; results of benches stay out of it."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package in (ROOT / "atlas_rl", ROOT / "kernels" / "atlas_kernels"):
        files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        packaged = {path for pattern in patterns.get(package.name, []) for path in package.glob(pattern)}
        packaged |= {path for pattern in patterns["*"] for path in package.rglob(pattern)}
        missing = {path for path in files - packaged if path.parent.name != "results"}
        assert not missing, f"add these to package-data in pyproject.toml: {sorted(map(str, missing))}"


def test_public_names_are_there():
    for name in atlas_rl.__all__:
        assert getattr(atlas_rl, name).__name__ == name
    assert not hasattr(atlas_rl, "AtlasConfg")


def test_shipped_configs_go_by_name_where_no_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert find_config("quickstart").read_text() == (ROOT / "configs" / "quickstart.yaml").read_text()
    (tmp_path / "bench").write_text("a: 1\n")
    assert find_config("bench") == Path("bench")
    path, is_preset = find_accelerate_config("zero3_offload")
    assert Path(path).samefile(ROOT / "configs" / "accelerate" / "zero3_offload.yaml") and not is_preset
    with pytest.raises(ValueError, match="quickstrt does not exist.*quickstart"):
        find_config("quickstrt")
    with pytest.raises(ValueError, match="did you mean 'zero3_offload'"):
        find_accelerate_config("zero3_ofload")
