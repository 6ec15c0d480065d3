"""Section `decode`: decode steps of a 1.7-billion-parameter model, against what the device's memory allows and transformers."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from atlas_rl.bench.gpu.section import Section
from atlas_rl.bench.hf_arms import HFContinuousBatching, HFGenerate
from atlas_rl.bench.judging import summarize
from atlas_rl.bench.workload import SAMPLING, Batch
from atlas_rl.bench.wrong_drafters import WrongDrafter
from atlas_rl.config import AtlasConfig, EngineConfig
from atlas_rl.drafters.base import DraftRow
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.kv_cache import KVCache
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.step_program import StepKey

PLAIN = AtlasConfig(speculate=False)
EAGER = AtlasConfig(speculate=False, engine=EngineConfig(capture_steps=False))
VERIFY = AtlasConfig(lookahead=3, retrain="never")
LIMIT_TARGET, HOST_TARGET, VERIFY_TARGET, BATCHING_TARGET = 0.60, 0.10, 1.15, 3.0


class ThreeTokens(WrongDrafter):
    """Random drafts of full length: what they cost, and nothing that they gain."""

    name = "three"

    def propose_one(self, row: DraftRow, max_len: int) -> list[int]:
        return [self.rng.randrange(self.vocab_size) for _ in range(max_len)]


class Steps:
    """Listens to an engine's decode steps: seconds from one to the next, and those on the device."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.seconds: list[float] = []
        self.on_device: list[float] = []
        self.known = 0.0
        self.record = engine.step_cost.record
        engine.step_cost.record = self.listen

    def listen(self, num_tokens: int, num_cached: int, seconds: float) -> None:
        self.record(num_tokens, num_cached, seconds)
        self.seconds.append(seconds)
        total = self.engine.stats.device_seconds
        self.on_device.append(total - self.known)
        self.known = total

    def run(self, batch: Batch) -> dict[str, Any]:
        """A rollout's median step, but for its first two: these may be captured, and wait for the prefill."""
        self.seconds, self.on_device, self.known = [], [], 0.0
        start = time.perf_counter()
        self.engine.generate(batch.requests(), SAMPLING)
        total = time.perf_counter() - start
        step, device = median(self.seconds[1:]), median(self.on_device[1:])
        return {
            "step_s": step,
            "device_s": device,
            "host_share": max(0.0, 1 - device / step) if device else None,
            "tokens_per_s": batch.num_tokens / total,
            "steps": len(self.seconds),
        }


def run(section: Section) -> None:
    model = section.part("model", lambda: Model(section), needs=20)
    if model is not None:
        section.results["model"] = model.describe()
        measure(section, model)


def measure(section: Section, model: Model) -> None:
    plan = section.plan
    for num_rows in plan.decode_rows:
        row = section.part(f"plain, {num_rows} rows", lambda n=num_rows: model.plain(n), needs=6)
        if num_rows == 1:
            section.judge(
                "plain decode at 1 row: share of the weight-bandwidth limit", row and row["share"], LIMIT_TARGET
            )
        section.judge(
            f"plain decode at {num_rows} rows: host share", row and row["host_share"], HOST_TARGET, at_least=False
        )
    for num_rows in plan.verify_rows:
        row = section.part(f"verify, {num_rows} rows", lambda n=num_rows: model.verify(n), needs=8)
        name = f"verifying 3 drafts over plain steps, {num_rows} rows"
        section.judge(name, row and row["ratio"]["median"], VERIFY_TARGET, at_least=False)
    num_rows = max(plan.decode_rows)
    for n in plan.decode_rows:
        section.part(f"uncaptured, {n} rows", lambda n=n: model.uncaptured(n), needs=6)
    section.part(f"generate, {num_rows} rows", lambda: model.generate(num_rows), needs=12)
    # the last: it leaves its attention in the policy
    row = section.part(f"continuous batching, {num_rows} rows", lambda: model.against_batching(num_rows), needs=20)
    section.judge(f"over continuous batching, {num_rows} rows", row and row["ratio"]["median"], BATCHING_TARGET)


