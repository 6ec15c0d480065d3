"""What the pages tell a reader to type is typed here: python blocks run, commands run small or are read by their own parsers."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("deepspeed.runtime.rollout")
pytest.importorskip("reasoning_gym")

import tomllib
import trl
from snippets import (
    DRAFTER_FLAGS,
    EXAMPLES,
    ONLY_PARSED,
    PAGES,
    ROOT,
    SIZES,
    TRAIN_FLAGS,
    Block,
    blocks_of,
    make_reader_folder,
    names_of_a_page,
)
from trl.experimental.online_dpo import OnlineDPOConfig

from atlas_rl import AtlasConfig, AtlasRolloutGenerator
from atlas_rl.cli import COMMANDS, launching, main
from atlas_rl.cli.trl_arguments import Given
from atlas_rl.config import read_yaml
from atlas_rl.integrations.trl import LogHook

LAUNCHER_FLAGS = {"--accelerate_config", "--num_processes"}
SLURM = {"$SLURM_NNODES": "2", "$SLURM_NODEID": "1"}


class Parsed(Exception):
    """A command's words, and the files that they name, are what it takes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_reader_folder(tmp_path_factory.mktemp("reader"))


@pytest.fixture
def reader(folder: Path, monkeypatch) -> Path:
    """Within the reader's folder, with small trainers, and nothing attached afterwards."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    for cls in (trl.GRPOConfig, trl.RLOOConfig, OnlineDPOConfig):
        make_small(cls, monkeypatch)
    generators: list[AtlasRolloutGenerator] = []
    init = AtlasRolloutGenerator.__init__
    monkeypatch.setattr(
        AtlasRolloutGenerator, "__init__", lambda self, *args: generators.append(self) or init(self, *args)
    )
    monkeypatch.setattr(launching, "launch", checked_launch)
    yield folder
    for generator in generators:
        generator.detach()
    assert not LogHook.num_users


def make_small(cls: type, monkeypatch) -> None:
    init = cls.__init__
    sizes = {name: value for name, value in SIZES.items() if name in {field.name for field in fields(cls)}}
    monkeypatch.setattr(cls, "__init__", lambda self, *args, **given: init(self, *args, **given | sizes))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page: Path, reader: Path, monkeypatch):
    blocks = blocks_of(page)
    needs_names = any(block.language == "python" for block in blocks)
    if needs_names:
        run_command(["atlas-rl", "train", "--config", "my.yaml"], monkeypatch)  # a run to read the log of
    names = names_of_a_page() if needs_names else {}
    for block in blocks:
        try:
            run_block(block, names, monkeypatch)
        except Exception as error:
            raise AssertionError(f"{block}: {type(error).__name__}: {error}") from error


def run_block(block: Block, names: dict, monkeypatch) -> None:
    if block.language == "python":
        padded = "\n" * block.line + block.text  # so that a traceback names the page's own lines
        exec(compile(padded, str(block.page), "exec"), names)
    elif block.language == "yaml":
        check_yaml(yaml.safe_load(block.text))
    elif block.language == "bash":
        for command in block.commands():
            run_command(command, monkeypatch)


def check_yaml(values: dict) -> None:
    AtlasConfig.from_dict(values.pop("atlas", None))
    Given.of("grpo", values, [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_sentences_exist(page: Path):
    sentences = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for text in re.findall(r"`([^`]+)`", sentences):
        match text.split():
            case ["atlas-rl", name, *_]:
                assert name in {*COMMANDS, "COMMAND", "--help"}, text
            case ["make", target, *_]:
                assert f"\n{target}:" in (ROOT / "Makefile").read_text(), text
            case ["python", "-m", module, *_] if module != "…":
                assert importlib.util.find_spec(module), text
            case ["python", path, *_] if path != "-m":
                assert (ROOT / path).is_file(), text


# ---- commands


def run_command(command: list[str], monkeypatch) -> None:
    """Raises for one that no rule knows."""
    for rules in (READ, RUN):
        for beginning, rule in rules.items():
            if command[: len(beginning.split())] == beginning.split():
                return rule(command, monkeypatch)
    raise ValueError(
        f"no rule for `{' '.join(command)}`: see READ and RUN in test_snippets.py, ONLY_PARSED in snippets.py"
    )


def change_folder(command: list[str], monkeypatch) -> None:
    """A folder that is there; what follows runs where the reader's files are."""
    assert Path(command[1]).is_dir()


def run_train(command: list[str], monkeypatch) -> None:
    if LAUNCHER_FLAGS.intersection(command):
        accelerators = 0 if "cpu" in " ".join(command) else 8
        monkeypatch.setattr(launching, "num_accelerators", lambda: accelerators)
        run_main(command, monkeypatch)
    else:
        run_main([*command, *TRAIN_FLAGS], monkeypatch)


def run_drafter(command: list[str], monkeypatch) -> None:
    words = [*command, *DRAFTER_FLAGS]
    if "--minutes" in words:
        place = words.index("--minutes")
        words[place : place + 2] = []
    run_main([*words, "--steps", "2"] if "train" in words else words, monkeypatch)


def run_main(command: list[str], monkeypatch) -> None:
    assert main(command[1:]) == 0, "what it says is in the captured stderr"


def checked_launch(flags: list[str], fields: dict, script: list[str]) -> int:
    """`launching.launch` up to the launch."""
    plan = launching.Launch.of(flags)
    launching.check(plan, fields)
    launching._parse(launching.accelerate_flags(plan, fields), script)
    return 0


def run_example(command: list[str], monkeypatch) -> None:
    words = command[1:]
    assert words[0].startswith("examples/")
    how = EXAMPLES[Path(words[0]).name]
    if isinstance(how, str):
        read_script(words, monkeypatch)
    else:
        run_script([*words, *how], monkeypatch)


