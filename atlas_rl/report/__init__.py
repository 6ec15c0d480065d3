"""`atlas-rl report`: a training run as one page of charts, made from its `rollouts.jsonl` alone.

`run` reads the log, `speed`, `drafters` and `learning` hold the charts (each draws itself, and says in words what it shows),
`drawing` makes SVG and PNG of them, and `page` puts everything into one HTML file.
"""
