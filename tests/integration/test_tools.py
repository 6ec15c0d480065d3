"""GRPO with tools and environments: a policy that has learnt by heart to call a tool twice, and every turn through Atlas."""

from __future__ import annotations

import inspect

import pytest
import torch

pytest.importorskip("trl")

import datasets
import trl
from helpers import tiny_qwen3
from recipes import make_trainer, rollout_rows
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.chat_template_utils import parse_response

if "prefix" not in inspect.signature(parse_response).parameters:
    reason = f"TRL {trl.__version__} parses tool calls without the prompt, which transformers 5.17 and newer refuse"
    pytest.skip(reason, allow_module_level=True)

CHAT_TEMPLATE = (
    "{% for t in tools or [] %}{{ 'tool ' + t.function.name + '\n' }}{% endfor %}"
    "{% for m in messages %}{{ m.role + ': ' }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + (c.function | tojson) + '</call>' }}{% endfor %}"
    "{{ m.content + ('<eos>' if m.role == 'assistant' else '') + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "assistant: ",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close_pattern": r"</call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<eos>\s*", "content": "text"},
    },
}
QUESTION = [{"role": "user", "content": "What is 3 + 4, twice?"}]
TURNS = [  # what the policy says, and what the tool answers
    ('<call>{"name": "add", "arguments": {"a": 3, "b": 4}}</call>', "7"),
    ('<call>{"name": "add", "arguments": {"a": 7, "b": 7}}</call>', "14"),
    ("Answer: 14", None),
]

calls: list[tuple[int, int]] = []


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: The first one.
        b: The second one.
    """
    calls.append((a, b))
    return a + b


class Calculator:
    def reset(self, **kwargs) -> None:
        return None

    def add(self, a: int, b: int) -> int:
        """
        Add two numbers.

        Args:
            a: The first one.
            b: The second one.
        """
        return add(a, b)


@pytest.fixture(scope="module")
def tokenizer(tiny_policy) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    tokenizer.chat_template, tokenizer.response_template = CHAT_TEMPLATE, RESPONSE_TEMPLATE
    return tokenizer


@pytest.fixture
def make_tool_trainer(tokenizer, tiny_policy, tmp_path, atlas):
    """Two steps of a pair of completions, by a policy that knows its lines."""

    def make(**parts):
        parts |= {
            "model": tiny_qwen3(vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0),
            "processing_class": tokenizer,
            "train_dataset": datasets.Dataset.from_list([{"prompt": QUESTION}] * 8),
            "eval_dataset": None,
        }
        options = {"max_completion_length": 200, "temperature": 0.1, "learning_rate": 1e-5}
        trainer = make_trainer("GRPOTrainer", tiny_policy, tmp_path, [atlas], parts, **options)
        learn_by_heart(trainer)
        return trainer

    return make


def script(trainer) -> tuple[list[int], list[int], list[int]]:
    """The prompt, what is to follow, and a mask that is 0 where a tool speaks."""
    tokenizer = trainer.processing_class
    prompt = tokenizer.apply_chat_template(QUESTION, tools=trainer.tools, add_generation_prompt=True, return_dict=False)
    completion, mask = [], []
    for said, heard in TURNS:
        said_ids = [*tokenizer.encode(said), tokenizer.eos_token_id]
        answer = {"role": "tool", "name": "add", "content": heard}
        heard_ids = trainer._get_tool_suffix_ids([answer]) if heard else []
        completion += said_ids + heard_ids
        mask += [1] * len(said_ids) + [0] * len(heard_ids)
    return prompt, completion, mask


def learn_by_heart(trainer) -> None:
    prompt, completion, _ = script(trainer)
    ids = torch.tensor([prompt + completion])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    optimizer = torch.optim.Adam(trainer.model.parameters(), lr=3e-3)
    for _ in range(200):
        loss = trainer.model(input_ids=ids, labels=labels).loss
        if loss < 0.01:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"not learnt: loss {float(loss)}")


def recorded(trainer) -> list[tuple]:
    """What TRL makes of each batch of rollouts, tools included."""
    outputs = []
    generate = trainer._generate
    trainer._generate = lambda prompts: outputs.append(generate(prompts)) or outputs[-1]
    return outputs


@pytest.mark.parametrize("how", ["tools", "environment", "logprobs", "rollout_func"])
def test_every_turn_goes_through_atlas(how: str, atlas, make_tool_trainer, tmp_path):
    parts = {"environment_factory": Calculator} if how == "environment" else {"tools": [add]}
    if how == "rollout_func":
        parts["rollout_func"] = atlas.rollout_func
    trainer = make_tool_trainer(**parts)
    if how == "logprobs":
        atlas.attach(trainer, logprobs=True)
    calls.clear()
    outputs = recorded(trainer)
    prompt, completion, mask = script(trainer)
    trainer.train()
    assert calls == [(3, 4), (3, 4), (7, 7), (7, 7)] * 2, "two completions in each of two steps"
    assert len(outputs) == 2
    for prompt_ids, completion_ids, tool_mask, *_ in outputs:
        assert prompt_ids == [prompt] * 2 and completion_ids == [completion] * 2 and tool_mask == [mask] * 2
    rows = rollout_rows(tmp_path)
    assert [(row["step"], row["call"]) for row in rows] == [(step, turn) for step in (0, 1) for turn in (0, 1, 2)]
    assert not any("fallback" in row or "error" in row for row in rows)
    spoken = 2 * sum(mask)
    assert [sum(row["completion_tokens"] for row in rows if row["step"] == step) for step in (0, 1)] == [spoken] * 2
    if how == "logprobs":
        ratios = [entry["sampling/importance_sampling_ratio/mean"] for entry in trainer.state.log_history[:2]]
        assert ratios == pytest.approx([1, 1], abs=1e-3)