class Model:
    """A policy of random weights, and engines over one view of it."""

    def __init__(self, section: Section) -> None:
        self.section, self.plan, self.machine = section, section.plan, section.machine
        self.policy = random_policy(section.plan.model, self.machine.device)
        self.view = PolicyView(self.policy)
        self.graphs = self.machine.graphs
        self.engine = RolloutEngine(self.view, PLAIN, graphs=self.graphs)
        self.steps = Steps(self.engine)

    def describe(self) -> dict[str, Any]:
        """What decoding it reads, and whether it runs as it should: in fused layers, by captured steps."""
        return {
            "parameters": sum(p.numel() for p in self.policy.parameters()),
            "weight_bytes_per_step": self.weight_bytes,
            "fused": self.view.fused is not None,
            "captures": self.engine.captured is not None,
        }

    @property
    def weight_bytes(self) -> int:
        """Of all that a step multiplies with: layers and the output head; of the embedding it reads a row per token."""
        head = self.policy.get_output_embeddings().weight
        layers = [
            p for p in self.policy.parameters() if p is not head and p is not self.policy.get_input_embeddings().weight
        ]
        return head.nbytes + sum(p.nbytes for p in layers)

    def batch(self, num_rows: int, new_tokens: int | None = None) -> Batch:
        rng = np.random.default_rng(num_rows)
        prompts = rng.integers(2, self.policy.config.vocab_size, (num_rows, self.plan.prompt_tokens)).tolist()
        lens = [new_tokens or self.plan.new_tokens] * num_rows
        return Batch(prompts=[tuple(prompt) for prompt in prompts], seeds=list(range(num_rows)), lens=lens)

    def plain(self, num_rows: int) -> dict[str, Any]:
        """Captured steps. KV is a small part of what is read here and is left out of the limit, to our disadvantage."""
        batch = self.batch(num_rows)
        self.steps.run(batch)  # kernels are compiled, routes measured
        row = self.steps.run(batch)
        limit = self.weight_bytes / self.section.copy_rate()
        failure = self.engine.captured and self.engine.captured.failure
        return row | {"limit_s": limit, "share": limit / row["step_s"], "not_captured": failure}

    def uncaptured(self, num_rows: int) -> dict[str, Any]:
        steps = Steps(RolloutEngine(self.view, EAGER))
        batch = self.batch(num_rows, max(4, self.plan.new_tokens // 4))
        steps.run(batch)
        return steps.run(batch)

    def verify(self, num_rows: int) -> dict[str, Any]:
        """Steps on the device, with drafts of 3 tokens by the host (which captures the next power of two), over plain ones, in
        turn. And steps over padding with just 3, which attend to nothing."""
        if self.engine.captured is None or self.engine.captured.failure is not None:
            raise RuntimeError("steps are not captured here, so that the device's own time is not known")
        drafting = Steps(RolloutEngine(self.view, VERIFY, ThreeTokens(self.view.vocab_size), graphs=self.graphs))
        batch = self.batch(num_rows, max(4, self.plan.new_tokens // 2))
        pairs = [(drafting.run(batch), self.steps.run(batch)) for _ in range(1 + self.plan.rounds)][1:]
        rows = {"ratio": summarize([a["device_s"] / b["device_s"] for a, b in pairs]), "padding": None}
        rows["device_s"] = {
            "verify": median(a["device_s"] for a, _ in pairs),
            "plain": median(b["device_s"] for _, b in pairs),
        }
        proposed = sum(drafting.engine.stats.proposed_by_depth)
        return rows | {"padding": self._padding_ratio(num_rows), "proposed": proposed}

    @torch.inference_mode()
    def _padding_ratio(self, num_rows: int) -> float:
        captured = self.engine.captured
        captured.wake(KVCache(self.view.kv_shape(16), 1, self.view.device), SAMPLING, num_rows, self.plan.prompt_tokens)
        try:
            keys = [StepKey(num_rows, num_drafts) for num_drafts in (3, 0)]
            times = [[median(captured.measure(key, 20)) for key in keys] for _ in range(1 + self.plan.rounds)][1:]
        finally:
            captured.forget()
        return median(verify / plain for verify, plain in times)

    def against_batching(self, num_rows: int) -> dict[str, Any]:
        """Tokens per second over transformers' continuous batching, whose start-up is not counted. Ours run before and after it,
        when its thread is gone."""
        batch, arm = self.batch(num_rows), HFContinuousBatching(self.policy)

        def ours() -> list[float]:
            return [
                _seconds(lambda: self.engine.generate(batch.requests(), SAMPLING)) for _ in range(1 + self.plan.rounds)
            ]

        before = ours()[1:]
        with arm.manager(batch) as manager:
            theirs = [_seconds(lambda: arm.make(manager, batch)) for _ in range(1 + self.plan.rounds)]
        after = ours()[1:]
        ratios = [slow / fast for slow in theirs[1:] for fast in before + after]
        seconds = {"ours": before + after, "theirs": theirs[1:]}
        speeds = {name: batch.num_tokens / median(s) for name, s in seconds.items()}
        return {"ratio": summarize(ratios), "tokens_per_s": speeds, "seconds": seconds, "first_round_s": theirs[0]}

    def generate(self, num_rows: int) -> dict[str, Any]:
        arm, batch = HFGenerate(self.policy), self.batch(num_rows, max(4, self.plan.new_tokens // 2))
        arm.run(self.batch(num_rows, 4))
        seconds = _seconds(lambda: arm.run(batch))
        return {"seconds": seconds, "tokens_per_s": batch.num_tokens / seconds}


def random_policy(shape: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """In bf16, made on the device. The initial weights' size leaves logits of about unit variance."""
    torch.manual_seed(0)
    with torch.device(device):
        policy = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    return policy.to(device).eval()


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
