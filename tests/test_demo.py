"""The demonstration's corpus: what it takes from Python's own source."""

import json
from pathlib import Path

from demo.corpus import docstring_pairs, is_held_out, modules_of_the_library, write_corpus

SOURCE = '''
class Circle:
    def area(self):
        """Area of the circle,
        in the square of the radius' unit.

        More about it.
        """
        return pi * self.r ** 2

    def short(self):
        """Too short."""
        return 1

def bare():
    """A docstring that stands alone, without any code."""

async def fetch(url):
    """Fetch a page and return its text."""; return await get(url)
'''


def test_pairs_are_a_function_without_its_docstring_and_the_first_paragraph() -> None:
    assert list(docstring_pairs(SOURCE)) == [
        {
            "prompt": "def area(self):\n    return pi * self.r ** 2\n# Docstring:",
            "completion": " Area of the circle, in the square of the radius' unit.",
        }
    ]


def test_a_form_feed_ends_no_line() -> None:
    assert list(docstring_pairs(f"\x0c\n# \x0b \u2028 \x85\n{SOURCE}")) == list(docstring_pairs(SOURCE))


def test_unparsable_source_has_no_pairs() -> None:
    assert list(docstring_pairs("def f(:\n")) == []


def test_the_sets_share_no_module(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    texts = {
        part: {json.loads(line)["text"] for line in (tmp_path / f"modules-{part}.jsonl").read_text().splitlines()}
        for part in ("train", "held-out")
    }
    assert texts["held-out"]
    assert not texts["train"] & texts["held-out"]
    modules = dict(modules_of_the_library())
    assert texts["train"] | texts["held-out"] == set(modules.values())
    # a tenth by a hash of the name: with 500 modules the standard deviation is 1.3 %, so this is six of them
    assert 0.02 < sum(map(is_held_out, modules)) / len(modules) < 0.18
    for part in ("train", "held-out"):
        records = [json.loads(line) for line in (tmp_path / f"docstrings-{part}.jsonl").read_text().splitlines()]
        assert records
        assert all(record["completion"].strip() not in record["prompt"] for record in records[:200])
