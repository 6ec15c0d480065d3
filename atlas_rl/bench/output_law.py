"""The output law at full size: the same completions with every drafter, drafters switched at every step, batch order, batch size
and memory.

    python -m atlas_rl.bench.output_law                                    # a tiny random model in float64: no difference
    python -m atlas_rl.bench.output_law --model shipped                    # the shipped policy on its own prompts, likewise
    python -m atlas_rl.bench.output_law --model shipped --dtype float32    # on packed weights: float ties only
    python -m atlas_rl.bench.output_law --captured                         # by the steps that a GPU captures, called one by one

In float32 a first difference has to be a float tie: two perturbed scores within 1e-4 of each other. Everything after it differs
for that reason, so only first differences are judged; their rate is printed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from atlas_kernels import gumbel_noise, row_keys
from atlas_rl.bench.workload import load_policy, shipped_prompts
from atlas_rl.bench.wrong_drafters import AdversarialDrafter, RandomDrafter
from atlas_rl.config import AtlasConfig, EngineConfig
from atlas_rl.drafters.base import Drafter
from atlas_rl.drafters.draft_model import DraftModelDrafter
from atlas_rl.drafters.eagle import EagleDrafter
from atlas_rl.drafters.eagle_head import EagleHead, default_layers
from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.drafters.recurrent_head import RecurrentHead
from atlas_rl.drafters.suffix import SuffixDrafter
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.graphs import EagerGraphs, GraphBackend
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import Rollout, RolloutRequest, SamplingParams

TIE_MARGIN = {torch.float64: 0.0, torch.float32: 1e-4}


@dataclass(slots=True)
class Difference:
    """The first place where two runs of one completion part."""

    request: RolloutRequest
    position: int
    tokens: tuple[int, int]
    gap: float
    """Between the two tokens' perturbed scores, in a teacher-forced forward of the original model."""


@dataclass(slots=True)
class LawReport:
    variant: str
    num_tokens: int = 0
    differences: list[Difference] = field(default_factory=list)
    tokens_per_decode_step: float = 1.0
    preemptions: int = 0
    arms: int = 0
    """Drafters, and combinations of them, that were asked."""

    def violations(self, dtype: torch.dtype) -> list[Difference]:
        """Differences that no float tie explains."""
        return [d for d in self.differences if d.gap > TIE_MARGIN[dtype] or TIE_MARGIN[dtype] == 0]


def check_output_law(
    model: PreTrainedModel, requests: list[RolloutRequest], sampling: SamplingParams, graphs: GraphBackend | None = None
) -> Iterator[LawReport]:
    """Run every variant against plain decoding in one batch; a report per variant. `graphs`: variants run on captured steps."""
    view = PolicyView(model)
    plain = RolloutEngine(view, AtlasConfig(speculate=False)).generate(requests, sampling)
    for name, config, drafters, order in _variants(view, requests, plain):
        engine = RolloutEngine(view, config, drafters, graphs=graphs)
        if len(drafters) > 1:
            engine.controller.choose = RandomArms(drafters, engine.speculator.alone)
        rollouts = engine.generate([requests[i] for i in order], sampling)
        by_request = dict(zip(order, rollouts, strict=True))
        report = LawReport(name, preemptions=engine.stats.preemptions, arms=len(engine.stats.arms))
        report.tokens_per_decode_step = engine.stats.completion_tokens / engine.stats.row_steps
        assert not engine.controller.benched, f"{name}: benched were {engine.controller.benched}"
        assert not drafters or engine.stats.drafters or config.lookahead is None, f"{name}: nothing was drafted"
        for index, request in enumerate(requests):
            expected, got = plain[index].token_ids, by_request[index].token_ids
            report.num_tokens += len(expected)
            if got != expected:
                report.differences.append(first_difference(model, request, sampling, expected, got))
        yield report


