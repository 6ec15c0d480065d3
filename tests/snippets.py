"""The code blocks of the README, of docs/ and of examples/README.md, and what a reader's folder holds when they run."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from helpers import tiny_qwen3
from recipes import CHATS, TEXTS, is_even, save_tiny_policy
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import qwen3_chat_template

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]
RUN_LANGUAGES, SHOWN_LANGUAGES = ("python", "bash", "yaml"), ("text",)

SIZES = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 8,
    "max_new_tokens": 8,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
"""Over what trainers' configs of the pages ask for, where a config has the field."""
TRAIN_FLAGS = ["--max_steps", "1", "--max_completion_length", "8", "--per_device_train_batch_size", "4"]
TRAIN_FLAGS += ["--num_generations", "2", "--bf16", "false", "--use_cpu", "true", "--save_strategy", "no"]
"""Behind every `atlas-rl train` that runs."""
DRAFTER_FLAGS = ["--completions-per-prompt", "1", "--max-new-tokens", "8"]
"""Behind every `atlas-rl drafter`; its `--minutes` becomes `--steps 2`."""
EXAMPLES = {
    "deepspeed_loop.py": "tests/distributed/test_deepspeed_loop.py runs it on two processes",
    "drift_study.py": "tests/integration/test_drift_study.py runs it",
    "evolving_workload.py": "tests/integration/test_drift_study.py runs it",
    "generate.py": ["--prompts", "2", "--samples", "2", "--tokens", "8"],
    "grpo.py": [],
    "gsm8k_grpo.py": ["--model", "./my-model", "--data", "train.jsonl"],
    "lora_grpo.py": [],
    "my_rewards.py": "a module: `atlas-rl train --reward_funcs my_rewards.exact_match` runs it",
    "tools_grpo.py": ["--model", "Qwen/Qwen3-0.6B"],
    "zero3_grpo.py": "tests/distributed/test_examples.py runs it on two processes",
}
"""The arguments that a script is run with, behind those of a page; or why its arguments are only parsed here."""
ONLY_PARSED = {
    "make": "installs, or runs all tests: its rules are expanded",
    "pip install": "installs: extras and files are looked up",
    "atlas-rl bench": "minutes of measuring: its config is read; tests/integration/test_bench.py runs it, small",
    "atlas-rl doctor": "tests/unit/test_cli.py runs it",
    "python -m": "minutes of measuring, a GPU, or gigabytes to install",
    "torchrun": "several GPUs",
    "accelerate launch": "several processes",
    "deepspeed": "several processes",
    "srun": "several machines",
}
"""How commands begin that are read by their own parsers and go no further, and why; so do scripts with a reason in EXAMPLES, and
`atlas-rl train` with a launcher's flags (tests/distributed/test_launching.py starts some)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    page: Path
    line: int
    """Of the opening fence, from 1."""
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """Of a bash block, word by word: comments, line ends and `&&` resolved."""
        for line in self.text.replace("\\\n", " ").splitlines():
            command: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word != "&&":
                    command.append(word)
                elif command:
                    yield command
                    command = []


def blocks_of(page: Path) -> list[Block]:
    """In the page's order.

    Raises:
        ValueError: a block names no language, or one that nobody runs.
    """
    text = page.read_text()
    blocks = [
        Block(page=page, line=text[: match.start()].count("\n") + 1, language=match[1], text=match[2])
        for match in re.finditer(r"^```(\S*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]
    for block in blocks:
        if block.language not in (*RUN_LANGUAGES, *SHOWN_LANGUAGES):
            raise ValueError(f"{block}: the language {block.language!r} is none of {RUN_LANGUAGES + SHOWN_LANGUAGES}")
    return blocks


def make_reader_folder(folder: Path) -> Path:
    """What the pages take to be there: models by the names they go by, data, prompts, a reward, a config, the repository."""
    for name in ("my-model", "path/to/model", "Qwen/Qwen2.5-0.5B-Instruct"):
        save_tiny_policy(folder / name)
    save_chat_policy_with_tools(folder / "Qwen/Qwen3-0.6B")
    for name in ("configs", "examples", "Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my_rewards.py").symlink_to(ROOT / "examples" / "my_rewards.py")
    write_rows(folder / "data.jsonl", [{"prompt": text, "answer": "12"} for text in TEXTS])
    for name in ("prompts.jsonl", "other_prompts.jsonl"):
        write_rows(folder / name, [{"prompt": text} for text in TEXTS])
    (folder / "train.jsonl").write_text(gsm8k_lines())
    (folder / "my.yaml").write_text(
        "model_name_or_path: ./my-model\ndataset_name: data.jsonl\nreward_funcs: [my_rewards.exact_match]\n"
        "output_dir: runs/mine\nper_device_train_batch_size: 64\nnum_generations: 8\nlogging_steps: 1\nreport_to: none\n"
    )
    return folder


def save_chat_policy_with_tools(folder: Path) -> None:
    """A tiny policy under Qwen3's chat template, which is long."""
    save_tiny_policy(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = qwen3_chat_template
    tokenizer.save_pretrained(folder)
    model = tiny_qwen3(vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0, max_position_embeddings=2048)
    model.save_pretrained(folder)


def gsm8k_lines(count: int = 8) -> str:
    """The first problems of GSM8K, where ATLAS_TEST_DATA has it; else some of that form."""
    path = Path(os.environ.get("ATLAS_TEST_DATA", "")) / "gsm8k" / "train.jsonl"
    if path.is_file():
        return "".join(path.read_text().splitlines(keepends=True)[:count])
    rows = [{"question": text, "answer": "So it is.\n#### 1,012"} for text in TEXTS]
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def names_of_a_page() -> dict[str, Any]:
    """What the python blocks of a page find defined: a reader's own model, data and reward."""
    model = AutoModelForCausalLM.from_pretrained("path/to/model").eval()
    tokenizer = AutoTokenizer.from_pretrained("path/to/model", padding_side="left")
    inputs = tokenizer(TEXTS[:2], return_tensors="pt", padding=True)
    engine = SimpleNamespace(module=model, global_steps=0, device=model.device, torch_autocast_enabled=lambda: False)
    return {
        "model": model,
        "tokenizer": tokenizer,
        "input_ids": inputs.input_ids,
        "mask": inputs.attention_mask,
        "prompts": tokenizer(TEXTS[:2])["input_ids"],
        "my_reward": is_even,
        "my_dataset": Dataset.from_list([{"prompt": chat["messages"][:1]} for chat in CHATS]),
        "engine": engine,
        "prompt_ids": inputs.input_ids,
        "prompt_mask": inputs.attention_mask,
        "num_steps": 1,
    }
