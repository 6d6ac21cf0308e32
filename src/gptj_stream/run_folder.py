"""The run folder: which files a training run keeps, and where.

RUN/                 the result, in Hugging Face layout, once the run has ended
RUN/run/config.yaml  the resolved options
RUN/run/id.json      a name of its own, by which its store is known, and that of the run it replaced
RUN/run/metrics.jsonl, tensorboard/
RUN/run/checkpoints/ resumable state
RUN/run/best/step-N  weights of the lowest evaluation loss so far, in Hugging Face layout
RUN/run/store/       a file store, where --store names no other place
RUN/run/tokens/      the data's tokens, where --data named text
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from gptj_stream.errors import UserError
from gptj_stream.files import read_json, recover, set_aside, sync_folder, write_text
from gptj_stream.options import STORES, TrainOptions, read_yaml

# What a resumed run may change without becoming another run.
_FREE_TO_CHANGE = {
    "max_steps", "epochs", "micro_batch_size", "kept_layers", "learning_rate", "min_learning_rate",
    "device", "memory", "device_memory", "trace", "eval_steps", "save_steps", "save_total_limit", "logging_steps",
    "export", "resume", "overwrite", "output",
}  # fmt: skip


class RunFolder:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.internal = root / "run"
        self.config = self.internal / "config.yaml"
        self.id = self.internal / "id.json"
        self.metrics = self.internal / "metrics.jsonl"
        self.tensorboard = self.internal / "tensorboard"
        self.checkpoints = self.internal / "checkpoints"
        self.best = self.internal / "best"
        self.last = self.internal / "last"
        self.tokens = self.internal / "tokens"

    @contextmanager
    def start(self, *, overwrite: bool, inputs: Iterable[Path] = ()) -> Iterator[None]:
        """Make the folder ready for a new run; the block opens it and keeps its options.

        A run that is overwritten is moved aside, and deleted when the block ends; if that fails, it comes back.

        Args:
            inputs: files and folders that the run will read.

        Raises:
            UserError: it holds other files, or a run and `overwrite` is not given or would delete an input, or it
                cannot be made.
        """
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root} is a file; --output names a folder")
        recover(self.root, replaced=self.config.is_file())  # an --overwrite that was killed before it kept its options
        if self.config.is_file() and not overwrite:
            raise UserError(f"{self.root} already holds a run; add --resume to go on or --overwrite to delete it")
        if not self.config.is_file() and not self._holds_tokens_at_most():
            raise UserError(f"{self.root} holds files that are not a run's; use another --output")
        if overwrite and (inside := [path for path in inputs if path.resolve().is_relative_to(self.root.resolve())]):
            raise UserError(f"--overwrite would delete {inside[0]}, which the run reads; use another --output")
        old = self.identity()
        with set_aside(self.root) if overwrite and self.root.is_dir() else nullcontext():
            try:
                self.internal.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{self.root}: cannot be made ({error.strerror}); use another --output") from None
            identity = {"run": secrets.token_hex(8), "replaces": old["run"]}
            try:
                write_text(self.id, json.dumps(identity))
                yield
            except BaseException:
                with suppress(OSError):  # tokens that are already made stay: the next try uses them
                    self.id.unlink()
                    self.internal.rmdir()
                    self.root.rmdir()
                raise

    def identity(self) -> dict[str, str | None]:
        """The run's own name (`run`), and that of the run it overwrote (`replaces`)."""
        if not self.id.is_file():
            return {"run": None, "replaces": None}
        values = read_json(self.id)
        return {"run": values.get("run"), "replaces": values.get("replaces")}

    def has_steps(self) -> bool:
        """Whether a step's metrics were written."""
        return self.metrics.is_file() and self.metrics.stat().st_size > 0

    def _holds_tokens_at_most(self) -> bool:
        """Nothing, or what a run leaves that ended before it kept its options. The next one uses the tokens."""
        if not self.root.is_dir():
            return True
        inside = [*self.root.iterdir(), *(self.internal.iterdir() if self.internal.is_dir() else ())]
        unfinished = self.config.with_name(f".{self.config.name}.tmp")  # of one that was killed in writing it
        return {self.internal, self.tokens, self.id, unfinished}.issuperset(inside)

    def saved_options(self) -> TrainOptions:
        """The options that the run was started with.

        Raises:
            UserError: there is no run here.
        """
        if not self.config.is_file():
            raise UserError(f"{self.root} holds no run to resume; leave --resume out to start one")
        return TrainOptions.parse(read_yaml(self.config))

    def merged(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Option values for a resumed run, which need to name what changes alone.

        Raises:
            UserError: there is no run here.
        """
        return TrainOptions.layered(self.saved_options().model_dump(), values)

    def resumed_options(self, given: TrainOptions) -> TrainOptions:
        """The run's own options with the given ones over them, where those may change.

        Raises:
            UserError: an option that would make it another run; the message names each with both values.
        """
        saved = self.saved_options()
        values = {name: _absolute(name, value) for name, value in given if name in given.model_fields_set}
        differing = {
            name: value
            for name, value in values.items()
            if value not in (None, "auto", getattr(saved, name))  # left open, or the same
        }
        if fixed := [name for name in differing if name not in _FREE_TO_CHANGE]:
            what = ", ".join(f"{name} (was {getattr(saved, name)}, now {differing[name]})" for name in fixed)
            raise UserError(f"{self.root}: a resumed run cannot change {what}; start a new run with another --output")
        return TrainOptions.parse(self.merged(differing))

    def keep_options(self, options: TrainOptions) -> None:
        """With absolute paths, so that the run can be resumed from anywhere."""
        absolute = {name: _absolute(name, value) for name, value in options}
        write_text(self.config, options.model_copy(update=absolute).to_yaml())

    def publish(self, folder: Path) -> None:
        """Show a finished checkpoint folder's files in the run's root as well.

        `config.json` goes first and comes last: without it nobody takes the folder for a checkpoint.
        """
        (self.root / "config.json").unlink(missing_ok=True)
        files = sorted(folder.iterdir(), key=lambda path: path.name == "config.json")
        # weights published before, in another number of files: a leftover index would be read in place of the new ones
        for old in self.root.glob("model*.safetensors*"):
            if old.name not in {path.name for path in files}:
                old.unlink()
        for path in files:
            temporary = self.root / f".{path.name}.tmp"
            temporary.unlink(missing_ok=True)
            try:
                os.link(path, temporary)  # the same bytes under a second name: no time, no space
            except OSError:  # a file system without links
                shutil.copyfile(path, temporary)
            temporary.replace(self.root / path.name)
        sync_folder(self.root)


def _absolute(name: str, value: object) -> object:
    if isinstance(value, tuple):
        return tuple(_absolute(name, each) for each in value)
    is_path = {"preset": str(value).endswith(".json"), "store": value not in STORES}.get(name, False)
    if isinstance(value, str) and is_path:
        return str(Path(value).resolve())
    return value.resolve() if isinstance(value, Path) else value
