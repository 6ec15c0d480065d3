"""The page of a run, from logs as runs write them: of one step and of thousands, of several ranks, old, cut off, or hostile."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from atlas_rl.cli import main
from atlas_rl.report.page import in_a_sentence, make_page
from atlas_rl.report.run import Series, read_run
from atlas_rl.report.speed import when_ahead

pytest.importorskip("matplotlib")

NEW_FIELDS = ("timeline", "lengths", "speedup_by_part")


def rollout(step: int, rank: int = 0, **figures: object) -> dict:
    wiggle = 1 + 0.1 * (step % 7)
    row = {
        "kind": "rollout",
        "phase": "train",
        "call": 0,
        "step": step,
        "rank": rank,
        "num_prompts": 2,
        "num_completions": 8,
        "completion_tokens": 800,
        "seconds": {
            "prefill": 0.1,
            "draft": 0.2,
            "verify": 0.5 * wiggle,
            "sample": 0.1,
            "retrain": 0.05,
            "total": 1 + wiggle,
        },
        "tokens_per_decode_step": 1.6,
        "acceptance_by_depth": [0.7, 0.5, 0.3],
        "drafters": {
            name: {"steps": 40, "proposed": 200, "accepted": 100 + step % 50, "acceptance": 0.5}
            for name in ("suffix", "static", "recurrent")
        },
        "arms": {"plain": 10, "static": 50, "recurrent+suffix": 40},
        "retrain": {
            "updates": 1,
            "steps": 3,
            "seconds": 0.05,
            "acceptance_before": 2.0,
            "acceptance_after": 2.1,
            "kept": 1,
        },
        "plain_tokens_per_s_estimate": 300.0,
        "speedup_estimate": 800 / 300 / (1 + wiggle),
        "speedup_by_part": {"recurrent": 1.4, "static": 1.3, "suffix": 1.1},
        "lengths": {"min": 10, "p10": 20.0, "p50": 90.0, "p90": 190.0, "max": 256, "mean": 100.0},
        "timeline": {
            "seconds": [0.1, 0.6, 0.9, 1.5],
            "rows": [8, 4, 1, 0],
            "arms": ["plain", "static", "recurrent+suffix", "plain"],
        },
    }
    return row | figures


def step_row(step: int, rank: int = 0, **figures: object) -> dict:
    made = rollout(step - 1, rank)
    row = {
        "kind": "step",
        "phase": "train",
        "step": step,
        "rank": rank,
        "step_seconds": 5.0,
        "seconds": made["seconds"],
    }
    return row | figures


def log_row(step: int, phase: str = "train", **metrics: float) -> dict:
    return {"kind": "log", "phase": phase, "step": step} | metrics


def whole_run(steps: int, ranks: int = 1) -> list[dict]:
    rows = []
    for step in range(steps):
        for rank in range(ranks):
            met = {"rank_idle_s": 0.1 * rank, "expected_idle": {"with": 0.05, "without": 0.2}} if ranks > 1 else {}
            rows += [rollout(step, rank, **met), step_row(step + 1, rank, **met)]
        rows.append(log_row(step + 1, **{"reward": step / steps, "completions/clipped_ratio": 0.125}))
    return rows


def write(folder: Path, rows: list[dict], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def page_of(folder: Path) -> str:
    return make_page(read_run(folder))[0]


class Page(HTMLParser):
    """Checks what every page has to be: one file that loads nothing, whose names are unique and whose references exist."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(html)
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) | set(
            re.findall(r'labelledby="([^"]+)"', html)
        )
        assert references <= set(ids)
        for tag, attributes in self.tags:
            assert tag not in ("script", "img", "iframe", "object", "embed")
            assert not any(name.startswith("on") or name == "src" for name in attributes)
            assert attributes.get("href", "#").startswith(("#", "data:,"))
        assert "http" not in html and "@import" not in html
        assert len(self.of("svg")) == 2 * len(self.of("figure"))
        assert all(attributes["role"] == "img" for attributes in self.of("svg"))
        assert not re.search(r"(?<![a-z])(fill|stroke): #", html), "colours are the page's, light or dark"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def charts(self) -> list[str]:
        return [attributes["id"] for attributes in self.of("section")][:-2]


