"""The command line: help that teaches, light imports, and bad input that is named before anything is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from atlas_rl.cli import main
from atlas_rl.cli.train import atlas_config, given_values, split_atlas

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: {tmp_path / 'out'}\nuse_cpu: true\nmax_steps: 1\natlas:\n  speculate: true\n")
    return path


def fails(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """Run, expect exit code 2, and give back the one line that says why."""
    assert main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("atlas-rl: ")
    return line


# ---- help and imports


def test_overview_names_every_command(capsys):
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in ("train", "bench", "doctor", "--config quickstart"))


@pytest.mark.parametrize("command", ["train", "report", "drafter", "doctor"])
def test_help_teaches_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text and f"atlas-rl {command}" in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("atlas-rl 0.")


def test_help_and_early_errors_import_nothing_heavy(config):
    """One process runs everything that should be instant, and then looks at what it has imported."""
    early_errors = [
        ["train", "--config", "missing.yaml"],
        ["train", "--config", str(config), "--atlas.lookahed", "3"],
        ["train", "--config", str(config), "--model_name_or_path", "./missing"],
        ["train", "--config", str(config), "--dataset_name", "missing.jsonl"],
        ["train", "ppo", "--config", str(config)],
        ["drafter", "train", "--out", "drafter", "--kind", "eagel"],
        ["drafter", "eval", "missing"],
    ]
    script = (
        "import sys\n"
        "from atlas_rl.cli import main\n"
        "for command in ('train', 'drafter', 'doctor'):\n"
        "    try: main([command, '--help'])\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'yaml', 'rich', 'numpy'} & set(sys.modules)\n"
        f"for argv in {early_errors!r}: assert main(argv) == 2, argv\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- bad input, known without torch


def test_unknown_command_suggests_the_closest(capsys):
    assert "did you mean 'train'" in fails(capsys, "trian")


def test_train_without_anything(capsys):
    assert "--config" in fails(capsys, "train")


def test_unknown_trainer(capsys, config):
    assert "'ppo'" in fails(capsys, "train", "ppo", "--config", config)


def test_config_that_cannot_be_read(capsys, tmp_path):
    line = fails(capsys, "train", "--config", tmp_path / "nowhere.yaml")
    assert "nowhere.yaml does not exist" in line and "quickstart" in line
    broken = tmp_path / "broken.yaml"
    broken.write_text("max_steps: [1\n")
    assert "broken.yaml is not valid YAML" in fails(capsys, "train", "--config", broken)
    listed = tmp_path / "list.yaml"
    listed.write_text("- max_steps\n")
    assert "field: value" in fails(capsys, "train", "--config", listed)


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--atlas.lookahed", "3", "lookahed"),
        ("--atlas.engine.blok_size", "3", "engine.blok_size"),
        ("--atlas.engine.block_size", "0", "engine.block_size"),
        ("--atlas.engine.block_size", "many", "block_size"),
        ("--atlas.drafters", "oracle", "oracle"),
        ("--atlas.speculate.now", "true", "speculate.now"),
    ],
)
def test_bad_atlas_field(capsys, config, flag, value, said):
    line = fails(capsys, "train", "--config", config, flag, value)
    assert line.startswith("atlas-rl: atlas: ") and said in line


def test_atlas_section_of_the_yaml_is_checked(capsys, config):
    config.write_text(config.read_text() + "  lookahead: -1\n")
    assert "lookahead" in fails(capsys, "train", "--config", config)
    config.write_text("atlas: fast\n")
    assert "must be a mapping" in fails(capsys, "train", "--config", config)


def test_missing_model(capsys, config, tmp_path, monkeypatch):
    for name in ("./missing", str(tmp_path / "missing"), "runs/a/checkpoint-3"):
        line = fails(capsys, "train", "--config", config, "--model_name_or_path", name)
        assert "model_name_or_path" in line and "save_pretrained" in line
    assert "config.json" in fails(capsys, "train", "--config", config, f"--model_name_or_path={tmp_path}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = fails(capsys, "train", "--config", config, "--model-name-or-path", "nobody/no-such-model")
    assert "model_name_or_path" in line and "HF_HUB_OFFLINE" in line


def test_missing_data_and_rewards(capsys, config, tmp_path):
    data = tmp_path / "data.jsonl"
    given = ("train", "--config", config, "--dataset_name", data)
    assert "dataset_name" in fails(capsys, *given)
    data.write_text('{"prompt": "1 + 1 ="}\n')
    assert "reward_funcs is missing" in fails(capsys, *given)
    assert "did you mean 'accuracy_reward'" in fails(capsys, *given, "--reward_funcs", "acuracy_reward")
    text = tmp_path / "data.txt"
    text.touch()
    assert ".jsonl" in fails(capsys, "train", "--config", config, "--dataset_name", text)


def test_output_dir_that_cannot_be_written(capsys, config):
    below_a_file = config / "out"
    assert "output_dir" in fails(capsys, "train", "--config", config, "--output_dir", below_a_file)


# ---- bad input that TRL's parser knows


def test_unknown_field_on_the_command_line_and_in_the_yaml(capsys, config):
    line = fails(capsys, "train", "--config", config, "--num_generatons", "4")
    assert "'num_generatons'" in line and "did you mean 'num_generations'" in line
    config.write_text(config.read_text() + "learning_rat: 1.0e-5\n")
    assert "did you mean 'learning_rate'" in fails(capsys, "train", "--config", config)


def test_value_of_the_wrong_type(capsys, config):
    assert "max_steps" in fails(capsys, "train", "--config", config, "--max_steps", "many")
    config.write_text(config.read_text().replace("max_steps: 1", "max_steps: [1]"))
    assert "max_steps" in fails(capsys, "train", "--config", config)


def test_stray_word(capsys, config):
    for words in (("--max_steps", "3", "7"), ("7", "--max_steps", "3"), ("--num_processes", "2", "7")):
        assert "'7'" in fails(capsys, "train", "--config", config, *words)


def test_trl_s_own_complaint_passes(capsys, config):
    line = fails(capsys, "train", "--config", config, "--num_generations", "3", "--per_device_train_batch_size", "8")
    assert "divisible by num_generations" in line


def test_accelerate_config_that_does_not_exist(capsys, config):
    assert "no_such_config" in fails(capsys, "train", "--config", config, "--accelerate_config", "no_such_config")


# ---- parts


def test_atlas_overrides_are_taken_out_of_the_command_line():
    argv = ["--max_steps", "3", "--atlas.speculate", "false", "--atlas.engine.block_size=32", "--seed", "1"]
    pairs, rest = split_atlas(argv)
    assert pairs == [("speculate", "false"), ("engine.block_size", "32")]
    assert rest == ["--max_steps", "3", "--seed", "1"]
    config = atlas_config({"speculate": True, "lookahead": 2}, pairs)
    assert (config.speculate, config.lookahead, config.engine.block_size) == (False, 2, 32)
    with pytest.raises(ValueError, match=r"--atlas\.lookahead needs a value"):
        split_atlas(["--atlas.lookahead", "--max_steps", "3"])


def test_values_are_found_in_every_spelling():
    argv = ["--model-name-or-path", "a", "--output_dir=b", "--reward_funcs", "x.y", "z.w", "--use_cpu"]
    assert given_values(argv) == {
        "model_name_or_path": "a",
        "output_dir": "b",
        "reward_funcs": ["x.y", "z.w"],
        "use_cpu": [],
    }


def test_launcher_flags_go_to_accelerate(config, monkeypatch):
    """`--num_processes` is no field of TRL: the run goes through the launcher, with everything else passed on."""
    from atlas_rl.cli import launching

    launched = []
    monkeypatch.setattr(launching, "launch", lambda flags, fields, script: launched.append((flags, script)) or 0)
    config.write_text(config.read_text() + "mixed_precision: 'no'\nmulti_gpu: false\n")
    argv = ["train", "--config", str(config), "--max_steps", "2", "--num_processes", "2", "--atlas.lookahead", "3"]
    assert main([*argv, "--logging_steps", "2"]) == 0
    ((flags, script),) = launched
    assert flags == ["--mixed_precision", "no", "--num_processes", "2"]
    passed_on = ["--max_steps", "2", "--logging_steps", "2", "--atlas.lookahead=3"]
    assert script == ["train", "grpo", "--launched", "--config", str(config), *passed_on]


def test_env_of_the_yaml_is_exported(config, capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "ATLAS_TEST_VARIABLE", "")
    config.write_text(config.read_text() + "env:\n  ATLAS_TEST_VARIABLE: 1\n")
    fails(capsys, "train", "--config", config, "--dataset_name", "missing.csv")
    assert os.environ["ATLAS_TEST_VARIABLE"] == "1"


def test_interrupt_is_one_line(capsys, config, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("atlas_rl.cli.checks.check_inputs", interrupted)
    assert main(["train", "--config", str(config)]) == 130
    assert capsys.readouterr().err.strip() == "atlas-rl: interrupted"


def test_doctor_names_what_it_looked_at(capsys):
    code = main(["doctor"])
    text = capsys.readouterr().out
    assert all(name in text for name in ("torch", "transformers", "trl", "engine"))
    assert code == 0, text
    assert "distributed" in text and "gloo" in text


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "all"])
def test_a_static_drafter_that_is_not_there_is_named_before_anything_is_loaded(config, tmp_path, capsys, missing):
    folder = tmp_path / "head"
    if missing != "all":
        folder.mkdir()
        (folder / ({"config.json", "model.safetensors"} - {missing}).pop()).write_text("{}")
    line = fails(capsys, "train", "--config", config, "--atlas.static_drafter", folder)
    assert "atlas.static_drafter" in line and str(folder) in line
    assert missing == "all" or f"holds no {missing}" in line


@pytest.mark.parametrize("given", ["--atlas.retrain=sometimes", "--atlas.adapt.max_share=2", "--atlas.adapt.depth=0"])
def test_bad_values_of_adaptation_are_named_before_anything_is_loaded(config, capsys, given):
    assert given.removeprefix("--atlas.").split("=")[0] in fails(capsys, "train", "--config", config, given)
