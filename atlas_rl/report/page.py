"""The page: one HTML file that needs nothing else, its charts also as PNG beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from atlas_rl import __version__
from atlas_rl.report.drafters import acceptance, parts, retraining
from atlas_rl.report.drawing import Chart, NoFigure, css_colors, svgs_of, write_png
from atlas_rl.report.learning import lengths, reward
from atlas_rl.report.run import Run
from atlas_rl.report.speed import idle, parts_of_steps, speed, within_rollouts
from atlas_rl.telemetry.summary import RunSummary

CHARTS: dict[str, Callable[[Run], Chart]] = {
    "Speed of the rollouts": speed,
    "Where the time goes": parts_of_steps,
    "Inside a rollout": within_rollouts,
    "What each part is worth": parts,
    "How often drafts are right": acceptance,
    "Retraining the adaptive drafter": retraining,
    "Reward": reward,
    "Lengths of completions": lengths,
    "Ranks that wait": idle,
}
WORDS = {
    "completion": "What the policy writes as an answer to a prompt, token by token (a token is a word or a part of one).",
    "rollout": "Making the completions that a training step learns from: one call of generate.",
    "training step": "Make a rollout, score it with the reward, change the policy's weights (a policy update).",
    "decode step": "One forward of the policy over all completions that are not finished. Without drafts it gives each of them "
    "one token, with drafts one or more.",
    "draft, drafter": "A drafter guesses the tokens that come next; the policy checks the guesses in one forward and keeps those "
    "that are its own choice. Drafts can make a rollout faster or slower, never change what it says.",
    "suffix": "The drafter that looks up what followed the same words before, in this and in earlier completions.",
    "static": "A small network, trained beforehand (or early in the run) to guess for the policy, and then left as it is.",
    "adaptive": "A small network as well (“recurrent” in the log), retrained while the policy changes, so that it keeps up.",
    "plain decoding, no drafts": "One token per completion and forward. Speed-ups are over this, done by the same engine.",
    "estimate": "What plain decoding would have taken is not run, but worked out from step times measured in the same rollouts. "
    "The command atlas-rl bench runs both.",
    "rank": "One of several processes that train together.",
}


def write_report(run: Run, out: Path, tell: Callable[[str], None] = lambda line: None) -> list[Path]:
    """The page and its pictures, in a folder; returns their paths, the page first.

    Raises:
        ValueError: matplotlib is not installed, or the folder cannot be written to.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("the report's charts need matplotlib: pip install 'atlas-rl[plots]'")
    html, charts = make_page(run, tell)
    page, pictures = out / "index.html", [out / f"{chart.key}.png" for chart in charts]
    try:
        out.mkdir(parents=True, exist_ok=True)
        page.write_text(html, encoding="utf-8")
        for chart, picture in zip(charts, pictures):
            tell(f"writing {picture.name}")
            write_png(chart, picture)
    except OSError as error:
        raise ValueError(f"the report cannot be written: {error}. Name another folder with --out") from None
    return [page, *pictures]


def make_page(run: Run, tell: Callable[[str], None] = lambda line: None) -> tuple[str, list[Chart]]:
    """The HTML, and the charts that it shows."""
    figures, left_out = [], {}
    for title, make in CHARTS.items():
        tell(f"drawing: {title}")
        try:
            chart = make(run)
        except NoFigure as reason:
            left_out[title] = str(reason)
            continue
        figures.append((title, chart, {screen: Markup(svg) for screen, svg in svgs_of(chart).items()}))
    environment = Environment(
        loader=PackageLoader("atlas_rl.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = environment.get_template("page.html").render(
        name=run.path.resolve().parent.name,
        path=str(run.path),
        num_rows=run.num_rows,
        version=__version__,
        sentence=in_a_sentence(run),
        cards=list(cards(run.summary)),
        figures=figures,
        left_out=left_out,
        table=list(run.summary.rows()),
        words=WORDS,
        light=Markup(css_colors(0)),
        dark=Markup(css_colors(1)),
    )
    return html, [chart for _, chart, _ in figures]


def in_a_sentence(run: Run) -> str:
    summary, steps = run.summary, len(run.steps)
    made = f"{summary.completions:,} completions ({summary.tokens:,} tokens)"
    where = f"In {steps:,} training steps Atlas-RL made" if steps else "Atlas-RL made"
    text = f"{where} {made} in {_duration(summary.rollout_seconds)} of rollouts"
    if summary.speedup is not None:
        text += f", {summary.speedup:.2f} times as fast as the same engine is without drafts (an estimate)"
    if summary.reward_first is not None:
        change = summary.reward_last - summary.reward_first
        verb = "stayed about the same, at" if abs(change) < 0.01 * abs(summary.reward_first) else None
        verb = verb or ("rose from" if change > 0 else "fell from")
        ends = "" if verb.startswith("stayed") else f"{summary.reward_first:.3f} to "
        text += f"; the mean reward {verb} {ends}{summary.reward_last:.3f}"
    return text + "."


def cards(summary: RunSummary) -> Iterator[tuple[str, str, str]]:
    """Figure, name, and what it says."""
    if summary.tokens_per_s is not None:
        yield f"{summary.tokens_per_s:,.0f}", "tokens per second", "of rollouts, all their costs counted"
    if summary.speedup is not None:
        yield f"{summary.speedup:.2f}×", "speed-up", "over the same engine without drafts, estimated"
    if summary.tokens_per_decode_step is not None:
        yield f"{summary.tokens_per_decode_step:.2f}", "tokens per decode step", "and completion; 1 without drafts"
    if summary.acceptance is not None:
        yield f"{summary.acceptance:.0%}", "of drafts accepted", "draft tokens that were the policy's own"
    if summary.rollout_share is not None:
        yield f"{summary.rollout_share:.0%}", "of a training step", "goes into rollouts"
    if summary.reward_first is not None:
        change = f"{summary.reward_first:.2f} → {summary.reward_last:.2f}"
        yield change, "mean reward", "first → last fifth of the run"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
