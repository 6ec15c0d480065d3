"""What to expect on many devices: memory per device, and what moves between them at a policy update. Projections, not runs.

  python -m atlas_rl.bench.scale
  python -m atlas_rl.bench.scale --devices 8,64 --device_gib 141 --gb_per_s 50
  python -m atlas_rl.bench.scale --markdown

Sizes are computed from the shapes of three policies in bf16. Unit costs are measured here: the rate of a weight gather, the rate
of averaging a drafter's gradients and the time of one meeting; over NCCL with one process per GPU where there are several, else
over gloo with 2 to 4 processes, as many as there are cores. Times are these costs, extrapolated; `--gb_per_s` puts the rate of
your network in their place.

Memory of a device: weights, gradients and Adam's state as the trainer shards them, Atlas' copy of the weights (ZeRO-3, FSDP2: all
of them; LoRA: the adapted matrices, merged), its drafter with optimizer. What is left goes to the KV cache of a rollout (rows
that find no room in it wait), and to activations while the trainer trains, when the KV cache is given back.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from atlas_rl.ranks import Ranks

SHAPES = {  # Qwen3: hidden size, MLP size, layers, heads, whether input and output embeddings are one
    "1.7B": (2048, 6144, 28, 16, True),
    "8B": (4096, 12288, 36, 32, False),
    "32B": (5120, 25600, 64, 64, False),
}
KV_HEADS, HEAD_DIM, VOCAB = 8, 128, 151_936
LORA_RANK = 16
MODES = ("zero2", "zero3", "fsdp2", "lora")
MEETINGS_PER_UPDATE = 7
GIB = 2**30


@dataclass(frozen=True)
class Policy:
    """Numbers of parameters."""

    total: int
    adapted: int
    """Matrices of the layers, which LoRA adapts."""
    adapters: int
    drafter: int
    kv_bytes_per_token: int

    @classmethod
    def of(cls, name: str) -> Policy:
        hidden, mlp, layers, heads, tied = SHAPES[name]
        matrices = [(hidden, heads * HEAD_DIM)] * 2 + [(hidden, KV_HEADS * HEAD_DIM)] * 2 + [(hidden, mlp)] * 3
        adapted = layers * sum(a * b for a, b in matrices)
        norms = layers * (2 * hidden + 2 * HEAD_DIM) + hidden
        from atlas_rl.drafters.recurrent_head import RecurrentHead

        with torch.device("meta"):
            head = RecurrentHead(hidden_size=hidden, layers=(layers // 4, layers // 2))
        return cls(
            total=adapted + norms + VOCAB * hidden * (1 if tied else 2),
            adapted=adapted,
            adapters=layers * LORA_RANK * sum(a + b for a, b in matrices),
            drafter=sum(p.numel() for p in head.parameters()),
            kv_bytes_per_token=2 * layers * KV_HEADS * HEAD_DIM * 2,
        )


def memory(policy: Policy, mode: str, devices: int) -> dict[str, float]:
    """Bytes on one device. Weights, copies and gradients are bf16, but FSDP2 keeps float32 shards; under DeepSpeed Adam keeps 12
    bytes per parameter (a float32 master and two moments)."""
    trained = policy.adapters if mode == "lora" else policy.total
    if mode == "fsdp2":
        weights, training = 4 * policy.total / devices, (4 + 8) * policy.total / devices
    else:
        weights = 2 * policy.total / (devices if mode == "zero3" else 1)
        training = (2 + 12) * trained / devices
    copy = {"zero2": 0, "zero3": 2 * policy.total, "fsdp2": 2 * policy.total, "lora": 2 * policy.adapted}[mode]
    parts = {"weights": weights, "training": training, "copy": copy, "drafter": 16 * policy.drafter}
    return parts | {"total": sum(parts.values())}


def traffic(policy: Policy, mode: str, devices: int) -> dict[str, float]:
    """Bytes that one device receives: weights per policy update (FSDP2's shards are float32), gradients per retraining step."""
    width = {"zero3": 2, "fsdp2": 4}.get(mode, 0)
    others = (devices - 1) / devices
    return {"weights": others * width * policy.total, "gradients": 2 * others * 4 * policy.drafter}


# ---- unit costs, measured


def measure(num_processes: int, backend: str, megabytes: int) -> dict[str, float]:
    """Bytes per second that a rank receives, and seconds of a meeting."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (num_processes, backend, megabytes, folder)
        torch.multiprocessing.spawn(_measure_rank, args=arguments, nprocs=num_processes)
        return torch.load(Path(folder) / "costs.pt")


def _measure_rank(rank: int, num_processes: int, backend: str, megabytes: int, folder: str) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # newer torch has another name for this gather
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_processes)
    ranks = Ranks.of_run()
    shard = torch.ones(megabytes * 2**20 // (4 * num_processes), device=ranks.devices[0])
    full = torch.empty(shard.numel() * num_processes, device=ranks.devices[0])
    others = (num_processes - 1) / num_processes
    costs = {
        "gather": others * full.nbytes / _seconds(lambda: dist.all_gather_into_tensor(full, shard)),
        "average": 2 * others * full.nbytes / _seconds(lambda: dist.all_reduce(full)),
        "meeting": _seconds(lambda: ranks.meet("a meeting", {"lens": [0] * 64}), repeats=20),
    }
    if rank == 0:
        torch.save(costs, Path(folder) / "costs.pt")
    dist.barrier()
    dist.destroy_process_group()


def _seconds(work, repeats: int = 5) -> float:
    """Median, after one to warm up, until the device has done it."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return median(taken[1:])


def meeting_seconds(measured: float, num_processes: int, devices: int) -> float:
    """At most: a ring passes every message on N - 1 times."""
    return measured / (num_processes - 1) * (devices - 1)


# ---- the tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="8,64,512", help="default: 8,64,512")
    parser.add_argument("--rows", type=int, default=64, help="sequences that decode at once on a device (default 64)")
    parser.add_argument("--tokens", type=int, default=2048, help="of each, prompt included (default 2048)")
    parser.add_argument("--device_gib", type=float, default=80, help="memory of a device (default 80)")
    parser.add_argument(
        "--gb_per_s", type=float, help="a device's share of the network, in place of the rate measured here"
    )
    parser.add_argument("--megabytes", type=int, default=256, help="of a measured transfer (default 256)")
    parser.add_argument("--markdown", action="store_true", help="print tables for a README")
    args = parser.parse_args()
    num_gpus = torch.cuda.device_count()
    backend, most = ("nccl", num_gpus) if num_gpus > 1 else ("gloo", max(2, min(4, os.cpu_count() or 2)))
    costs = {n: measure(n, backend, args.megabytes) for n in range(2, most + 1)}
    for n, cost in costs.items():
        rates = f"gather {cost['gather'] / 1e9:.2f} GB/s, average {cost['average'] / 1e9:.2f} GB/s"
        print(f"{n} processes over {backend}: {rates}, a meeting {1e3 * cost['meeting']:.2f} ms")
    gather, average = (args.gb_per_s * 1e9 if args.gb_per_s else costs[most][name] for name in ("gather", "average"))
    counts = [int(number) for number in args.devices.split(",")]
    on = f"on {' / '.join(map(str, counts))}"
    print(f"\nProjected at {gather / 1e9:.2f} GB/s per device (gather); * is more than {args.device_gib:g} GiB:\n")
    titles = [
        f"GiB per device {on}",
        "of it copy",
        f"KV of {args.rows} x {args.tokens}",
        f"GB gathered {on}",
        "seconds",
    ]
    rows = [["policy", "mode", *titles]]
    for name in SHAPES:
        policy = Policy.of(name)
        kv = policy.kv_bytes_per_token * args.rows * args.tokens
        for mode in MODES:
            held = [memory(policy, mode, n) for n in counts]
            moved = [traffic(policy, mode, n)["weights"] for n in counts]
            totals = [f"{h['total'] / GIB:.1f}{'*' * (h['total'] > args.device_gib * GIB)}" for h in held]
            gathers = [f"{m / 1e9:.1f}" for m in moved] if moved[0] else ["none"]
            seconds = [f"{m / gather:.1f}" for m in moved] if moved[0] else ["0"]
            sizes = [" / ".join(totals), f"{held[0]['copy'] / GIB:.1f}", f"{kv / GIB:.1f}"]
            rows.append([name, mode, *sizes, " / ".join(gathers), " / ".join(seconds)])
    print_table(rows, args.markdown)
    for name in SHAPES:
        sent = traffic(Policy.of(name), "zero2", counts[-1])["gradients"]
        print(f"a retraining step of the {name} policy's drafter: {sent / 1e6:.0f} MB, {sent / average:.2f} s")
    moved = args.rows * args.tokens * 12
    print(f"groups that change devices, at most: {moved / 1e6:.1f} MB per device, {moved / gather:.2f} s")
    for devices in counts:
        seconds = MEETINGS_PER_UPDATE * meeting_seconds(costs[most]["meeting"], most, devices)
        print(f"{MEETINGS_PER_UPDATE} meetings of {devices} devices, at most: {seconds:.3f} s")


def print_table(rows: list[list], markdown: bool) -> None:
    if markdown:
        rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [str(cell).rjust(width) for cell, width in zip(row, widths)]
        print(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells))
    print()


if __name__ == "__main__":
    main()
