"""A small run of each of TRL's trainers that generate: a tiny random policy, a few prompts, a few tokens."""

from __future__ import annotations

import ast
import inspect
import json
import pkgutil
import textwrap
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl.experimental
import trl.trainer
from helpers import tiny_qwen3
from transformers import AutoTokenizer, PreTrainedModel, Trainer

from atlas_rl.tasks import policy_path

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEXTS = [f"What is {n} + {n % 3}?" for n in range(8)]
PROMPTS = [{"prompt": text} for text in TEXTS]
CHATS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Answer: 12"}]} for text in TEXTS
]
PREFERENCES = [{"prompt": text, "chosen": " Answer: 12", "rejected": " no"} for text in TEXTS]


def save_tiny_policy(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random policy with the shipped policy's tokenizer and a chat template, as a user would name it to a trainer."""
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    tiny_qwen3(dtype, vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0).save_pretrained(folder)
    return folder


def is_even(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(str(completion)) % 2) for completion in completions]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    rows: list[dict[str, Any]] = field(default_factory=lambda: PROMPTS)
    rewarded: bool = False
    has_teacher: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """For the trainer's config."""


GROUPS = {"num_generations": 2, "max_completion_length": 6}
RECIPES = {
    "GRPOTrainer": Recipe(rewarded=True, options=GROUPS),
    "GMPOTrainer": Recipe(rewarded=True, options=GROUPS),
    "RLOOTrainer": Recipe(rewarded=True, options=GROUPS),
    "SDPOTrainer": Recipe(rewarded=True, options=GROUPS),
    "SDFTTrainer": Recipe(rows=[row | {"privileged_context": "12"} for row in PROMPTS], options=GROUPS),
    "DistillationTrainer": Recipe(has_teacher=True, options={"max_completion_length": 6}),
    "GOLDTrainer": Recipe(rows=CHATS, has_teacher=True, options={"max_completion_length": 6, "lmbda": 1.0}),
    "IWOPDTrainer": Recipe(rows=CHATS, has_teacher=True, options={"max_completion_length": 6}),
    "GKDTrainer": Recipe(rows=CHATS, has_teacher=True, options={"max_new_tokens": 6, "lmbda": 1.0}),
    "OnlineDPOTrainer": Recipe(rewarded=True, options={"max_new_tokens": 6}),
    "A2POTrainer": Recipe(
        rewarded=True, options={"max_completion_length": 6, "num_value_samples": 2, "filter_all_incorrect": False}
    ),
    "MiniLLMTrainer": Recipe(has_teacher=True, options=GROUPS),
}
EVALUATES_WITHOUT_GENERATING = {"GOLDTrainer", "IWOPDTrainer", "GKDTrainer"}
CANNOT_EVALUATE = {"OnlineDPOTrainer"}
"""TRL gives the model a batch that is not made for it."""
SAMPLES_FOR_THE_LOG = {"CPOTrainer": Recipe(rows=PREFERENCES), "ORPOTrainer": Recipe(rows=PREFERENCES)}
"""Trained on given data; they generate to show samples during evaluation."""
ELSEWHERE = {
    "AsyncGRPOTrainer": "a child process posts its prompts to a vLLM server",
    "AsyncDistillationTrainer": "a child process posts its prompts to a vLLM server",
    "ServerDistillationTrainer": "DistillationTrainer's generation, with a teacher on a vLLM server that a test does not have",
}
EARLIER = frozenset(
    "MiniLLMTrainer BCOTrainer KTOTrainer BaseSelfDistillationTrainer DPPOTrainer GFPOTrainer GRPOWithReplayBufferTrainer "
    "NashMDTrainer PAPOTrainer XPOTrainer".split()
)
"""Generate in the oldest TRL that is supported, and are not in the newest one or do not generate there. (Several do not run even
without Atlas, with a transformers as new as Atlas needs.)"""


def make_trainer(
    name: str,
    policy: Path,
    output_dir: Path,
    callbacks: list[Any] | None = None,
    parts: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """The trainer of that name, by its recipe; `parts` are arguments of the trainer, `options` of its config."""
    if name not in online_trainers():
        pytest.skip(f"TRL {trl.__version__} has no {name}")
    recipe = (RECIPES | SAMPLES_FOR_THE_LOG)[name]
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 5,
    }
    trainer_class = online_trainers()[name]
    config_class = getattr(
        import_module(trainer_class.__module__.rpartition(".")[0]), name.replace("Trainer", "Config")
    )
    arguments = {
        "model": str(policy),
        "processing_class": AutoTokenizer.from_pretrained(policy),
        "train_dataset": datasets.Dataset.from_list(recipe.rows),
        "eval_dataset": datasets.Dataset.from_list(recipe.rows[:2]),
        "callbacks": callbacks,
    }
    if recipe.rewarded:
        arguments["reward_funcs"] = is_even
    if recipe.has_teacher:
        arguments["teacher_model"] = teacher = tiny_qwen3(vocab_size=768, initializer_range=0.1)
        teacher.config._name_or_path = str(policy)  # where IWOPDTrainer looks for the teacher's tokenizer
    return trainer_class(args=config_class(**defaults | recipe.options | options), **arguments | (parts or {}))


def rollout_rows(output_dir: Path) -> list[dict[str, Any]]:
    lines = (output_dir / "rollouts.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "rollout"]


def marks(model: PreTrainedModel) -> dict:
    """What a generator could leave behind on a model, beside its weights."""
    return {
        "attributes": sorted(vars(model)),
        "attention": model.config._attn_implementation,
        "dtypes": [p.dtype for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


@cache
def online_trainers() -> dict[str, type[Trainer]]:
    """Every trainer class of the installed TRL whose code, or that of a TRL class below it, generates."""
    found: dict[str, type[Trainer]] = {}
    for package in (trl.trainer, trl.experimental):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.endswith("_trainer"):
                continue
            for name, value in vars(import_module(module.name)).items():
                if inspect.isclass(value) and value.__module__ == module.name and _generates(value):
                    found.setdefault(name, value)  # an experimental variant may go by the same name
    return found


def _generates(trainer_class: type) -> bool:
    own = [base for base in trainer_class.__mro__ if base.__module__.startswith("trl.")]
    return issubclass(trainer_class, Trainer) and any(map(_calls_a_generator, own))


def _calls_a_generator(cls: type) -> bool:
    """`….generate(…)`, or the worker of the asynchronous trainers."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))):
        if isinstance(node, ast.Attribute) and node.attr in ("generate", "rollout_worker"):
            return True
    return False
