"""docs/api.md, made of signatures and docstrings: `python tests/api_page.py` writes it, a test compares."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

import atlas_rl

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
PUBLIC = {
    "atlas_rl": atlas_rl._HOMES,
    "atlas_rl.deepspeed": {"AtlasRollout": "atlas_rl.deepspeed"},
    "atlas_rl.tasks": {
        "build_dataset": "atlas_rl.tasks.dataset",
        "policy_path": "atlas_rl.tasks",
        "reasoning_gym_reward": "atlas_rl.tasks.reward",
    },
}
"""By module to import from: names, and the modules that define them."""
PIPE = r"\|"
FIRST = ("AtlasRolloutGenerator", "SamplingParams", "Rollout", "AtlasConfig")
INTRODUCTION = f"""# API

Made from the docstrings by `python tests/api_page.py`: change them, not this page.

**What is public**: the names on this page with the parameters, fields and methods it lists; the commands and options that
`atlas-rl --help` and its commands list, with their exit codes; the fields of `rollouts.jsonl`; the files of a draft head and of
`checkpoint-N/atlas/`. Everything else may change with any release.

**Versions** are [semantic](https://semver.org) (`atlas_rl.__version__`, now {atlas_rl.__version__}): a fix raises the third
number, an addition the second. What breaks code that uses the public API raises the first number; before 1.0, the second. The
changelog says what to change then. The same seed gives the same tokens within a release, on one machine with one set of
libraries; the next release may give others.
"""


def render() -> str:
    parts = [INTRODUCTION]
    for module, names in PUBLIC.items():
        parts.append(f"## `{module}`\n")
        for name in sorted(names, key=lambda name: (name not in FIRST, FIRST.index(name) if name in FIRST else name)):
            parts += section(name, definition(names[name], name))
    return "\n".join(parts)


def definition(module: str, name: str) -> ast.ClassDef | ast.FunctionDef:
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    (found,) = (node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == name)
    return found


def section(name: str, node: ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef):
        yield f"### `{signature(name, node)}`\n\n{described(name, node)}"
        return
    made_by = constructor(node)
    yield f"### `{signature(name, made_by) if made_by else name}`\n\n{described(name, node)}"
    if fields := list(documented_fields(node)):
        yield "| field | type, default | |\n|---|---|---|\n" + "\n".join(fields) + "\n"
    for method in public_methods(node):
        yield f"#### `{signature(method.name, method)}`\n\n{described(f'{name}.{method.name}', method)}"


def documented_fields(node: ast.ClassDef) -> Iterator[str]:
    """Rows of a dataclass; a field's docstring is the string that follows it."""
    if not node.decorator_list:
        return
    for field, after in zip(node.body, [*node.body[1:], None]):
        if not isinstance(field, ast.AnnAssign):
            continue
        assert isinstance(after, ast.Expr), f"{node.name}.{ast.unparse(field.target)} has no docstring"
        default = "" if field.value is None else f" = {ast.unparse(field.value)}"
        kind = re.sub(r" = field\(default_factory=(\w+)\)", r" = \1()", f"{ast.unparse(field.annotation)}{default}")
        meaning = " ".join(cleandoc(after.value.value).split())
        cells = (f"`{ast.unparse(field.target)}`", f"`{kind}`", meaning)
        yield f"| {' | '.join(cell.replace('|', PIPE) for cell in cells)} |"


def public_methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """Without what only a trainer calls."""
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    return [method for method in methods if not method.name.startswith(("_", "on_"))]


def signature(name: str, node: ast.FunctionDef) -> str:
    returned = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    if any(ast.unparse(decorator) == "property" for decorator in node.decorator_list):
        return f"{name}{returned}"
    arguments = re.sub(r"^(self|cls)(, |$)", "", ast.unparse(node.args))
    return f"{name}({arguments}){returned}"


def described(name: str, node: ast.ClassDef | ast.FunctionDef) -> str:
    """The docstring as Markdown; every parameter has to occur in it."""
    text = ast.get_docstring(node)
    assert text, f"{name} has no docstring"
    taken = node if isinstance(node, ast.FunctionDef) else constructor(node)
    for argument in [] if taken is None else [*taken.args.args, *taken.args.kwonlyargs]:
        known = argument.arg in ("self", "cls") or re.search(rf"\b{argument.arg}\b", text)
        assert known, f"{name} says nothing of its parameter {argument.arg}"
    return markdown(text)


def constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((item for item in node.body if getattr(item, "name", "") == "__init__"), None)


def markdown(text: str) -> str:
    """`Args:` and `Raises:` as lists; code, which is indented, as it is."""
    lines, in_section = [], False
    for line in text.splitlines():
        if line in ("Args:", "Returns:", "Raises:"):
            lines += ["", f"{line[:-1]}:", ""]
            in_section = True
        elif not line:
            lines.append("")
            in_section = False
        elif in_section and line.startswith(" " * 8):
            lines.append(f"  {line.strip()}")
        elif in_section:
            words = line.strip()
            lines.append(re.sub(r"^([\w, ]+): ", r"- `\1`: ", words) if re.match(r"[\w, ]+: ", words) else words)
        else:
            lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
