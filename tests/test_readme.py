"""What README.md promises: its commands are real ones, its table is the presets' arithmetic."""

import re
import shlex
from pathlib import Path

import pytest

from gptj_stream import cli
from gptj_stream.config import PRESETS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    blocks = re.sub(r"\\\n\s*", "", README)
    return [line.strip().partition("  #")[0] for line in blocks.splitlines() if line.startswith("    gptj ")]


def test_there_are_commands() -> None:
    assert len(commands()) >= 7


@pytest.mark.parametrize("command", commands())
def test_commands_are_accepted(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to opening the files that they name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-options.yaml").write_text("epochs: 2\n")
    run = tmp_path / "my-run" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("model: gpt-j-6b\ndata: my.jsonl\noutput: my-run\n")
    words = shlex.split(command.replace("$'\\n\\n'", "'\n\n'"))
    assert cli.parse(words[1:])


def test_memory_table() -> None:
    rows = re.findall(r"^\| `(.+?)` \| (.+?) ([MB]) \| (.+?) GiB \|.*\| (.+?) GiB \|$", README, re.MULTILINE)
    assert len(rows) >= 5
    for preset, count, unit, training, inference in rows:
        parameters = PRESETS[preset].parameters
        scaled = parameters / {"M": 1e6, "B": 1e9}[unit]
        assert count == (f"{scaled:.0f}" if unit == "M" else f"{scaled:.2f}")
        assert training == f"{16 * parameters / 2**30:.1f}"
        assert inference == f"{2 * parameters / 2**30:.1f}"


def test_file_tree_is_the_tree() -> None:
    source = Path(cli.__file__).parent
    listed = set(re.findall(r"\b([a-z_]+\.py)\b", README.partition("## The files")[2]))
    there = {path.name for path in source.glob("*.py")} - {"__init__.py", "__main__.py", "errors.py"}
    assert listed == there
