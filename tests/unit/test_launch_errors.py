"""`atlas-rl train` on several processes: what is wrong is said before any of them starts."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from atlas_rl.cli import command, launching, main
from atlas_rl.cli import launched as module
from atlas_rl.cli.launching import Launch, accelerate_flags

FIELDS = {"per_device_train_batch_size": 8, "num_generations": 8}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: {tmp_path / 'out'}\nmax_steps: 1\n")
    return path


@pytest.fixture
def gpus(monkeypatch):
    def set_number(number: int) -> None:
        monkeypatch.setattr(launching, "num_accelerators", lambda: number)

    set_number(0)
    return set_number


@pytest.fixture
def started(monkeypatch):
    """Commands that accelerate was to run."""
    commands = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", commands.append)
    return commands


def fails(capsys, config, *argv: object) -> str:
    assert main(["train", "--config", str(config), *map(str, argv)]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err.strip().splitlines()[-1]


def test_accelerate_configs_that_cannot_be_used(capsys, config, tmp_path, gpus):
    def said(content: str | None, name: str = "mine.yaml") -> str:
        if content is not None:
            (tmp_path / name).write_text(content)
        return fails(capsys, config, "--accelerate_config", tmp_path / name, "--num_processes", 2)

    assert "accelerate_config" in said(None) and "does not exist" in said(None)
    assert "not valid YAML" in said("num_processes: [2\n")
    assert "field: value" in said("- 1\n")
    assert "num_procs" in said("distributed_type: MULTI_GPU\nnum_procs: 2\n")
    assert "distributed_type" in said("num_processes: 2\n")
    assert "ZERO" in said("distributed_type: ZERO\n")
    for line in (said("distributed_type: FSDP\n"), said("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}\n")):
        assert "fsdp_version: 2" in line
    assert "fsdp_version: 2" in fails(capsys, config, "--accelerate_config", "fsdp1", "--num_processes", 2)
    assert "did you mean 'zero2'" in fails(capsys, config, "--accelerate_config", "zer2")
    assert "did you mean 'zero2'" in fails(capsys, config, "--accelerate_config=zer2")
    assert "give a name or a file" in fails(capsys, config, "--accelerate_config")


def test_numbers_of_processes_and_machines(capsys, config, gpus):
    assert "--num_processes" in fails(capsys, config, "--accelerate_config", "zero2"), "there is nothing to count"
    gpus(2)
    line = fails(capsys, config, "--num_processes", 4)
    assert "num_processes: 4" in line and "2 accelerators" in line and "--num_processes 2" in line
    line = fails(
        capsys, config, "--num_processes", 8, "--num_machines", 2, "--machine_rank", 0, "--main_process_ip", "a"
    )
    assert "--num_processes 4" in line
    assert "shared evenly" in fails(capsys, config, "--num_processes", 3, "--num_machines", 2)
    two = ("--num_processes", 4, "--num_machines", 2)
    for given in ((), ("--machine_rank", 0), ("--main_process_ip", "10.0.0.1"), ("--accelerate_config", "zero3")):
        line = fails(capsys, config, *two, *given)
        assert "--machine_rank" in line and "--main_process_ip" in line


def test_batches_that_hold_no_whole_groups(capsys, config, gpus):
    sizes = ("--per_device_train_batch_size", 3, "--num_generations", 4)
    line = fails(capsys, config, *sizes, "--num_processes", 2)
    assert "per_device_train_batch_size 3 x 2 processes" in line and "divisible by num_generations (4)" in line
    assert "x 1 process x" in fails(capsys, config, *sizes, "--bf16", "false", "--use_cpu")


def test_a_batch_that_is_whole_only_over_all_processes_starts(config, gpus, started):
    """TRL's configs cannot be built in the launching process, which is alone."""
    flags = ["--per_device_train_batch_size", "2", "--num_generations", "4", "--num_processes", "2"]
    assert main(["train", "--config", str(config), *flags]) == 0
    assert started[0].training_script_args[:3] == ["train", "grpo", "--launched"]


