"""What can be known to be wrong with a run before torch is imported: models, data sets and folders that are not there."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from atlas_rl.checkpoints import check_checkpoint
from atlas_rl.cli import did_you_mean

DATASET_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""Data files by suffix, and the builder of `datasets` that reads them."""

TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")


def check_inputs(values: dict[str, Any], deterministic: bool = False) -> None:
    """`values` holds fields as given in the YAML or on the command line, not parsed yet."""
    if values.get("deepspeed"):
        check_deepspeed_config(values["deepspeed"])
    if isinstance(resume := resume_choice(values.get("resume_from_checkpoint")), str):
        check_checkpoint(resume, deterministic)
    if values.get("dataset_name"):
        check_dataset(str(values["dataset_name"]))
    check_rewards(values)
    check_output_dir(str(values.get("output_dir") or "trainer_output"))
    if values.get("model_name_or_path"):  # last: it may ask the hub
        check_model(str(values["model_name_or_path"]), values.get("model_revision"))


def check_drafter(path: str) -> None:
    """A folder's config and weights are looked at; hub ids are left to the hub, which may know them from its cache."""
    if not (Path(path).exists() or path.startswith((".", "/", "~"))):
        return
    folder = Path(path)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file() and not (name.startswith("model") and list(folder.glob("*.safetensors"))):
            raise ValueError(
                f"atlas.static_drafter: {folder} holds no {name}: name a folder made by `atlas-rl drafter train`, an EAGLE-3 "
                "checkpoint or a language model"
            )


def check_dataset(name: str) -> None:
    """Hub ids are left to `datasets`, which may know them from its cache."""
    path = Path(name)
    if path.is_file() and path.suffix not in DATASET_BUILDERS:
        known = ", ".join(DATASET_BUILDERS)
        raise ValueError(
            f"dataset_name: {name} is not a kind of file that is read here: give a folder or one of {known}"
        )
    if not path.exists() and (path.suffix in DATASET_BUILDERS or _looks_like_path(name)):
        raise ValueError(f"dataset_name: {name} does not exist: give an existing file or folder, or a hub id")


def check_rewards(values: dict[str, Any]) -> None:
    names = values.get("reward_funcs") or []
    names = [names] if isinstance(names, str) else names
    for name in names:
        if "." not in str(name) and name not in TRL_REWARDS:
            raise ValueError(
                f"reward_funcs: unknown reward {name!r}{did_you_mean(str(name), TRL_REWARDS)} "
                f"(give a dotted path such as my_rewards.exact_match, or one of {', '.join(TRL_REWARDS)})"
            )
    own_data = values.get("dataset_name") or values.get("datasets")
    if own_data and not names and not values.get("reward_model_name_or_path"):
        raise ValueError(
            "reward_funcs is missing: data of your own needs a reward. Give the dotted path of a function, such as "
            f"--reward_funcs my_rewards.exact_match, or one of {', '.join(TRL_REWARDS)}"
        )


def resume_choice(value: Any) -> bool | str:
    """`resume_from_checkpoint`, which TRL's parser leaves a text: the newest (True), none, or the path of one."""
    text = str(value).lower()
    if text in ("true", "latest", "yes"):
        return True
    return False if text in ("none", "null", "false", "no", "") else str(value)


def check_deepspeed_config(value: Any) -> None:
    """A mapping, in the YAML or as JSON, or the path of a JSON file."""
    if isinstance(value, dict) or str(value).startswith("{"):
        return
    try:
        config = json.loads(Path(value).read_text())
    except OSError as error:
        raise ValueError(
            f"deepspeed: {value} cannot be read ({error.strerror}): give a JSON file of DeepSpeed's"
        ) from None
    except ValueError as error:
        raise ValueError(f"deepspeed: {value} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"deepspeed: {value} holds no JSON object")


def check_output_dir(name: str, field: str = "output_dir") -> None:
    """Whether it can be made and written, found out without making it."""
    folder = Path(name).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{field}: {name} cannot be written ({error.strerror}): give another folder") from None


def check_model(name: str, revision: str | None = None, field: str = "model_name_or_path") -> None:
    path = Path(name)
    remedy = "give a folder written by save_pretrained, or a hub id that can be reached"
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"{field}: the folder {name} holds no config.json: {remedy}")
    elif path.exists() or _looks_like_path(name):
        raise ValueError(f"{field}: the folder {name} does not exist: {remedy}")
    else:
        reason = _why_not_on_hub(name, revision)
        if reason:
            raise ValueError(f"{field}: {name} is no local folder, and {reason}: {remedy}")


def _why_not_on_hub(name: str, revision: str | None) -> str | None:
    """None where the model is in the local cache or on the hub. One request, without the retries of a download."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return None
        if HF_HUB_OFFLINE:
            return "the hub is switched off (HF_HUB_OFFLINE)"
        HfApi().model_info(name, revision=revision, timeout=10)
    except Exception as error:  # the hub's client passes on whatever its HTTP library raises
        return f"the hub does not give it ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1
