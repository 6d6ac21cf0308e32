from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj_stream.batch import IGNORE, MicroBatch
from gptj_stream.data.batches import Batches, evaluation_batches
from gptj_stream.data.packing import pack
from gptj_stream.data.tokenize import tokenize_files
from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.data.tokens import TokenDataset
from gptj_stream.options import PackingMode

Build = Callable[..., TokenDataset]


def listed(batches: Iterable[MicroBatch]) -> list[tuple[list[int], list[int], tuple[int, ...]]]:
    return [(b.input_ids.tolist(), b.targets.tolist(), b.lengths) for b in batches]


def segments(batches: Iterable[MicroBatch]) -> list[tuple[list[int], list[int]]]:
    """Each segment's inputs and targets."""
    return [
        (inputs.tolist(), targets.tolist())
        for b in batches
        for inputs, targets in zip(b.input_ids.split(b.lengths), b.targets.split(b.lengths), strict=True)
    ]


def numbered(dataset_of: Build, count: int) -> TokenDataset:
    """Documents that tell which one they are."""
    return dataset_of([([], [i + 1] * (i % 3 + 1)) for i in range(count)])


def test_documents(dataset_of: Build) -> None:
    dataset = dataset_of([([], [5, 6]), ([7, 8], [9])])
    (batch,) = evaluation_batches(dataset, pack(dataset, 6), 1)
    assert listed([batch]) == [([0, 5, 6, 7, 8, 9], [5, 6, 0, IGNORE, 9, 0], (3, 3))]
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
    assert batch.target_count == 5


def test_concat(dataset_of: Build) -> None:
    dataset = dataset_of([([], [5, 6]), ([7, 8], [9])])
    batches = list(evaluation_batches(dataset, pack(dataset, 3, "concat"), 2))
    assert listed(batches) == [
        ([0, 5, 6, 0, 7, 8], [5, 6, 0, IGNORE, IGNORE, 9], (3, 3)),
        ([9], [0], (1,)),
    ]


def test_a_split_document_goes_on_where_it_was_cut(dataset_of: Build) -> None:
    dataset = dataset_of([([], [1, 2, 3, 4])])
    assert listed(evaluation_batches(dataset, pack(dataset, 3, "none"), 1)) == [
        ([0, 1, 2], [1, 2, 3], (3,)),
        ([3, 4], [4, 0], (2,)),
    ]


def test_steps(dataset_of: Build) -> None:
    dataset = numbered(dataset_of, 7)
    batches = Batches(dataset, pack(dataset, 4, "none"), 2, 5, seed=1)
    assert batches.rows_per_epoch == 7
    assert [len(b.lengths) for b in batches.next_step()] == [2, 2, 1]
    assert batches.epoch == 5 / 7
    assert batches.state_dict() == {"consumed_rows": 5}


def test_every_epoch_has_every_row_in_its_own_order(dataset_of: Build) -> None:
    dataset = numbered(dataset_of, 11)
    batches = Batches(dataset, pack(dataset, 4, "none"), 4, 3, seed=3)
    rows = [inputs[1] for _ in range(11) for inputs, _ in segments(batches.next_step())]
    epochs = [rows[i : i + 11] for i in (0, 11, 22)]
    assert all(sorted(epoch) == list(range(1, 12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # an order follows from (seed, epoch) alone
    for epoch, order in enumerate(epochs):
        assert order == (np.random.Generator(np.random.PCG64([3, epoch])).permutation(11) + 1).tolist()


def test_a_step_may_hold_several_epochs(dataset_of: Build) -> None:
    dataset = numbered(dataset_of, 3)
    step = Batches(dataset, pack(dataset, 4, "none"), 7, 7, seed=0).next_step()
    assert sorted(Counter(inputs[1] for inputs, _ in segments(step)).values()) == [2, 2, 3]


@pytest.mark.parametrize(("rows", "sizes"), [(3, [3]), (16, [16]), (17, [16, 1]), (6, [6]), (None, [16, 16])], ids=str)
def test_training_ends_after_its_rows(dataset_of: Build, rows: int | None, sizes: list[int]) -> None:
    dataset = numbered(dataset_of, 3)
    batches = Batches(dataset, pack(dataset, 4, "none"), 2, 16, seed=0, rows=rows)
    steps = [[inputs[1] for inputs, _ in segments(batches.next_step())] for _ in sizes]
    assert [len(step) for step in steps] == sizes
    assert batches.state_dict() == {"consumed_rows": sum(sizes)}
    seen = [row for step in steps for row in step]
    assert all(sorted(seen[i : i + 3]) == [1, 2, 3] for i in range(0, len(seen) - 2, 3))
    if rows is not None:
        with pytest.raises(AssertionError, match="no rows are left"):
            batches.next_step()


def test_seeds_differ(dataset_of: Build) -> None:
    dataset = numbered(dataset_of, 20)
    packing = pack(dataset, 4, "none")
    one, two = (Batches(dataset, packing, 20, 20, seed=seed).next_step() for seed in (1, 2))
    assert listed(one) != listed(two)


@pytest.mark.parametrize("steps", [0, 1, 4, 9])
def test_restoring_the_position(dataset_of: Build, steps: int) -> None:
    dataset = numbered(dataset_of, 10)
    packing = pack(dataset, 8)
    first = Batches(dataset, packing, 2, 3, seed=5)
    for _ in range(steps):
        first.next_step()
    second = Batches(dataset, packing, 2, 3, seed=5)
    second.load_state_dict(first.state_dict())
    assert second.epoch == first.epoch
    for _ in range(5):
        assert listed(first.next_step()) == listed(second.next_step())


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(
    documents=st.lists(st.tuples(st.one_of(st.just(""), text), text), min_size=1, max_size=6),
    size=st.integers(1, 30),
    mode=st.sampled_from(["documents", "concat", "none"]),
    micro=st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_an_epoch_teaches_each_text_once(
    small_tokenizer: Tokenizer, documents: list[tuple[str, str]], size: int, mode: PackingMode, micro: int
) -> None:
    """From files to targets: what the model is to say, put together again, is the completions and nothing else."""
    with TemporaryDirectory() as folder:
        source = Path(folder) / "data.jsonl"
        source.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in documents))
        dataset = tokenize_files([source], small_tokenizer, Path(folder) / "tokens")
        packing = pack(dataset, size, mode, "split")
        epoch = Batches(dataset, packing, micro, packing.rows, seed=0).next_step()

    assert sum(batch.target_count for batch in epoch) == dataset.manifest.loss_tokens
    evaluated = list(evaluation_batches(dataset, packing, micro))
    assert sorted(segments(epoch)) == sorted(segments(evaluated))
    for inputs, targets in segments(epoch):
        assert all(target in (IGNORE, after) for target, after in zip(targets, inputs[1:], strict=False))

    in_order = [segments(evaluated)[i][1] for i in np.argsort(packing.starts)]
    ids = [target for targets in in_order for target in targets if target != IGNORE]
    eos = small_tokenizer.eos_token_id
    said = ["".join(small_tokenizer.decode(list(g))) for is_eos, g in groupby(ids, eos.__eq__) if not is_eos]
    assert said == [completion for _, completion in documents]
    assert ids.count(eos) == len(documents)
