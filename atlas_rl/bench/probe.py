"""What a drafter is worth for a policy at some moment of a run, and how far the policy has moved by then.

Shapes: B rollouts, W positions, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from atlas_rl.adapt.acceptance import measure
from atlas_rl.adapt.distill import EVALUATION_STARTS
from atlas_rl.adapt.losses import PolicyEnds
from atlas_rl.adapt.replay import replay
from atlas_rl.config import AtlasConfig
from atlas_rl.drafters.base import Drafter
from atlas_rl.drafters.suffix import SuffixDrafter
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import Rollout, RolloutRequest, SamplingParams

LOOKAHEAD = 4
ROWS_PER_FORWARD = 16
PROBE_SEED = 1 << 40


@torch.no_grad()
def per_token_kl(
    policy: PreTrainedModel, start: PreTrainedModel, rollouts: Sequence[Rollout], temperature: float = 1.0
) -> float:
    """KL(policy || start) in nats, averaged over the tokens of the policy's own rollouts: exact, over full distributions."""
    total, num_tokens = 0.0, 0
    for first in range(0, len(rollouts), ROWS_PER_FORWARD):
        part = rollouts[first : first + ROWS_PER_FORWARD]
        rows = [torch.tensor(r.prompt_ids + r.token_ids) for r in part]
        ids_BW = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right: nothing looks at it
        place_BW = torch.arange(ids_BW.shape[1])
        prompts, ends = (torch.tensor(n)[:, None] for n in ([len(r.prompt_ids) for r in part], [len(r) for r in rows]))
        draws_BW = (place_BW >= prompts - 1) & (place_BW < ends - 1)  # positions that draw a token of the completion
        logp, logq = (
            (m(ids_BW.to(m.device), use_cache=False).logits.cpu()[draws_BW].double() / temperature).log_softmax(-1)
            for m in (policy, start)
        )
        total += float((logp.exp() * (logp - logq)).sum())
        num_tokens += int(draws_BW.sum())
    return total / num_tokens


class Probe:
    """Measures on prompts that stay the same, at lookahead 4, by the engine itself.

    A neural drafter is measured as a copy, so that nothing is learned from it. The suffix drafter is the probe's own: it knows
    the prompts, the siblings of a completion, and what earlier probes saw.
    """

    def __init__(
        self, policy: PreTrainedModel, prompts: Sequence[tuple[int, ...]], num_samples: int, sampling: SamplingParams
    ) -> None:
        self.view = PolicyView(policy)
        self.start = copy.deepcopy(policy)
        self.sampling = sampling
        self.prompts = [prompt for prompt in prompts for _ in range(num_samples)]
        self.num_looks = 0
        self.requests: list[RolloutRequest] = []
        self.plain = RolloutEngine(self.view, AtlasConfig(speculate=False))
        self.suffix = None
        if SuffixDrafter.unavailable_reason() is None:
            self.suffix = RolloutEngine(self.view, AtlasConfig(lookahead=LOOKAHEAD), SuffixDrafter())
        self.rollouts: list[Rollout] = []
        """Of the policy as it was last looked at."""

    def look(self) -> dict[str, float]:
        """The policy has other weights: make its rollouts. Returns its distance from the start.

        Seeds are new each time, as in training: with the noise of an earlier probe the suffix drafter would know the answers.
        """
        self.num_looks += 1
        first_seed, limit = PROBE_SEED * self.num_looks, self.sampling.max_new_tokens
        self.requests = [
            RolloutRequest(prompt_ids=prompt, seed=first_seed + i, max_new_tokens=limit)
            for i, prompt in enumerate(self.prompts)
        ]
        self.plain.weights_changed = True
        self.rollouts = self.plain.generate(self.requests, self.sampling)
        num_tokens = sum(len(r.token_ids) for r in self.rollouts)
        return {
            "kl": per_token_kl(self.view.model, self.start, self.rollouts, self.sampling.temperature),
            "entropy_estimate": -sum(sum(r.logprobs) for r in self.rollouts) / num_tokens,
            "completion_tokens": num_tokens,
        }

    def measure(self, drafter: Drafter) -> dict[str, Any]:
        """Of the policy that was last looked at."""
        if isinstance(drafter, SuffixDrafter):
            self.suffix.weights_changed = True
            return self._engine_figures(self.suffix)
        drafter = duplicate(drafter)
        figures = self._engine_figures(RolloutEngine(self.view, AtlasConfig(lookahead=LOOKAHEAD), drafter))
        head = getattr(drafter, "head", None)
        if head is not None:
            figures["judged"] = self._judged(head)
        return figures

    def _engine_figures(self, engine: RolloutEngine) -> dict[str, Any]:
        self.view.tap({layer for drafter in engine.speculator.drafters.values() for layer in drafter.layers or ()})
        engine.generate(self.requests, self.sampling)
        row = engine.stats.to_dict()
        return {name: row.get(name) for name in ("tokens_per_decode_step", "acceptance_by_depth")}

    def _judged(self, head: torch.nn.Module) -> dict[str, Any]:
        """Every place of the rollouts as the start of a draft: coupled and arg-max acceptance beside 1 - TV."""
        replayed = replay(self.view, head.layers, self.rollouts, [request.seed for request in self.requests])
        windows = replayed.tiles(EVALUATION_STARTS + LOOKAHEAD, LOOKAHEAD)
        return measure(head, windows, PolicyEnds.of(self.view.model), self.sampling, depth=LOOKAHEAD).to_dict()


def duplicate(drafter: Drafter) -> Drafter:
    """A neural drafter with a copy of its head, and of its draft vocabulary where it has one."""
    twin = type(drafter)(copy.deepcopy(drafter.head))
    if getattr(drafter, "vocabulary", None) is not None:
        twin.vocabulary = copy.deepcopy(drafter.vocabulary)
    return twin


def speeds(
    policy: PreTrainedModel,
    drafters: dict[str, Drafter | None],
    prompts: Sequence[tuple[int, ...]],
    sampling: SamplingParams,
    *,
    sizes: Sequence[int] = (1, 8, 64),
    repeats: int = 3,
) -> dict[str, dict[str, list[float]]]:
    """Tokens per second by drafter (None: plain decoding) and batch size, the controller on; arms take turns.

    A round before the first is not counted: the controller gets to know its drafter in it.
    """
    engines = {}
    for name, drafter in drafters.items():
        view = PolicyView(policy)
        config = AtlasConfig(speculate=drafter is not None)
        engines[name] = RolloutEngine(view, config, None if drafter is None else duplicate(drafter))
    figures = {name: {str(size): [] for size in sizes} for name in drafters}
    for repeat in range(repeats + 1):
        for size in sizes:
            requests = [
                RolloutRequest(prompt_ids=prompts[i % len(prompts)], seed=PROBE_SEED * repeat + i, max_new_tokens=limit)
                for i, limit in enumerate(sampling.max_lens(size))
            ]
            for name, engine in engines.items():
                engine.generate(requests, sampling)
                if repeat:
                    figures[name][str(size)].append(engine.stats.to_dict()["tokens_per_s"])
    return figures
