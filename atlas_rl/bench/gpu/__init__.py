"""Check and measure the accelerator path on one GPU: kernels, captured decode steps, speculation, training, memory.

    python -m atlas_rl.bench.gpu                          # everything, in less than 10 minutes
    python -m atlas_rl.bench.gpu --only machine,kernels   # some sections
    python -m atlas_rl.bench.gpu --dry-run                # the same code on the CPU at tiny sizes: figures mean nothing

Needs torch >= 2.11, triton >= 3.6, transformers >= 5.17 and numpy; with trl it also runs the quickstart. Figures go to
atlas_rl/bench/results/gpu_<device>.json (or to --out), rewritten after every section; a table of targets is printed at the end.
A part that fails is recorded with the reason and the rest goes on; what no longer fits the time is skipped and says so.
Exit codes: 0 ran (whatever the verdicts), 1 something raised, 2 no GPU, or bad arguments.

Sections, and what must hold on an H100:
  machine   copy, read and matrix rates of this very device, which the other sections compare with
  kernels   every kernel against its torch twin at production shapes; paged attention at 16, 32 and 64 rows of 4096 tokens
            reads KV at >= 75 % of copy bandwidth, coupled_sample over 64 rows of 151,936 logits at >= 70 %
  decode    a Qwen3-1.7B of random bf16 weights: plain decode at >= 60 % of the weight-bandwidth limit at 1 row (goal 75 %), host
            time < 10 % of a step, verifying 4 tokens <= 1.15 x the time of 1 at up to 16 rows, >= 3 x transformers'
            continuous batching at 64 rows
  policy    the shipped small policy in bf16 and float32: atlas >= 1.5 x atlas_plain on the draining workload and >= 0.97 x
            everywhere; completions with speculation on and off, captured and not, differ by float ties only
  training  policy gradient steps, weights changing in place: log-probs that rollouts report are those of the weights just
            updated, and the reward rises; with trl, 20 steps of configs/quickstart.yaml
  memory    100 short rollouts with updates between them: no growth; KV memory given back
"""
