from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj_stream.data.packing import Packing, pack
from gptj_stream.data.tokens import TokenDataset
from gptj_stream.errors import UserError
from gptj_stream.options import PackingMode

Build = Callable[..., TokenDataset]

ids = st.lists(st.integers(1, 300), max_size=12)
documents = st.lists(st.tuples(ids, ids), min_size=1, max_size=12)


def rows_of(packing: Packing) -> list[list[tuple[int, int]]]:
    return [packing.row(r) for r in range(packing.rows)]


def test_texts_and_prompts(dataset_of: Build) -> None:
    """A text's first token is predicted, a prompt's is not."""
    dataset = dataset_of([([], [5, 6]), ([7, 8], [9])])
    packing = pack(dataset, 10, "none")
    assert rows_of(packing) == [[(0, 3)], [(4, 3)]]
    assert packing.efficiency == 6 / 20


def test_concat(dataset_of: Build) -> None:
    packing = pack(dataset_of([([], [1, 2, 3]), ([], [4, 5])]), 3, "concat")
    assert rows_of(packing) == [[(0, 3)], [(3, 3)], [(6, 1)]]
    assert packing.efficiency == 7 / 9


def test_best_fit(dataset_of: Build) -> None:
    """Targets of 6, 5, 4, 3 and 2 fit two rows of 10 without a gap."""
    packing = pack(dataset_of([([], [1] * n) for n in (1, 3, 5, 4, 2)]), 10)
    assert [sorted(length for _, length in row) for row in rows_of(packing)] == [[4, 6], [2, 3, 5]]
    assert packing.efficiency == 1.0


def test_best_fit_takes_the_fullest_row(dataset_of: Build) -> None:
    packing = pack(dataset_of([([], [1] * (n - 1)) for n in (5, 7, 2)]), 10)
    assert sorted(sorted(length for _, length in row) for row in rows_of(packing)) == [[2, 7], [5]]


def test_long_documents(dataset_of: Build) -> None:
    dataset = dataset_of([([], [1] * 6), ([2], [3])])
    split = pack(dataset, 3, "none", "split")
    assert rows_of(split) == [[(0, 3)], [(3, 3)], [(6, 1)], [(8, 2)]]
    assert split.dropped_long == 0
    dropped = pack(dataset, 3, "none", long_documents="drop")
    assert rows_of(dropped) == [[(8, 2)]]
    assert dropped.dropped_long == 1
    with pytest.raises(
        UserError, match=r"of 2 documents \(10 tokens\) 2 are longer than sequence_length 1 and 0 pieces"
    ):
        pack(dataset, 1, long_documents="drop")


@pytest.mark.parametrize("mode", ["documents", "none"])
def test_long_texts_are_split_and_long_prompts_with_their_completions_dropped(
    dataset_of: Build, mode: PackingMode
) -> None:
    dataset = dataset_of([([], [1] * 6), ([2], [3]), ([4] * 3, [5]), ([6], [7] * 9)])
    packing = pack(dataset, 3, mode)
    assert sorted(segment for row in rows_of(packing) for segment in row) == [(0, 3), (3, 3), (6, 1), (8, 2)]
    assert packing.dropped_long == 2
    assert pack(dataset, 3, mode, "drop").dropped_long == 3
    assert pack(dataset, 3, mode, "split").dropped_long == 0
    assert pack(dataset, 3, "concat").dropped_long == 0


@pytest.mark.parametrize("mode", ["documents", "concat", "none"])
def test_pieces_without_loss_are_dropped(dataset_of: Build, mode: PackingMode) -> None:
    packing = pack(dataset_of([([1] * 9, [2]), ([3] * 2, [4])]), 2, mode, "split")
    # targets without the prompt's first token: 8 of prompt and 2 of answer, then 1 and 2
    assert packing.dropped_without_loss == 4
    assert packing.tokens == {"documents": 5, "none": 5, "concat": 7}[mode]


@given(documents, st.integers(1, 20), st.sampled_from(["documents", "concat", "none"]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_learned_token_is_in_one_row(
    dataset_of: Build, documents: list[tuple[list[int], list[int]]], size: int, mode: PackingMode, drop: bool
) -> None:
    dataset = dataset_of(documents)
    long = drop and mode != "concat"
    spans = [
        (start + bool(prompt), end)
        for (prompt, _), start, end in zip(documents, dataset.offsets[:-1], dataset.offsets[1:], strict=True)
    ]
    kept = [span for span in spans if not long or span[1] - span[0] <= size]
    if not kept:
        with pytest.raises(UserError, match="no rows"):
            pack(dataset, size, mode, "drop")
        return
    packing = pack(dataset, size, mode, "drop" if drop else "split")
    assert packing.dropped_long == len(spans) - len(kept)

    seen = np.zeros(len(dataset.tokens), int)
    mask = np.ones(len(dataset.tokens), np.uint8) if dataset.mask is None else dataset.mask
    for row in rows_of(packing):
        assert 0 < sum(length for _, length in row) <= size
        for start, length in row:
            seen[start : start + length] += 1
            assert mask[start : start + length].any()
            # a segment stays in its document, and what it conditions on does too
            assert mode == "concat" or any(first <= start and start + length <= end for first, end in kept)
    learned = np.zeros(len(seen), int)
    for first, end in kept if mode != "concat" else [(0, len(seen))]:
        learned[first:end] = mask[first:end]
    assert (seen <= 1).all()
    assert (seen[learned == 1] == 1).all()
    assert mode == "documents" or all(len(row) == 1 for row in rows_of(packing))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_best_fit_is_what_a_plain_search_finds(dataset_of: Build, lengths: list[int]) -> None:
    packing = pack(dataset_of([([], [1] * (n - 1)) for n in lengths]), 40)
    expected: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in expected if sum(row) + length <= 40]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            expected.append([length])
    assert sorted(sum(length for _, length in row) for row in rows_of(packing)) == sorted(map(sum, expected))
