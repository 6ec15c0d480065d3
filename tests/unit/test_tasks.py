"""The tasks of the embedded default run: right solutions, the verifiers' rewards, a sound shipped policy."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from atlas_rl.tasks import build_dataset, policy_path, reasoning_gym_reward
from atlas_rl.tasks.measure_policy import sample
from atlas_rl.tasks.mix import TASK_NAMES, draw_items
from atlas_rl.tasks.reward import extract_answer, score_completion
from atlas_rl.tasks.solutions import STYLES, WRITERS, style_of, write_solution

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(policy_path())


@pytest.fixture(scope="module")
def policy():
    return AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float32).eval()


def solutions(count: int, seed: int = 7) -> list[tuple]:
    rng = Random(seed)
    return [
        (item, style, write_solution(item.task, item.metadata, item.answer, style, rng))
        for item in islice(draw_items(seed), count)
        for style in STYLES
    ]


def test_every_style_solves_every_task():
    seen = set()
    for item, style, solution in solutions(1000):
        seen.add((item.task, style, item.large))
        assert score_completion(item.task, item.answer, item.metadata, solution) == 1.0, solution
        assert style_of(solution) == style
    assert len(seen) == len(TASK_NAMES) * len(STYLES) * 2
    assert set(WRITERS) == set(TASK_NAMES)


def test_dataset_is_deterministic_and_serializable():
    first, again, other = build_dataset(24, seed=3), build_dataset(24, seed=3), build_dataset(24, seed=4)
    assert first.to_list() == again.to_list()
    assert first["prompt"] != other["prompt"]
    assert set(first.column_names) == {"prompt", "task", "answer", "metadata"}
    assert all(isinstance(json.loads(metadata), dict) for metadata in first["metadata"])
    assert build_dataset(8, seed=3).to_list() == first.to_list()[:8]
    with pytest.raises(ValueError, match="at least one prompt"):
        build_dataset(0)


def rewards(rows: dict[str, list], completions: list) -> list[float]:
    columns = {name: rows[name] for name in ("task", "answer", "metadata")}
    return reasoning_gym_reward(prompts=rows["prompt"], completions=completions, trainer_state=None, **columns)


def test_reward_on_right_wrong_and_garbled_completions():
    rows = build_dataset(32, seed=1).to_dict()
    right = [f"Quickly:\nAnswer: {answer}" for answer in rows["answer"]]
    assert rewards(rows, right) == [1.0] * 32
    assert rewards(rows, [[{"role": "assistant", "content": text}] for text in right]) == [1.0] * 32
    wrong = [f"Quickly:\nAnswer: {int(answer) + 1}" for answer in rows["answer"]]
    assert max(rewards(rows, wrong)) < 0.5
    assert sum(rewards(rows, [text.partition("Answer")[0] for text in right])) == 0
    assert sum(rewards(rows, [f"{text}\nand more" for text in right])) == 0
    assert sum(rewards(rows, [""] * 32)) == 0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("One.\nAnswer: 42", "42"),
        ("One.\nAnswer:42  \n", "42"),
        ("One.\nAnswer: 4\nAnswer: 5", "5"),
        ("One.\nAnswer:", None),
        ("Answer 42", None),
        ("One.\nAnswer: 42\nTwo.", None),
    ],
)
def test_extract_answer(completion: str, answer: str | None):
    assert extract_answer(completion) == answer


def test_tokenizer_round_trips_and_spells_digits(tokenizer):
    assert tokenizer.pad_token_id is not None and tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for item, _, solution in solutions(60):
        for text in (item.prompt, solution):
            assert tokenizer.decode(tokenizer(text).input_ids) == text
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("Then 4071 + 93 = 4164").input_ids)
    assert [piece for piece in pieces if any(map(str.isdigit, piece))] == list("4071934164")
    assert tokenizer.decode(tokenizer("Grüße, 東京 🙂").input_ids) == "Grüße, 東京 🙂"


def test_shipped_policy_is_small_and_well_formed(policy, tokenizer):
    config = policy.config
    assert 3e6 <= sum(parameter.numel() for parameter in policy.parameters()) <= 6e6
    assert sum(file.stat().st_size for file in Path(policy_path()).glob("*.safetensors")) <= 16e6
    assert config.head_dim % 16 == 0 and config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings and config.max_position_embeddings >= 1024
    assert config.vocab_size == len(tokenizer)
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    record = json.loads(Path(policy_path(), "policy.json").read_text())
    assert record["held_out"]["ended_by_eos"] > 0.97


def test_shipped_policy_samples_solutions(policy, tokenizer):
    torch.manual_seed(0)
    items = list(islice(draw_items(11), 24))
    completions, entropy = sample(policy, tokenizer, [item.prompt for item in items])
    assert sum(ids[-1] == tokenizer.eos_token_id for ids in completions) >= 22
    assert 0.15 < entropy.mean() < 0.7
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
    assert sum(style_of(text) is not None for text in texts) >= 22
    scored = [
        score_completion(item.task, item.answer, item.metadata, text) for item, text in zip(items, texts, strict=True)
    ]
    assert 0.05 < sum(scored) / len(scored) < 0.95


def test_quickstart_config_uses_trl_field_names():
    from trl import GRPOConfig, ModelConfig
    from trl.scripts.grpo import GRPOScriptArguments

    settings = yaml.safe_load((REPO / "configs" / "quickstart.yaml").read_text())
    settings.pop("atlas")
    known = {name for kind in (GRPOConfig, ModelConfig, GRPOScriptArguments) for name in kind.__dataclass_fields__}
    assert set(settings) <= known


def test_importing_the_package_is_light():
    code = "import sys, atlas_rl.tasks; sys.exit(any(m in sys.modules for m in ('torch', 'datasets', 'reasoning_gym')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0
