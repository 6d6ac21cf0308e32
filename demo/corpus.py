"""Real text that every machine has: the standard library of the Python that runs this.

Writes whole modules as `{"text"}` records, and a task: `{"prompt", "completion"}` records of a function's source and
the first paragraph of its docstring. Modules are held out by a hash of their name, the same ones in both sets.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

# Tests, generated tables, vendored installers and documentation dumps are not what people write.
LEFT_OUT = {"test", "tests", "idlelib", "encodings", "pydoc_data", "ensurepip", "site-packages", "dist-packages"}
PROMPT_LINES = 24
"""A longer function is shown up to here: its docstring is mostly told by its beginning."""


def write_corpus(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    modules, tasks = ("modules-{}.jsonl", "docstrings-{}.jsonl")
    for part in ("train", "held-out"):
        sources = [(name, text) for name, text in modules_of_the_library() if is_held_out(name) == (part == "held-out")]
        _write(folder / modules.format(part), ({"text": text} for _, text in sources))
        _write(folder / tasks.format(part), (pair for _, text in sources for pair in docstring_pairs(text)))


def is_held_out(module: str) -> bool:
    """One module in ten, by a hash of its name: the same ones on every machine."""
    return hashlib.sha256(module.encode()).digest()[0] % 10 == 0


def modules_of_the_library() -> Iterator[tuple[str, str]]:
    """Every module's name and source text; of modules with the same text, the first."""
    root = Path(sysconfig.get_path("stdlib"))
    seen = set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if LEFT_OUT.isdisjoint(parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip() and text not in seen:  # no text may stand on both sides of the split
                seen.add(text)
                yield ".".join(parts), text


def docstring_pairs(source: str) -> Iterator[dict[str, str]]:
    """A record for each function that has a docstring of a sensible length."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # templates that only look like modules
        return
    lines = source.split("\n")  # the lines that ast counts: splitlines also cuts at form feeds
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not ast.get_docstring(node):
            continue
        summary = " ".join(inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0].split())
        docstring, rest = node.body[0], node.body[1:]
        if not rest or not 20 <= len(summary) <= 200 or rest[0].lineno <= (docstring.end_lineno or 0):
            continue
        head = lines[node.lineno - 1 : docstring.lineno - 1]
        body = lines[docstring.end_lineno : node.end_lineno]
        code = textwrap.dedent("\n".join([*head, *body][:PROMPT_LINES]))
        yield {"prompt": f"{code}\n# Docstring:", "completion": f" {summary}"}


def _write(path: Path, records: Iterator[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
