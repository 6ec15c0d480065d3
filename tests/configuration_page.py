"""Write the tables of docs/configuration.md from the docstrings of atlas_rl/config.py.

python tests/configuration_page.py
"""

from __future__ import annotations

import ast
from dataclasses import MISSING, Field, fields
from pathlib import Path

import yaml

from atlas_rl import config

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
BEGIN, END = "<!-- tables: written by tests/configuration_page.py -->\n", "<!-- end of tables -->\n"
SECTIONS = {"": config.AtlasConfig, "engine": config.EngineConfig, "adapt": config.AdaptConfig}


def tables() -> str:
    docs = field_docs()
    parts = []
    for section, cls in SECTIONS.items():
        prefix = f"{section}." if section else ""
        parts += [f"## {f'`{section}`' if section else 'Top level'}", "", cls.__doc__ or "", ""]
        parts += ["| field | default | meaning |", "|---|---|---|"]
        parts += [
            f"| `{prefix}{field.name}` | {default_of(field)} | {docs[cls.__name__][field.name]} |"
            for field in fields(cls)
            if field.name not in SECTIONS
        ]
        parts.append("")
    return "\n".join(parts) + "\n"


def field_docs() -> dict[str, dict[str, str]]:
    """By class and field, the string that stands below the field; nothing where none does."""
    found = {}
    for node in ast.parse(Path(config.__file__).read_text()).body:
        if isinstance(node, ast.ClassDef):
            docs = found[node.name] = {}
            for statement, below in zip(node.body, [*node.body[1:], None]):
                if isinstance(statement, ast.AnnAssign):
                    is_doc = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                    docs[statement.target.id] = " ".join(below.value.value.split()) if is_doc else ""
    return found


def default_of(field: Field) -> str:
    """As YAML says it."""
    assert field.default is not MISSING, field.name
    return f"`{yaml.safe_dump(field.default).split()[0]}`"


def written(page: str) -> str:
    """The page with its tables as they should be."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + tables() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
