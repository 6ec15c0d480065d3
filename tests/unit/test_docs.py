"""The pages: no link that leads nowhere, no figure that is missing, and tables that say what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import configuration_page
import pytest

from atlas_rl.cli import COMMANDS
from atlas_rl.config import AtlasConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), ROOT / "examples" / "README.md"]
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, words joined by hyphens, punctuation dropped, repeats numbered."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number, anchor = 0, slug
        while anchor in anchors:
            number += 1
            anchor = f"{slug}-{number}"
        anchors.add(anchor)
    return anchors


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_lead_somewhere(page: Path):
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if path.startswith(("https://", "http://")):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_index_names_every_page():
    index = (DOCS / "README.md").read_text()
    assert not [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"]({page.name})" not in index]


def test_the_examples_index_names_every_script():
    index = (ROOT / "examples" / "README.md").read_text()
    assert not [path.name for path in (ROOT / "examples").glob("*.py") if f"[{path.name}]({path.name})" not in index]


def test_the_configuration_page_is_what_the_code_says():
    page = configuration_page.PAGE.read_text()
    assert page == configuration_page.written(page), "run `python tests/configuration_page.py`"
    assert "|  |" not in page, "a field of atlas_rl/config.py has no docstring"


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_fields_that_a_page_speaks_of_exist(page: Path):
    for section, name in re.findall(r"`(?:--atlas\.)?(engine|adapt)\.(\w+)\b(?![./(])", page.read_text()):
        if name == "load_checkpoint":  # of DeepSpeed's engine
            continue
        assert hasattr(getattr(AtlasConfig(), section), name), f"{section}.{name}"


def test_every_command_has_a_section():
    page = (DOCS / "command-line.md").read_text()
    assert not [name for name in COMMANDS if f"## atlas-rl {name}\n" not in page]


@pytest.mark.parametrize("figure", sorted((DOCS / "figures").glob("*.svg")), ids=lambda path: path.stem)
def test_figures_are_legible_in_both_schemes(figure: Path):
    """Letters of 12 px at least, on a phone of 360 px too, and colours for dark pages."""
    svg = ElementTree.parse(figure).getroot()
    text = figure.read_text()
    sizes = [int(size) for size in re.findall(r"(\d+)px", text)]
    assert sizes and min(sizes) * min(1, 360 / float(svg.get("width"))) >= 12
    assert "prefers-color-scheme: dark" in text
    assert any(f"(figures/{figure.name})" in page.read_text() for page in DOCS.glob("*.md"))