ALL_BUT_IDLE = ["speed", "seconds", "timeline", "parts", "acceptance", "retraining", "reward", "lengths"]


def test_a_run(tmp_path):
    page = Page(page_of(write(tmp_path / "my run", whole_run(10))))
    assert page.charts == ALL_BUT_IDLE
    assert "my run" in page.text and "In 10 training steps Atlas-RL made 80 completions (8,000 tokens)" in page.text
    assert "From 0.050 in the first fifth of the logged steps to 0.850 in the last" in page.text
    assert "the run had one process" in page.text, "why a chart is left out"
    assert "adaptive alone" in page.text and "1.40×" in page.text
    assert "8 completions started" in page.text and "12.5 % of the last fifth" in page.text


def test_one_step(tmp_path):
    assert Page(page_of(write(tmp_path, whole_run(1)))).charts == ALL_BUT_IDLE


def test_three_ranks(tmp_path):
    folder = write(tmp_path, whole_run(6, ranks=3))
    run = read_run(folder)
    assert run.ranks == [0, 1, 2]
    speed = run.series(lambda rows: float(sum(row["completion_tokens"] for row in rows)))
    assert speed.values == [2400.0] * 6
    page = Page(page_of(folder))
    assert page.charts == [*ALL_BUT_IDLE, "idle"] and "The 3 ranks waited" in page.text


def test_an_old_log_has_fewer_charts(tmp_path):
    rows = [{k: v for k, v in row.items() if k not in NEW_FIELDS} for row in whole_run(5) if row["kind"] != "log"]
    page = Page(page_of(write(tmp_path, rows)))
    assert page.charts == ["speed", "seconds", "acceptance", "retraining", "lengths"]
    assert all(f"{title} (" in page.text for title in ("Inside a rollout", "What each part is worth", "Reward"))


def test_a_run_without_drafts_or_trainer(tmp_path):
    """Of a model on its own: calls take the steps' place."""
    bare = {"drafters": {}, "arms": {}, "phase": "eval"}
    rows = [rollout(0, call=call, **bare) for call in (0, 1, 0)]
    for row in rows:
        for name in (
            "retrain",
            "speedup_by_part",
            "speedup_estimate",
            "plain_tokens_per_s_estimate",
            "acceptance_by_depth",
        ):
            del row[name]
    run = read_run(write(tmp_path, rows))
    assert list(run.rollouts) == [1, 2, 3] and run.unit == "call of generate"
    page = Page(page_of(tmp_path))
    assert page.charts == ["speed", "seconds", "timeline", "lengths"] and "no drafts were made" in page.text


def test_a_resumed_run_and_half_a_line(tmp_path):
    """Steps 3 and 4 were made twice, as the run was killed after a checkpoint at 2, and once more while it wrote."""
    rows = whole_run(4) + [row | {"completion_tokens": 1600} for row in whole_run(4)[6:] if row["kind"] != "log"]
    folder = write(tmp_path, rows, tail='{"kind": "rollout", "phase": "tr')
    run = read_run(folder)
    assert [sum(row["completion_tokens"] for row in made) for made in run.rollouts.values()] == [800, 800, 1600, 1600]
    assert run.summary.tokens == 4800 and len(run.steps) == 4


def test_what_went_wrong_is_not_drawn(tmp_path):
    rows = whole_run(3)
    rows += [rollout(3, fallback="it uses beams", completion_tokens=0), rollout(3, call=1, error="KeyboardInterrupt")]
    run = read_run(write(tmp_path, rows))
    assert list(run.rollouts) == [1, 2, 3] and run.summary.fallbacks == ("it uses beams",)


def test_hostile_words_stay_words(tmp_path):
    name = '<img src=x onerror="alert(1)"> $\\frac{ id="speed" url(#x)'
    rows = whole_run(3)
    for row in rows:
        if row["kind"] == "rollout":
            row["drafters"][name] = row["drafters"].pop("suffix")
            row["speedup_by_part"][name] = 1.2
            row["timeline"]["arms"][0] = name
    rows.append(rollout(3, fallback="<b>beams</b>", completion_tokens=0))
    html = page_of(write(tmp_path / "<script>alert(1)", rows))
    assert not any(tag in html for tag in ("<script", "<img", "<b>"))
    assert "<script>alert(1)" in Page(html.replace("url(#x)", "")).text


