"""The run folder: what may be started in it, what is kept of the options, how a result appears in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gptj_stream.errors import UserError
from gptj_stream.options import TrainOptions
from gptj_stream.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "out" / "run")


def options(run: RunFolder, **changes: Any) -> TrainOptions:
    values = {"model": Path("m"), "data": (Path("d.txt"),), "output": run.root, "max_steps": 10}
    return TrainOptions(**values | changes)


def started(run: RunFolder, **changes: Any) -> RunFolder:
    with run.start(overwrite=False):
        run.keep_options(options(run, **changes))
    return run


def test_a_run_starts_in_a_new_or_empty_folder(run: RunFolder) -> None:
    with run.start(overwrite=False):
        pass
    assert run.internal.is_dir()
    other = RunFolder(run.root.parent / "empty")
    other.root.mkdir()
    with other.start(overwrite=True):
        pass
    assert other.internal.is_dir()


def test_a_run_is_deleted_only_when_asked_to(run: RunFolder) -> None:
    started(run)
    run.metrics.write_text("numbers")
    with (
        pytest.raises(UserError, match="already holds a run; add --resume to go on or --overwrite to delete it"),
        run.start(overwrite=False),
    ):
        pass
    assert run.metrics.read_text() == "numbers"
    with run.start(overwrite=True):
        pass
    assert {path.name for path in run.root.rglob("*")} == {"run", "id.json"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_never_touched(run: RunFolder, overwrite: bool) -> None:
    run.root.mkdir(parents=True)
    (run.root / "thesis.txt").write_text("years")
    with (
        pytest.raises(UserError, match="holds files that are not a run's; use another --output"),
        run.start(overwrite=overwrite),
    ):
        pass
    assert (run.root / "thesis.txt").read_text() == "years"
    file = RunFolder(run.root / "thesis.txt")
    with (
        pytest.raises(UserError, match=r"thesis\.txt is a file; --output names a folder"),
        file.start(overwrite=overwrite),
    ):
        pass
    below = RunFolder(run.root / "thesis.txt" / "run")
    with (
        pytest.raises(UserError, match="cannot be made"),
        below.start(overwrite=overwrite),
    ):
        pass


def test_overwriting_does_not_delete_what_the_run_reads(run: RunFolder, tmp_path: Path) -> None:
    started(run)
    link = tmp_path / "link"
    link.symlink_to(run.root)
    for inside in (run.root, run.tokens / "train", link / "data.txt"):
        with (
            pytest.raises(UserError, match=r"--overwrite would delete .*, which the run reads; use another --output"),
            run.start(overwrite=True, inputs=[tmp_path / "elsewhere", inside]),
        ):
            pass
    assert run.config.is_file()
    with run.start(overwrite=True, inputs=[tmp_path / "elsewhere", run.root.with_name("run2")]):
        pass
    assert not run.config.exists()


def test_a_start_that_failed_is_not_in_the_way(run: RunFolder) -> None:
    """A run that ended before it kept its options leaves its tokens, which the next one uses."""
    with run.start(overwrite=False):
        pass
    (run.tokens / "train").mkdir(parents=True)
    with run.start(overwrite=False):
        pass
    assert (run.tokens / "train").is_dir()
    with run.start(overwrite=True):
        pass
    assert not run.tokens.exists()
    (run.internal / "notes.txt").write_text("mine")
    with (
        pytest.raises(UserError, match="files that are not a run's"),
        run.start(overwrite=True),
    ):
        pass


def test_a_start_that_fails_leaves_things_as_they_were(run: RunFolder) -> None:
    with pytest.raises(UserError, match="no data"), run.start(overwrite=False):
        raise UserError("no data")
    assert not run.root.exists()
    started(run)
    run.metrics.write_text("numbers")
    with pytest.raises(KeyboardInterrupt), run.start(overwrite=True):
        assert not run.config.exists()
        run.metrics.write_text("others")
        raise KeyboardInterrupt
    assert run.saved_options().max_steps == 10
    assert run.metrics.read_text() == "numbers"
    assert [path.name for path in run.root.parent.iterdir()] == ["run"]


def test_an_overwriting_start_that_was_killed_gives_the_old_run_back(run: RunFolder) -> None:
    started(run)
    run.metrics.write_text("numbers")
    run.root.rename(run.root.with_name(".run.old"))  # as a kill in the middle leaves it
    (run.tokens / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="already holds a run"), run.start(overwrite=False):
        pass
    assert run.metrics.read_text() == "numbers"
    assert not run.tokens.exists()
    assert [path.name for path in run.root.parent.iterdir()] == ["run"]


def test_options_are_kept_with_absolute_paths(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = RunFolder(Path("out") / "run")
    started(relative, model=None, preset="shapes/config.json", tokenizer=Path("tok"), eval_data=(Path("e"), Path("f")))
    saved = relative.saved_options()
    assert saved.preset == str(tmp_path / "shapes" / "config.json")
    assert (saved.tokenizer, saved.data) == (tmp_path / "tok", (tmp_path / "d.txt",))
    assert saved.eval_data == (tmp_path / "e", tmp_path / "f")
    assert saved.output == run.root
    # the same command line, given again, is the same run
    again = options(relative, model=None, preset="shapes/config.json", tokenizer=Path("tok"), resume=True)
    assert relative.resumed_options(again) == saved.model_copy(update={"resume": True})
    named = RunFolder(Path("named"))
    started(named, model=None, preset="gpt-j-tiny", tokenizer=Path("tok"))
    assert named.saved_options().preset == "gpt-j-tiny"


def test_no_run_to_resume(run: RunFolder) -> None:
    with pytest.raises(UserError, match="holds no run to resume; leave --resume out to start one"):
        run.saved_options()
    with pytest.raises(UserError, match="holds no run to resume"):
        run.merged({"resume": True})


def test_a_resumed_run_keeps_its_options_and_takes_new_ones_where_it_may(run: RunFolder) -> None:
    started(run, learning_rate=1e-4, dropout=0.1, precision="bf16", seed=3)
    given = options(run, resume=True, learning_rate=2e-4, max_steps=20, micro_batch_size=2)
    resumed = run.resumed_options(given)
    assert (resumed.learning_rate, resumed.max_steps, resumed.micro_batch_size) == (2e-4, 20, 2)
    assert (resumed.dropout, resumed.precision, resumed.seed) == (0.1, "bf16", 3)
    longer = run.resumed_options(TrainOptions.parse(run.merged({"resume": True, "epochs": 2})))
    assert (longer.max_steps, longer.epochs) == (None, 2)


def test_what_a_resumed_run_cannot_change_is_named(run: RunFolder) -> None:
    started(run, dropout=0.1)
    changes = {
        "model": Path("m2"),
        "data": (Path("d2.txt"),),
        "eval_data": (Path("e.txt"),),
        "sequence_length": 32,
        "packing": "none",
        "global_batch_size": 8,
        "seed": 1,
        "weight_decay": 0.2,
        "adam_beta2": 0.99,
        "max_grad_norm": 2.0,
        "dropout": 0.2,
        "precision": "fp32",
        "warmup_steps": 2,
        "lr_scheduler_type": "linear",
    }
    with pytest.raises(UserError) as raised:
        run.resumed_options(options(run, resume=True, **changes))
    for name in changes:
        assert f"{name} (was " in str(raised.value)
    assert "dropout (was 0.1, now 0.2)" in str(raised.value)
    assert "start a new run with another --output" in str(raised.value)


def publish(run: RunFolder, folder: Path, files: dict[str, str]) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    run.publish(folder)


def test_a_result_appears_in_the_root_without_a_second_copy(run: RunFolder) -> None:
    started(run)
    publish(run, run.best, {"config.json": "{}", "model.safetensors": "weights"})
    assert sorted(path.name for path in run.root.iterdir()) == ["config.json", "model.safetensors", "run"]
    assert (run.root / "model.safetensors").samefile(run.best / "model.safetensors")


def test_a_newer_result_replaces_all_of_the_older(run: RunFolder) -> None:
    started(run)
    index = "model.safetensors.index.json"
    shards = {f"model-0000{i}-of-00002.safetensors": "old" for i in (1, 2)}
    publish(run, run.best, {"config.json": "old", index: "old"} | shards)
    (run.root / "notes.md").write_text("mine")
    publish(run, run.last, {"config.json": "new", "model.safetensors": "new"})
    assert {path.name: path.read_text() for path in run.root.iterdir() if path.is_file()} == {
        "config.json": "new",
        "model.safetensors": "new",  # with the old index beside it, the old shards would be read
        "notes.md": "mine",
    }
    assert (run.best / index).read_text() == "old"  # what was published stays where it came from
    publish(run, run.best, {"config.json": "newer", index: "newer"} | dict.fromkeys(shards, "newer"))
    assert sorted(path.name for path in run.root.glob("model*")) == [*sorted(shards), index]


def test_publishing_on_a_file_system_without_links(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    started(run)
    publish(run, run.best, {"config.json": "{}", "model.safetensors": "weights"})
    assert (run.root / "model.safetensors").read_text() == "weights"
    assert not (run.root / "model.safetensors").samefile(run.best / "model.safetensors")