def _variants(
    view: PolicyView, requests: list[RolloutRequest], plain: list[Rollout]
) -> Iterator[tuple[str, AtlasConfig, list[Drafter], list[int]]]:
    answers = {(r.prompt_ids, r.seed): rollout.token_ids for r, rollout in zip(requests, plain, strict=True)}
    order = list(range(len(requests)))
    shuffled = random.Random(1).sample(order, len(order))
    vocab_size, auto, fixed = view.vocab_size, AtlasConfig(), AtlasConfig(lookahead=4)

    def adversary() -> AdversarialDrafter:
        return AdversarialDrafter(vocab_size, answers)

    batch_of_7 = EngineConfig(max_num_seqs=7)
    yield "plain, other batch order", AtlasConfig(speculate=False), [], shuffled
    yield "plain, batch of 7", replace(auto, speculate=False, engine=batch_of_7), [], order
    yield "suffix, automatic lookahead", auto, [SuffixDrafter()], order
    yield "suffix, lookahead 4", fixed, [SuffixDrafter()], order
    yield "random, lookahead 4", fixed, [RandomDrafter(vocab_size)], order
    yield "adversarial, lookahead 4", fixed, [adversary()], order
    yield "adversarial, other order, batch of 7", replace(fixed, engine=batch_of_7), [adversary()], shuffled
    longest = max(len(r.prompt_ids) + r.max_new_tokens for r in requests)
    shape = view.kv_shape(block_size=4)
    num_blocks = -(-longest // 4) * min(4, len(requests)) - 1  # too few for the batch: sequences are preempted
    tight = EngineConfig(block_size=4, kv_memory_gib=num_blocks * shape.block_bytes / 2**30)
    yield "adversarial, forced preemption", replace(fixed, engine=tight), [adversary()], order
    for drafter in neural_drafters(view):
        yield f"{drafter.name}, lookahead 4", fixed, [drafter], order
        yield f"{drafter.name}, automatic lookahead", auto, [drafter], order
    for name, config, batch_order in (
        ("switching, lookahead 4", fixed, order),
        ("switching, automatic lookahead", auto, order),
        ("switching, other order, batch of 7", replace(fixed, engine=batch_of_7), shuffled),
        ("switching, forced preemption", replace(fixed, engine=tight), order),
    ):
        yield name, config, [SuffixDrafter(), adversary(), *neural_drafters(view)], batch_order


def neural_drafters(view: PolicyView) -> list[Drafter]:
    """One of each kind: heads of random weights, and a draft model that equals the policy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = RecurrentHead.for_policy(view)
        eagle = EagleHead.for_policy(view.model.config, default_layers(view.num_layers))
    static = RecurrentDrafter(copy.deepcopy(head), name="static")
    return [RecurrentDrafter(head), static, EagleDrafter(eagle), DraftModelDrafter(copy.deepcopy(view.model))]


class RandomArms:
    """In the place of a controller's `choose`: another drafter at each step, two of them (but for those that draft alone), or
    none."""

    def __init__(self, drafters: Sequence[Drafter], alone: Collection[str]) -> None:
        names = [drafter.name for drafter in drafters]
        pairs = itertools.combinations([name for name in names if name not in alone], 2)
        self.arms = [(), *((name,) for name in names), *pairs]
        self.rng = random.Random(0)

    def __call__(self, num_rows: int, num_cached: int = 0) -> tuple[str, ...]:
        return self.rng.choice(self.arms)


def first_difference(
    model: PreTrainedModel, request: RolloutRequest, sampling: SamplingParams, expected: list[int], got: list[int]
) -> Difference:
    position = next((i for i, (a, b) in enumerate(zip(expected, got)) if a != b), min(len(expected), len(got)))
    assert position < min(len(expected), len(got)), "one completion is a prefix of the other: lengths went wrong"
    input_ids = torch.tensor([[*request.prompt_ids, *expected[:position]]], device=model.device)
    with torch.no_grad():
        logits_V = model(input_ids).logits[0, -1]
    keys_21 = row_keys(np.array([request.seed]), np.array([position]), logits_V.device)
    noise_V = gumbel_noise(keys_21, len(logits_V), logits_V.dtype)[0]
    scores_V = logits_V / sampling.temperature + noise_V
    first, second = expected[position], got[position]
    return Difference(request, position, (first, second), abs(float(scores_V[first] - scores_V[second])))


def random_requests(
    num_tokens: int, max_new_tokens: int, vocab_size: int, num_samples: int = 8, seed: int = 0
) -> list[RolloutRequest]:
    """Random prompts of 1 to 40 tokens, `num_samples` completions each, enough for `num_tokens` if none ends early."""
    rng = random.Random(seed)
    num_prompts = -(-num_tokens // (max_new_tokens * num_samples))
    prompts = [tuple(rng.choices(range(vocab_size), k=rng.randint(1, 40))) for _ in range(num_prompts)]
    return [
        RolloutRequest(prompt_ids=prompt, seed=rng.getrandbits(63), max_new_tokens=max_new_tokens)
        for prompt in prompts
        for _ in range(num_samples)
    ]


def tiny_model(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random Llama whose distribution is far enough from uniform to have something to draft."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="sampled tokens per variant (default: 100000)")
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    parser.add_argument("--model", help="`shipped`, or the folder of a model; a tiny random Llama if absent")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--captured", action="store_true", help="decode by the steps that are captured on a GPU")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = load_policy(args.model).to(dtype) if args.model else tiny_model(dtype)
    requests = random_requests(args.tokens, args.max_new_tokens, model.config.vocab_size)
    if args.model == "shipped":
        prompts = shipped_prompts(len(requests) // 8)
        requests = [replace(r, prompt_ids=prompts[i // 8]) for i, r in enumerate(requests)]
    failed = False
    graphs = EagerGraphs() if args.captured else None
    for report in check_output_law(model, requests, SamplingParams(max_new_tokens=args.max_new_tokens), graphs):
        violations = report.violations(dtype)
        failed |= bool(violations)
        rate = 1e6 * len(report.differences) / report.num_tokens
        gaps = max((d.gap for d in report.differences), default=0.0)
        print(
            f"{report.variant:40s} {report.num_tokens:7d} tokens  {len(report.differences)} first differences "
            f"({rate:.1f} per million, largest gap {gaps:.1e}), {len(violations)} violations; "
            f"{report.tokens_per_decode_step:.2f} tokens/step, {report.preemptions} preemptions",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
