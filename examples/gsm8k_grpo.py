"""GRPO on GSM8K: grade-school word problems, and a reward that compares the last number of a completion with the right one.

    python examples/gsm8k_grpo.py                                           model and data from the hub
    python examples/gsm8k_grpo.py --model ./Qwen3-0.6B --data train.jsonl   both from this disk
    accelerate launch examples/gsm8k_grpo.py                                on all GPUs of this machine

A .jsonl file has the data set's own columns: `question`, and `answer` that ends in `#### 72`. Half a billion parameters want a
GPU; without one, give a smaller --model.
"""

import argparse
import re

import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from atlas_rl import AtlasRolloutGenerator

HUB_DATA = "openai/gsm8k"
INSTRUCTION = "Reason step by step, and end with the line `#### ` followed by the number that is the answer.\n\n"
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def main() -> None:
    args = parse_arguments()
    is_chat = AutoTokenizer.from_pretrained(args.model).chat_template is not None
    trainer = GRPOTrainer(
        model=args.model,
        reward_funcs=right_answer,
        train_dataset=load_problems(args.data, is_chat),
        args=GRPOConfig(
            output_dir=args.output_dir,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch,
            num_generations=args.samples,
            max_completion_length=args.tokens,
            learning_rate=1e-6,
            bf16=torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        callbacks=[AtlasRolloutGenerator()],  # <- all there is to change
    )
    trainer.train()
    trainer.save_model(args.output_dir)


def load_problems(name: str, is_chat: bool) -> Dataset:
    """Rows with `prompt` (messages for a chat model, else text) and `target`, the right number as a text."""
    is_file = name.endswith((".jsonl", ".json"))
    problems = (
        load_dataset("json", data_files=name, split="train") if is_file else load_dataset(name, "main", split="train")
    )

    def to_row(problem: dict) -> dict:
        text = INSTRUCTION + problem["question"]
        prompt = [{"role": "user", "content": text}] if is_chat else f"{text}\n\n"
        return {"prompt": prompt, "target": answer_in(problem["answer"])}

    return problems.map(to_row, remove_columns=problems.column_names)


def right_answer(completions: list, target: list[str], **columns: list) -> list[float]:
    """1 where the completion's answer is the right number, else 0."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [float(is_same_number(answer_in(text), right)) for text, right in zip(texts, target, strict=True)]


def answer_in(text: str) -> str | None:
    """The number after the last `####`, or in the last \\boxed{}, or the last one of all."""
    for pattern in (rf"####\s*\$?({NUMBER})", rf"\\boxed{{\$?({NUMBER})}}", rf"({NUMBER})"):
        found = re.findall(pattern, text)
        if found:
            return found[-1].replace(",", "")
    return None


def is_same_number(said: str | None, right: str) -> bool:
    return said is not None and float(said) == float(right)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="folder or hub id (default: %(default)s)")
    parser.add_argument("--data", default=HUB_DATA, help="a .jsonl file or a hub id (default: %(default)s)")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32, help="completions per step and process (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="completions per problem (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="of a completion at most (default: %(default)s)")
    parser.add_argument("--output_dir", default="runs/gsm8k")
    return parser.parse_args()


if __name__ == "__main__":
    main()
