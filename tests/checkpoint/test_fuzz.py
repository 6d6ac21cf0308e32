"""Damaged files of every format: read or refused in one line, in little time and memory, and nothing is left behind.

GPTJ_FUZZ_INPUTS sets how many are tried for each file of the corpus (`make fuzz`).
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gptj_stream.checkpoint.source import SAFETENSORS, Checkpoint
from gptj_stream.errors import UserError
from gptj_stream.executor import model_layouts

INPUTS = int(os.environ.get("GPTJ_FUZZ_INPUTS", "60"))
_FILES = [
    "safetensors/config.json", f"safetensors/{SAFETENSORS}",
    "index/pytorch_model.bin.index.json", "index/a.bin", "old/pytorch_model.bin",
    "mesh/mesh.json", "mesh/shard_0/0.npz", "mesh/shard_1/9.npz", "tar/step.tar", "zstd/step.tar.zstd",
]  # fmt: skip
_NUMBERS = [0, 1, -1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1]


@pytest.fixture(scope="module")
def formats(checkpoint: Path, tiny: Any, job_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in every format, a folder each."""
    from tests.checkpoint.conftest import Mesh  # noqa: PLC0415

    root = tmp_path_factory.mktemp("formats")
    tensors = load_file(checkpoint / SAFETENSORS)
    for name in ("safetensors", "index", "old", "mesh", "tar", "zstd"):
        (root / name).mkdir()
        shutil.copy(checkpoint / "config.json", root / name)
    shutil.copy(checkpoint / SAFETENSORS, root / "safetensors")
    torch.save(tensors, root / "index" / "a.bin")
    (root / "index" / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "a.bin")})
    )
    torch.save(tensors, root / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    made = Mesh(tiny.oracle(job_config), job_config, 2)
    made.write(root / "mesh")
    (root / "mesh" / "config.json").unlink()
    for name in ("mesh", "tar", "zstd"):
        (root / name / "mesh.json").write_text(json.dumps(made.values()))
    with tarfile.open(root / "tar" / "step.tar", "w") as archive:
        for shard in ("shard_0", "shard_1"):
            archive.add(root / "mesh" / shard, f"step_1/{shard}")
    (root / "zstd" / "step.tar.zstd").write_bytes(zstandard.compress((root / "tar" / "step.tar").read_bytes()))
    return root


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One to four changes: bytes overwritten, cut out, doubled, cut off, or a telling number put in."""
    steps = draw(
        st.lists(st.tuples(st.sampled_from("onditc"), st.floats(0, 1), st.integers(0, 2**16)), min_size=1, max_size=4)
    )
    numbers = draw(st.lists(st.sampled_from(_NUMBERS), min_size=4, max_size=4))
    noise = draw(st.binary(min_size=1, max_size=12))
    near_the_start = draw(st.booleans())  # where headers are

    def damage(content: bytes) -> bytes:
        for (kind, where, size), number in zip(steps, numbers, strict=False):
            at = int(where * min(len(content), 4096 if near_the_start else len(content)))
            if kind == "o":
                content = content[:at] + noise + content[at + len(noise) :]
            elif kind == "n":
                width = (1, 2, 4, 8)[size % 4]
                packed = (number % (1 << 8 * width)).to_bytes(width, "little")
                content = content[:at] + packed + content[at + width :]
            elif kind == "d":
                content = content[:at] + content[at + size % 64 :]
            elif kind == "i":
                content = content[:at] + noise + content[at:]
            elif kind == "t":
                content = content[:at]
            else:
                content = content[:at] + content[at : at + size % 512] + content[at:]
        return content

    return damage


@pytest.mark.parametrize("name", _FILES)
def test_damaged_files(name: str, formats: Path) -> None:
    file = formats / name
    sound = file.read_bytes()
    folder = formats / name.split("/", maxsplit=1)[0]
    before = sorted(folder.rglob("*"))
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=INPUTS, deadline=None, derandomize=INPUTS < 100, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(damage=damages())
    def check(damage: Callable[[bytes], bytes]) -> None:
        file.write_bytes(damage(sound))
        started = time.perf_counter()
        try:
            source = Checkpoint(file if file.suffix in (".tar", ".zstd") else folder)
            source.check(model_layouts(source.config))
            for tensor in source.tensors.values():
                for start, stop in tensor.steps():
                    assert tensor.read_rows(start, stop).shape == (stop - start, *tensor.shape[1:])
            del source
        except UserError as error:
            assert "\n" not in str(error)
        assert time.perf_counter() - started < 10  # a sound one takes 20 ms; the machine may be busy
        assert sorted(folder.rglob("*")) == before

    try:
        check()
    finally:
        file.write_bytes(sound)
    # KiB; the checkpoint has 0.2 MB, so whatever is allocated by what a file claims would show
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest < 300 * 1024