def test_deepspeed_that_is_not_there(capsys, config, tmp_path, monkeypatch, gpus):
    assert "deepspeed: " in fails(capsys, config, "--deepspeed", tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text("{")
    assert "not JSON" in fails(capsys, config, "--deepspeed", tmp_path / "broken.json")
    find = launching.importlib.util.find_spec
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    remedy = "pip install 'atlas-rl[deepspeed]'"
    assert remedy in fails(capsys, config, "--accelerate_config", "zero2", "--num_processes", 2)
    (tmp_path / "ds.json").write_text("{}")
    assert remedy in fails(capsys, config, "--deepspeed", tmp_path / "ds.json")


@pytest.mark.parametrize("field", ["deepspeed", "fsdp"])
def test_sharding_that_nothing_launches(capsys, config, tmp_path, field):
    (tmp_path / "ds.json").write_text("{}")
    line = fails(capsys, config, f"--{field}", *([tmp_path / "ds.json"] if field == "deepspeed" else []))
    assert f"{field}: " in line and "--num_processes" in line and "torchrun" in line


def test_launcher_flags_in_a_process_that_was_launched(capsys, config, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "accelerate_config is for" in fails(capsys, config, "--accelerate_config", "zero2")


def test_checkpoints_that_cannot_be_resumed(capsys, config, tmp_path):
    assert "nowhere does not exist" in fails(capsys, config, "--resume_from_checkpoint", tmp_path / "nowhere")
    (tmp_path / "checkpoint-3").mkdir()
    resume = ("--resume_from_checkpoint", tmp_path / "checkpoint-3")
    assert "incomplete" in fails(capsys, config, *resume)
    (tmp_path / "checkpoint-3" / "trainer_state.json").touch()
    assert "deterministic" in fails(capsys, config, *resume, "--atlas.deterministic", "true")


def test_save_steps_inside_a_generation(capsys, config):
    options = (
        "--bf16",
        "false",
        "--use_cpu",
        "--num_iterations",
        2,
        "--save_steps",
        3,
        "--atlas.deterministic",
        "true",
    )
    assert "set save_steps: 4" in fails(capsys, config, *options)


# ---- what accelerate is given


def parsed(*flags: str, **fields):
    plan = Launch.of(list(flags))
    launching.check(plan, FIELDS | fields)
    return launching._parse(accelerate_flags(plan, FIELDS | fields), [])


def test_several_processes_on_the_cpu_are_really_started(gpus, tmp_path):
    """Accelerate alone would start one, or look for MPI."""
    options = parsed("--num_processes", "2")
    assert options.multi_gpu and options.main_process_port != parsed("--num_processes", "2").main_process_port
    gpus(1)
    (tmp_path / "cpu.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    assert parsed("--accelerate_config", str(tmp_path / "cpu.yaml")).multi_gpu
    assert not parsed("--num_processes", "1").multi_gpu
    options = parsed("--cpu", "--num_processes", "2")
    assert options.multi_gpu and not options.cpu
    assert parsed("--num_processes", "2", use_cpu=True).multi_gpu
    assert not parsed("--accelerate_config", "zero2", "--num_processes", "1").multi_gpu


def test_a_preset_takes_the_accelerators_that_are_there(gpus):
    gpus(4)
    assert parsed("--accelerate_config", "zero3").num_processes == 4
    assert parsed("--accelerate_config", "zero3", "--num_processes", "2").num_processes == 2


def test_machines_are_started_one_by_one(gpus):
    gpus(8)
    two = ["--num_machines", "2", "--num_processes", "16", "--machine_rank", "1", "--main_process_ip", "10.0.0.1"]
    assert parsed("--use_deepspeed", *two).deepspeed_multinode_launcher == "standard"
    assert parsed("--accelerate_config", "fsdp2", *two).main_process_port is None
    one_for_all = ["--use_deepspeed", *two[:4], "--deepspeed_multinode_launcher", "pdsh"]
    assert parsed(*one_for_all).deepspeed_multinode_launcher == "pdsh"


@pytest.mark.parametrize(
    ("codes", "expected"), [([2, -15], 2), ([-15, 2], 2), ([1], 1), ([-9, -15], 1), ([130, -15], 130), ([1, 2], 2)]
)
def test_the_exit_code_is_that_of_the_processes(config, gpus, monkeypatch, codes, expected):
    def failed(*_):
        failures = {r: SimpleNamespace(exitcode=code, timestamp=r) for r, code in enumerate(codes)}
        error = ChildFailedError.__new__(ChildFailedError)
        error.failures = failures
        raise error

    monkeypatch.setattr("accelerate.commands.launch.launch_command", failed)
    assert main(["train", "--config", str(config), "--num_processes", "2"]) == expected


def test_the_exit_code_of_one_process_and_of_an_interruption(config, gpus, monkeypatch):
    def raises(error: Exception) -> int:
        def launch_command(*_):
            raise error

        monkeypatch.setattr("accelerate.commands.launch.launch_command", launch_command)
        return main(["train", "--config", str(config), "--num_processes", "1"])

    assert raises(subprocess.CalledProcessError(2, "python")) == 2
    assert raises(SignalException("", 2)) == 130


# ---- what a launched process sets where there are no accelerators


@pytest.fixture
def launched(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    joined = []
    monkeypatch.setattr(module, "_join_deepspeed", lambda timeout: joined.append(("deepspeed", timeout.seconds)))
    monkeypatch.setattr(module, "_join_fsdp", lambda timeout: joined.append(("fsdp", timeout.seconds)))
    return joined


def test_what_a_process_sets_without_accelerators(launched, gpus, capsys, monkeypatch):
    assert module.join({}) == ["--use_cpu", "true", "--ddp_backend", "gloo"] and not launched
    assert "2 processes on the CPU" in capsys.readouterr().err
    flags = module.join({"deepspeed": "ds.json", "use_cpu": True, "ddp_timeout": 60})
    assert flags[2:] == ["--use_cpu", "false", "--bf16", "false"] and launched.pop() == ("deepspeed", 60)
    assert module.join({"fsdp": True})[2:] == ["--use_cpu", "true"] and launched.pop() == ("fsdp", 1800)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="bf16: false"):
        module.join({"bf16": True})
    with pytest.raises(ValueError, match="accelerator_config"):
        module.join({"accelerator_config": "{}"})
    gpus(2)
    assert module.join({"bf16": True}) == []
    with pytest.raises(ValueError, match="use_cpu"):
        module.join({"use_cpu": True})


@pytest.fixture
def left(monkeypatch) -> list:
    """What a process does when it leaves."""
    done = []
    monkeypatch.setattr(module.os, "_exit", done.append)
    monkeypatch.setattr(module.atexit, "_run_exitfuncs", lambda: done.append("exit functions"))
    return done


def test_only_processes_without_accelerators_leave_in_a_hurry(launched, gpus, left, monkeypatch):
    gpus(2)
    module.leave()
    assert not left
    gpus(0)
    module.leave()
    assert left == ["exit functions", 0]
    monkeypatch.delenv("LOCAL_RANK")
    module.leave()
    assert len(left) == 2, "nobody launched it"


def test_a_finished_run_is_done_whatever_its_exit_functions_do(launched, gpus, left, monkeypatch):
    def fail():
        raise OSError

    monkeypatch.setattr(module.atexit, "_run_exitfuncs", fail)
    with pytest.raises(OSError):
        module.leave()
    assert left == [0]


def test_a_program_that_trains_goes_on_and_the_command_leaves(launched, gpus, left, config, monkeypatch):
    monkeypatch.setattr("atlas_rl.cli.trl_arguments.Given.build", lambda given, flags: None)
    monkeypatch.setattr("atlas_rl.cli.trl_run.train", lambda arguments, atlas: None)
    argv = ["train", "grpo", "--launched", "--config", str(config)]
    assert main(argv) == 0 and not left
    monkeypatch.setattr("sys.argv", ["atlas-rl", *argv])
    command()
    assert left == ["exit functions", 0]
    monkeypatch.setattr("sys.argv", ["atlas-rl", "trian"])
    assert command() == 2 and len(left) == 2, "a failure has its own way out"


def test_a_run_of_one_process_sets_nothing(gpus, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert module.join({"deepspeed": "ds.json"}) == [] and not capsys.readouterr().err
