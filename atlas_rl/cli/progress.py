"""One short line per logged step above the Trainer's progress bar, instead of the whole dictionary of metrics."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

SHOWN = (
    ("reward", "reward", "{:.3f}"),
    ("eval_reward", "eval reward", "{:.3f}"),
    ("completions/mean_length", "tokens", "{:.0f}"),
    ("rollout/tokens_per_s", "rollout tok/s", "{:,.0f}"),
    ("rollout/speedup_estimate", "speed-up", "{:.2f}x"),
    ("rollout/tokens_per_decode_step", "tokens/decode step", "{:.2f}"),
)
"""(metric, label, format); a metric that a step does not log is left out."""


class CompactProgress(ProgressCallback):
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        figures = [f"{label} {form.format(logs[name])}" for name, label, form in SHOWN if name in logs]
        if figures:
            self.training_bar.write(f"step {state.global_step:>4}  " + "  ".join(figures))