def test_a_long_run_stays_small(tmp_path):
    timeline = {
        "seconds": [i / 100 for i in range(200)],
        "rows": list(range(199, -1, -1)),
        "arms": ["plain", "static"] * 100,
    }
    rows = [row | {"timeline": timeline} if row["kind"] == "rollout" else row for row in whole_run(2000)]
    html = page_of(write(tmp_path, rows))
    Page(html)
    assert len(html) < 1_500_000


def test_series():
    series = Series.of({i: float(i) for i in range(100)})
    assert len(series.thinned(30)) <= 30 and series.thinned(100) is series
    assert (series.first, series.last) == (9.5, 89.5)
    assert len(Series.of({1: 1.0, 2: 1.0, 3: 1.0, 30: 1.0, 31: 1.0}).broken()[0]) == 6
    assert Series.of({1: 5.0}).smooth().values == [5.0] and Series.of({1: 5.0}).broken() == ([1], [5.0])


def test_when_one_line_is_above_the_other():
    slow, fast = Series([1, 2, 3, 4], [1.0] * 4), Series([1, 2, 3, 4], [2.0] * 4)
    assert when_ahead(fast, slow, "step") == ". It was faster than that all along"
    assert when_ahead(slow, fast, "step") == ". At no time was it faster than that"
    assert (
        when_ahead(Series([1, 2, 3, 4], [2.0, 0.5, 2.0, 2.0]), slow, "step")
        == ". From step 3 on it was faster than that"
    )
    assert "in 25% of the run" in when_ahead(Series([1, 2, 3, 4], [2.0, 0.5, 0.5, 0.5]), slow, "step")


def test_command(tmp_path, capsys):
    folder = write(tmp_path / "run", whole_run(2))
    assert main(["report", str(folder), "--out", str(tmp_path / "elsewhere")]) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "elsewhere" / "index.html") in printed and "speed.png" in printed
    Page((tmp_path / "elsewhere" / "index.html").read_text())
    pictures = list((tmp_path / "elsewhere").glob("*.png"))
    assert {path.stem for path in pictures} == set(ALL_BUT_IDLE)
    assert all(int.from_bytes(path.read_bytes()[16:20]) == 1600 for path in pictures), "two dots per pixel"
    assert read_run(folder / "rollouts.jsonl").path == read_run(folder).path, "the log itself is taken too"


@pytest.mark.parametrize("content", [None, "", '{"kind": "step", "step": 1, "rank": 0, "step_seconds": 1.0}\n'])
def test_runs_without_a_rollout_are_named(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "rollouts.jsonl").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "rollouts.jsonl") in said and ("output_dir" in said or "no rollout yet" in said)


def test_folders_that_cannot_be_written(tmp_path, capsys):
    folder = write(tmp_path / "run", whole_run(1))
    (tmp_path / "file").write_text("")
    assert main(["report", str(folder), "--out", str(tmp_path / "file" / "x")]) == 2
    assert "--out" in capsys.readouterr().err


def test_without_a_plotting_library(tmp_path, capsys, monkeypatch):
    write(tmp_path, whole_run(2))
    monkeypatch.setattr("atlas_rl.report.page.find_spec", lambda name: None)
    assert main(["report", str(tmp_path)]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "need matplotlib: pip install 'atlas-rl[plots]'" in said and not (tmp_path / "report").exists()


def test_the_sentence(tmp_path):
    rows = [row for row in whole_run(5) if row["kind"] != "log"]
    assert in_a_sentence(read_run(write(tmp_path, rows))).endswith("(an estimate).")
    rows += [log_row(step, reward=0.5) for step in range(1, 6)]
    assert "the mean reward stayed about the same, at 0.500" in in_a_sentence(read_run(write(tmp_path, rows)))