def run_script(words: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")


def read_script(words: list[str], monkeypatch) -> None:
    """A script's arguments, where it takes any."""
    if "argparse" in Path(words[0]).read_text():
        parsed_by(lambda: runpy.run_path(words[0], run_name="__main__"), words, monkeypatch)
    assert Path(words[0]).name in EXAMPLES


def read_module(command: list[str], monkeypatch) -> None:
    parsed_by(lambda: runpy.run_module(command[2], run_name="__main__"), command[2:], monkeypatch)


def parsed_by(start: Callable[[], object], argv: list[str], monkeypatch) -> None:
    """Start a program and stop it when it has read its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", argv)
        with pytest.raises(Parsed):
            start()


def read_make(command: list[str], monkeypatch) -> None:
    subprocess.run([command[0], "--dry-run", *command[1:]], cwd=ROOT, check=True, capture_output=True)


def read_pip(command: list[str], monkeypatch) -> None:
    editable, target, *constraints = command[2:]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert editable == "-e" and target.startswith("."), command
    assert set(filter(None, target[1:].strip("[]").split(","))) <= set(extras), command
    assert not constraints or (constraints[0] == "-c" and Path(constraints[1]).is_file()), command


def read_doctor(command: list[str], monkeypatch) -> None:
    parsed_by(lambda: main(command[1:]), command, monkeypatch)


def read_bench(command: list[str], monkeypatch) -> None:
    """Its config, arms and workloads."""

    def read(*_: object) -> None:
        raise Parsed

    monkeypatch.setattr("atlas_rl.bench.runner.run_bench", read)
    with pytest.raises(Parsed):
        main(command[1:])


def read_torchrun(command: list[str], monkeypatch) -> None:
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(command[1:])
    words = [options.training_script, *options.training_script_args]
    if options.module:
        read_train(words)
    else:
        read_script(words, monkeypatch)


def read_train(words: list[str]) -> None:
    """Of a process that a launcher has started."""
    program, name, flag, config, *fields = words
    assert (program, name, flag) == ("atlas_rl", "train", "--config")
    given = Given.of("grpo", read_yaml(config), fields)
    assert not given.launch_flags and Path(given.fields["deepspeed"]).is_file()


def read_accelerate(command: list[str], monkeypatch) -> None:
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_args(command[2:])
    assert launching.read_config(options)
    read_script([options.training_script, *options.training_script_args], monkeypatch)


def read_deepspeed(command: list[str], monkeypatch) -> None:
    from deepspeed.launcher.runner import parse_args

    options = parse_args(command[1:])
    read_script([options.user_script, *options.user_args], monkeypatch)


def read_srun(command: list[str], monkeypatch) -> None:
    """What it starts on every machine."""
    bash, flag, text = command[1:]
    assert (bash, flag) == ("bash", "-c")
    for name, value in SLURM.items():
        text = text.replace(name, value)
    run_command(text.split(), monkeypatch)


READ = {
    "make": read_make,
    "pip install": read_pip,
    "atlas-rl bench": read_bench,
    "atlas-rl doctor": read_doctor,
    "python -m": read_module,
    "torchrun": read_torchrun,
    "accelerate launch": read_accelerate,
    "deepspeed": read_deepspeed,
    "srun": read_srun,
}
RUN = {
    "cd": change_folder,
    "atlas-rl train": run_train,
    "atlas-rl drafter": run_drafter,
    "atlas-rl report": run_main,
    "python": run_example,
}


def test_what_is_only_parsed_has_a_reason():
    assert set(READ) == set(ONLY_PARSED)


# ---- examples


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_every_example_runs_and_explains_itself(script: Path, reader: Path, monkeypatch, capsys):
    how = EXAMPLES[script.name]
    source = script.read_text()
    assert source.startswith('"""') and ("examples/" in source.split('"""')[1] or script.name == "my_rewards.py")
    if "argparse" in source:
        monkeypatch.setattr(sys, "argv", [str(script), "--help"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(script), run_name="__main__")
        assert stop.value.code == 0
    if isinstance(how, str):
        return
    shutil.rmtree("runs", ignore_errors=True)
    run_script([str(script), *how], monkeypatch)
    rows = [row for path in Path("runs").glob("*/rollouts.jsonl") for row in read_rows(path)]
    assert not any("fallback" in row or "error" in row for row in rows)
    if script.name != "generate.py":
        assert any(row["completion_tokens"] for row in rows if row["kind"] == "rollout")
    else:
        assert "the same tokens with and without drafts: True" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 is 7.\n#### 72", "72"),
        ("#### $1,012.50 \nas said: 3", "1012.50"),
        (r"so \boxed{-18} it is, not 4", "-18"),
        ("first 5, then 6.", "6"),
        ("no number", None),
    ],
)
def test_the_answer_of_a_gsm8k_completion(text, number):
    functions = runpy.run_path(str(ROOT / "examples" / "gsm8k_grpo.py"))
    assert functions["answer_in"](text) == number
    assert functions["right_answer"]([text, [{"content": text}]], target=["72.0"] * 2) == [float(number == "72")] * 2


# ---- the log that the pages describe


def test_every_field_of_the_log_is_described(reader: Path, monkeypatch):
    shutil.rmtree("runs", ignore_errors=True)
    run_command(["atlas-rl", "train", "--config", "my.yaml"], monkeypatch)
    page = (ROOT / "docs" / "reading-the-log.md").read_text()
    rows = read_rows(Path("runs/mine/rollouts.jsonl"))
    described = {name for row in rows if row["kind"] != "log" for name in row}
    assert not [name for name in described if f"`{name}`" not in page]


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
