"""One process of examples/deepspeed_loop.py; appends what it saw to `<seen>.<rank>` (see distributed/test_deepspeed_loop.py).

torchrun … deepspeed_loop_worker.py SEEN KILLED_AT ARGUMENTS…

KILLED_AT is the step after whose rollout rank 1 dies, or -1; ARGUMENTS are the example's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import torch
from deepspeed import zero
from deepspeed.runtime.rollout import RolloutRequest

from atlas_rl.deepspeed import AtlasRollout


class Watched(AtlasRollout):
    def generate(self, request, sampling):
        step, rank = self.engine.global_steps, torch.distributed.get_rank()
        if (
            step == 1
        ):  # as for a reference's log-probs: no backward follows, before which ZeRO-3 would let go of all weights
            with torch.no_grad():
                self.engine(request.prompt_ids, attention_mask=request.prompt_attention_mask)
        batch = super().generate(request, sampling)
        drafters = {name: counts["proposed"] for name, counts in self.stats.to_dict().get("drafters", {}).items()}
        tell({"step": step, "completions": completions(batch), "drafters": drafters})
        if (step, rank) == (KILLED_AT, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    def shutdown(self):
        some = torch.tensor([[5, 6, 7], [8, 9, 10]])[: 2 if torch.distributed.get_rank() == 0 else 0]
        batch = super().generate(RolloutRequest(some, torch.ones_like(some)), SAMPLING(max_new_tokens=4))
        refused = refusal(lambda: super(Watched, self).generate(padded_wrongly_on_rank_1(), SAMPLING(max_new_tokens=4)))
        hashed = hashlib.sha256()
        for parameter in self.engine.module.parameters():
            with zero.GatheredParameters([parameter]):
                hashed.update(parameter.detach().numpy().tobytes())
        gathers = self.attachment.policy.local.num_gathers
        tell(
            {
                "weights": hashed.hexdigest(),
                "gathers": gathers,
                "uneven": list(batch.input_ids.shape),
                "refused": refused,
            }
        )
        super().shutdown()


def padded_wrongly_on_rank_1() -> RolloutRequest:
    mask = torch.tensor([[1, 1 - torch.distributed.get_rank()]])
    return RolloutRequest(torch.tensor([[5, 6]]), mask)


def refusal(work) -> str:
    try:
        work()
    except ValueError as error:
        return str(error)
    return "none"


def completions(batch) -> list[list[int]]:
    kept = batch.attention_mask.bool() & (torch.arange(batch.seq_len) >= batch.response_start_idx[:, None])
    return [ids[k].tolist() for ids, k in zip(batch.input_ids, kept)]


def tell(seen: dict) -> None:
    with open(f"{SEEN}.{torch.distributed.get_rank()}", "a") as file:
        file.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    SEEN, KILLED_AT = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    path = Path(__file__).parent.parent / "examples" / "deepspeed_loop.py"
    spec = importlib.util.spec_from_file_location("deepspeed_loop", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    SAMPLING, example.AtlasRollout = example.SamplingConfig, Watched
    sys.argv = [str(path), *sys.argv[3:]]
    example.main()
