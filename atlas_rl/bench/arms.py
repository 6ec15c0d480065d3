"""Ways of making the same rollouts. An arm takes a policy once and then runs workloads; it returns completion lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from atlas_rl.bench.workload import SAMPLING, Workload
from atlas_rl.config import AtlasConfig
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView


class Arm:
    """One way; `skipped` says why it cannot run here."""

    skipped: str | None = None

    def __init__(self, policy: PreTrainedModel) -> None:
        self.policy = policy

    def start(self, workload: Workload, repeat: int) -> None:
        """Untimed: forget whatever was learned from earlier repeats."""

    def run(self, workload: Workload, repeat: int) -> list[int]:
        """Timed. Make the repeat's completions; returns their lengths."""
        raise AssertionError("subclasses run")

    def figures(self) -> dict[str, float]:
        """Of the last run, beyond its time."""
        return {}


class ForcedLength(LogitsProcessor):
    """Forbids EOS before a row's length is reached and forces it there."""

    def __init__(self, lens: list[int], prompt_width: int, eos_id: int) -> None:
        self.ends = torch.tensor(lens) + prompt_width
        self.eos_id = eos_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ends_now = self.ends == input_ids.shape[1] + 1
        scores[:, self.eos_id] = -torch.inf
        scores[ends_now] = -torch.inf
        scores[ends_now, self.eos_id] = 0.0
        return scores


class HFGenerate(Arm):
    """transformers' `generate`: what TRL runs by default. Left-padded, until the longest row ends."""

    def run(self, workload: Workload, repeat: int) -> list[int]:
        width = max(map(len, workload.prompts))
        input_ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in workload.prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in workload.prompts])
        torch.manual_seed(repeat)
        options = {
            "max_new_tokens": max(workload.lens),
            "do_sample": True,
            "top_k": 0,
            "top_p": 1.0,
            "temperature": 1.0,
        }
        if len(set(workload.lens)) == 1:
            options |= {"min_new_tokens": options["max_new_tokens"], "pad_token_id": 0}
        else:
            eos_id = self.policy.config.vocab_size - 1
            forced = ForcedLength(workload.lens, width, eos_id)
            options |= {
                "logits_processor": LogitsProcessorList([forced]),
                "eos_token_id": eos_id,
                "pad_token_id": eos_id,
            }
        output = self.policy.generate(input_ids, attention_mask=mask, **options)
        completions = output[:, width:]
        if len(set(workload.lens)) == 1:
            return [completions.shape[1]] * len(completions)
        return ((completions != options["eos_token_id"]).sum(1) + 1).tolist()


class AtlasArm(Arm):
    """The engine. The linears' packing is part of the first run, as it is part of every policy update."""

    config = AtlasConfig()

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__(policy)
        self.view = PolicyView(policy)
        self.engine: RolloutEngine | None = None
        self.step_cost = None

    def start(self, workload: Workload, repeat: int) -> None:
        from atlas_rl.drafters.suffix import SuffixDrafter

        drafter = SuffixDrafter() if self.config.drafter_names else None
        self.engine = RolloutEngine(self.view, self.config, drafter)
        if self.step_cost is not None:  # step times are the machine's, not the completions': a trainer keeps them too
            self.engine.step_cost.__dict__.update(self.step_cost.__dict__)
        self.step_cost = self.engine.step_cost
        self.engine.weights_changed = True  # a rollout follows a policy update: packing the weights is part of its time

    def run(self, workload: Workload, repeat: int) -> list[int]:
        rollouts = self.engine.generate(workload.requests(repeat), SAMPLING)
        return [len(rollout.token_ids) for rollout in rollouts]

    def figures(self) -> dict[str, float]:
        row = self.engine.stats.to_dict()
        return {"tokens_per_decode_step": row["tokens_per_decode_step"], "peak_bytes": row["kv_peak_bytes"]}


class AtlasPlain(AtlasArm):
    config = replace(AtlasArm.config, speculate=False)


class AtlasSuffix(AtlasArm):
    config = replace(AtlasArm.config, drafters=("suffix",))


ARMS: dict[str, Callable[[PreTrainedModel], Arm]] = {
    "hf_generate": HFGenerate,
    "atlas_plain": AtlasPlain,
    "atlas_suffix": AtlasSuffix,
}
