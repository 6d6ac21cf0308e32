"""The training job: what it learns, what it leaves, and that a stopped run goes on as if nothing had happened."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptj_stream.batch import IGNORE
from gptj_stream.config import ModelConfig
from gptj_stream.data.batches import Batches
from gptj_stream.data.packing import pack
from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.data.tokens import TokenDataset
from gptj_stream.errors import UserError
from gptj_stream.evaluate import evaluate
from gptj_stream.options import EvaluateOptions, TrainOptions
from gptj_stream.report import Advance, Report
from gptj_stream.run_folder import RunFolder
from gptj_stream.train import train

if TYPE_CHECKING:
    pass

Start = Callable[..., TrainOptions]


@pytest.fixture
def from_checkpoint(checkpoint: Path, corpus: Path, tmp_path: Path) -> Start:
    """Options of a short run from the checkpoint; keyword arguments change them."""

    def options(**changes: Any) -> TrainOptions:
        values = {
            "model": checkpoint,
            "data": (corpus / "docs.jsonl",),
            "output": tmp_path / "run",
            "precision": "fp32",
            "max_steps": 6,
            "learning_rate": 3e-3,
            "global_batch_size": 8,
            "micro_batch_size": 3,
            "save_steps": 2,
        }
        return TrainOptions(**values | changes)

    return options


def rows(run: Path, key: str = "loss") -> list[dict[str, float]]:
    """The rows of metrics.jsonl that have `key`."""
    lines = (run / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if key in row]


def losses(run: Path, key: str = "loss") -> list[tuple[int, float]]:
    return [(int(row["step"]), row[key]) for row in rows(run, key)]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415  (seconds)

    events = EventAccumulator(str(run / "run" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_it_learns_and_transformers_loads_the_result(trained: Path, job_config: ModelConfig) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415  (seconds)

    history = [loss for _, loss in losses(trained)]
    # fresh weights know nothing: uniform is ln V, and logits of variance v cost v/2 more; here v is about 1
    assert 0 < history[0] - math.log(job_config.vocab_size) < 1
    assert history[-1] < 1.0  # the corpus is made of 16 phrases
    model = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    prompt = tokenizer("The old fox", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert tokenizer.decode(out[0])[len("The old fox") :].split()[0] in {"sees", "finds", "likes", "hears", "follows"}


def test_steps_equal_those_of_transformers_and_torch(
    from_checkpoint: Start, tiny: Any, job_config: ModelConfig
) -> None:
    """Four steps of the usual loop: transformers' model, torch's AdamW, clipping, warm-up and cosine."""
    options = from_checkpoint(max_steps=4, warmup_steps=2, packing="none", max_grad_norm=0.5, min_learning_rate=1e-4)
    result = train(options)

    dataset = TokenDataset.open(RunFolder(result.output).tokens / "train")
    batches = Batches(dataset, pack(dataset, 64, "none", "split"), micro_batch_size=1, global_batch_size=8, seed=0)
    model = tiny.oracle(job_config).train()
    parameters = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for _, p in parameters if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for _, p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    cosine = [1.5e-3, 3e-3, 3e-3, 1e-4 + (3e-3 - 1e-4) / 2]
    for row, learning_rate in zip(rows(result.output), cosine, strict=True):
        step = batches.next_step()
        targets = sum(batch.target_count for batch in step)
        total = sum(
            F.cross_entropy(model(b.input_ids[None]).logits[0], b.targets, ignore_index=IGNORE, reduction="sum")
            for b in step
        )
        optimizer.zero_grad()
        (total / targets).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        # fp32 sums in another order, a few parts in 1e7 each; Adam's division makes 1e-5 of it over four steps
        assert row["loss"] == pytest.approx(total.item() / targets, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert row["learning_rate"] == pytest.approx(learning_rate, rel=1e-12)
        assert row["target_tokens"] == targets
    moved = weights(result.output)
    for name, parameter in parameters:
        # a gradient near 0 may change its sign, which moves a weight by up to one learning rate: hence the mean
        assert (moved[name] - parameter).abs().mean() < 1e-2 * 3e-3, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("data", ["docs.jsonl", "pairs.jsonl"])
def test_a_run_in_two_parts_equals_one_in_one(
    *, from_checkpoint: Start, corpus: Path, tmp_path: Path, precision: str, data: str
) -> None:
    def options(name: str, **changes: Any) -> TrainOptions:
        return from_checkpoint(
            output=tmp_path / name,
            data=(corpus / data,),
            eval_data=(corpus / "heldout.jsonl",),
            eval_steps=3,
            precision=precision,
            dropout=0.1,
            lr_scheduler_type="constant",
            **changes,
        )

    whole = train(options("whole", max_steps=9, export="last"))
    first = rows(train(options("parts", max_steps=5, export="last")).output)
    parts = train(options("parts", max_steps=9, export="last", resume=True))
    assert rows(parts.output)[:5] == first  # with their times: these steps were not run again
    assert losses(parts.output) == losses(whole.output)
    assert [step for step, _ in losses(parts.output)] == list(range(1, 10))
    # the shorter run evaluated at its end too
    assert [row for row in losses(parts.output, "eval_loss") if row[0] != 5] == losses(whole.output, "eval_loss")
    assert same_weights(parts.output, whole.output)
    assert (parts.step, parts.loss, parts.evaluation) == (whole.step, whole.loss, whole.evaluation)


@pytest.mark.parametrize("state", ["fp32", "compact"])
def test_the_store_makes_no_difference(state: str, from_checkpoint: Start, tmp_path: Path) -> None:
    outputs = []
    for store in ("resident", "host", "file", str(tmp_path / "disk" / "store")):
        name = store.rpartition("/")[2] + str(len(outputs))
        options = from_checkpoint(
            store=store, optimizer_state=state, output=tmp_path / name, kept_layers=len(outputs) % 3
        )
        outputs.append(train(options).output)
    for output in outputs[1:]:
        assert losses(output) == losses(outputs[0])
        assert losses(output, "grad_norm") == losses(outputs[0], "grad_norm")
        assert same_weights(output, outputs[0])
    assert (tmp_path / "disk" / "store" / "state.bin").is_file()
    assert not list((outputs[2] / "run" / "checkpoints").glob("*"))  # the store is its own checkpoint


@pytest.mark.parametrize("state", ["fp32", "compact"])
def test_a_killed_streamed_run_resumes_to_the_same_bits(
    state: str, gptj_process: Callable[..., subprocess.Popen[str]], from_checkpoint: Start, tmp_path: Path
) -> None:
    """Killed several times, at whatever moment it was in: in a write, an update, a commit."""
    common = {"max_steps": 40, "store": "file", "optimizer_state": state}
    whole = train(from_checkpoint(output=tmp_path / "whole", **common)).output
    config, killed = tmp_path / "killed.yaml", RunFolder(tmp_path / "killed")
    config.write_text(from_checkpoint(output=killed.root, **common).to_yaml())
    process = gptj_process("train", "--config", config)
    kills = 0
    for step in (3, 11, 24, 31):
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if killed.metrics.exists() and len(killed.metrics.read_text().splitlines()) >= step:
                break
            time.sleep(0.002)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        process = gptj_process("train", "--output", killed.root, "--resume")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert kills >= 3, "it ended before it could be killed"
    assert losses(killed.root) == losses(whole)
    assert same_weights(killed.root, whole)


class Interrupting(Report):
    """Stops the run in the middle of its first evaluation, as Ctrl-C does."""

    @contextmanager
    def bar(self, what: str, total: float, *, steps: bool = False, every: int = 0) -> Iterator[Advance]:
        def advance(done: float, text: str) -> None:
            if text.startswith("evaluating"):
                raise KeyboardInterrupt

        yield advance


def test_an_evaluation_that_was_cut_short_is_made_again(from_checkpoint: Start, corpus: Path, tmp_path: Path) -> None:
    """A store goes on from its last step, which is the one that was being evaluated."""
    common = {"store": "file", "eval_data": (corpus / "heldout.jsonl",), "eval_steps": 2, "max_steps": 4}
    whole = train(from_checkpoint(output=tmp_path / "whole", **common)).output
    options = from_checkpoint(output=tmp_path / "cut", **common)
    with pytest.raises(KeyboardInterrupt):
        train(options, Interrupting())
    assert not losses(options.output, "eval_loss")
    train(options.model_copy(update={"resume": True}))
    assert losses(options.output, "eval_loss") == losses(whole, "eval_loss")
    assert losses(options.output) == losses(whole)
    assert same_weights(options.output, whole)


def test_trace(from_checkpoint: Start, tmp_path: Path) -> None:
    """Every step reads, computes, updates and writes each layer."""
    train(from_checkpoint(store="file", optimizer_state="compact", max_steps=3, trace=tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    layers = {
        lane: {e["args"].get("layer") for e in spans if e["cat"] == lane} for lane in ("read", "compute", "update")
    }
    assert layers == {key: {0, 1, 2, 3} for key in ("read", "compute", "update")}
    assert {e["args"]["step"] for e in spans if e["cat"] == "step"} == {1, 2, 3}
    assert sum(e["cat"] == "compute" for e in spans) == 3 * 7  # four layers there, three back: the head turns around


def test_a_killed_run_resumes_to_the_same_bits(
    *,
    gptj_process: Callable[..., subprocess.Popen[str]],
    from_checkpoint: Start,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = {"max_steps": 90, "eval_data": (corpus / "heldout.jsonl",), "eval_steps": 30, "save_steps": 10}
    whole = train(from_checkpoint(output=tmp_path / "whole", dropout=0.1, **common)).output

    config = tmp_path / "killed.yaml"
    killed = RunFolder(tmp_path / "killed")
    config.write_text(from_checkpoint(output=killed.root, dropout=0.1, **common).to_yaml())
    process = gptj_process("train", "--config", config)
    wanted = killed.checkpoints / "step-00000020" / "state.json"
    deadline = time.monotonic() + 60
    while not wanted.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    with killed.metrics.open("a") as file:  # as when the kill cuts a line short
        file.write('{"step": 99, "loss": 1.')

    # from another folder, by a relative path, and with nothing but what says to go on
    monkeypatch.chdir(tmp_path)
    resumed = gptj_process("train", "--output", "killed", "--resume")
    _, errors = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, errors
    assert "resumed at step" in errors
    assert losses(killed.root) == losses(whole)
    assert losses(killed.root, "eval_loss") == losses(whole, "eval_loss")
    assert same_weights(killed.root, whole)
    steps = list(range(1, 91))
    assert [step for step, _ in losses(killed.root)] == steps
    shown = scalars(killed.root)
    assert [step for step, _ in shown["loss"]] == steps
    assert [value for _, value in shown["loss"]] == pytest.approx([loss for _, loss in losses(whole)], rel=1e-6)  # fp32
    assert [step for step, _ in shown["eval_loss"]] == [30, 60, 90]


def test_a_run_that_never_reached_a_checkpoint_starts_over(from_checkpoint: Start) -> None:
    first = train(from_checkpoint())
    history, exported = losses(first.output), (first.output / "model.safetensors").read_bytes()
    shutil.rmtree(RunFolder(first.output).checkpoints)
    again = train(from_checkpoint(resume=True))
    assert losses(again.output) == history
    assert [step for step, _ in scalars(again.output)["loss"]] == list(range(1, 7))
    assert (again.output / "model.safetensors").read_bytes() == exported


def test_resuming_a_finished_run_changes_nothing(from_checkpoint: Start) -> None:
    first = train(from_checkpoint())
    history, exported = rows(first.output), (first.output / "model.safetensors").read_bytes()
    again = train(from_checkpoint(resume=True))
    assert (again.step, again.loss) == (first.step, first.loss)
    assert rows(again.output) == history
    assert (again.output / "model.safetensors").read_bytes() == exported


def test_resume_refuses_what_would_make_it_another_run(from_checkpoint: Start, corpus: Path, tmp_path: Path) -> None:
    run = train(from_checkpoint()).output
    other = tmp_path / "other.jsonl"
    shutil.copy(corpus / "heldout.jsonl", other)
    with pytest.raises(UserError) as raised:
        train(from_checkpoint(resume=True, seed=3, weight_decay=0.2, data=(other,), global_batch_size=16))
    message = str(raised.value)
    for difference in ("seed (was 0, now 3)", "weight_decay (was 0.1, now 0.2)", "global_batch_size (was 8, now 16)"):
        assert difference in message
    assert "data (was " in message
    assert "learning_rate" not in message
    with pytest.raises(UserError, match="is at step 6 already, beyond the 4 asked for; raise --max-steps"):
        train(from_checkpoint(resume=True, max_steps=4))
    # refusing did no harm
    assert train(from_checkpoint(resume=True, max_steps=7, save_steps=1, learning_rate=1e-4)).step == 7
    assert [step for step, _ in losses(run)] == list(range(1, 8))
    assert rows(run)[-1]["learning_rate"] < 1e-4


def test_resume_can_be_given_a_new_length_in_epochs(from_checkpoint: Start) -> None:
    run = train(from_checkpoint()).output
    rows_per_epoch = Batches(
        (dataset := TokenDataset.open(RunFolder(run).tokens / "train")), pack(dataset, 64, "concat"), 1, 1, 0
    ).rows_per_epoch
    result = train(TrainOptions.parse(RunFolder(run).merged({"output": run, "resume": True, "epochs": 1.5})))
    assert result.step == math.ceil(1.5 * rows_per_epoch / 8)


def test_the_number_of_checkpoints_is_limited(from_checkpoint: Start) -> None:
    for limit, kept in ((1, ["step-00000005"]), (3, ["step-00000003", "step-00000004", "step-00000005"])):
        result = train(from_checkpoint(max_steps=5, save_steps=1, save_total_limit=limit, overwrite=True))
        assert sorted(path.name for path in RunFolder(result.output).checkpoints.iterdir()) == kept


def test_best_and_last(from_checkpoint: Start, trained: Path, corpus: Path, tmp_path: Path) -> None:
    """From a model that knows the corpus, a high rate on one document makes the held-out loss rise again."""
    one = tmp_path / "one.jsonl"
    one.write_text((corpus / "docs.jsonl").read_text().splitlines()[0] + "\n")
    held_out = (corpus / "heldout.jsonl",)
    common = {"model": trained, "data": (one,), "eval_data": held_out, "eval_steps": 1, "lr_scheduler_type": "constant"}
    best = train(from_checkpoint(output=tmp_path / "best", **common))
    last = train(from_checkpoint(output=tmp_path / "last", export="last", **common))

    evaluations = dict(losses(best.output, "eval_loss"))
    assert list(evaluations.items()) == losses(last.output, "eval_loss")
    lowest = min(evaluations, key=evaluations.__getitem__)
    assert lowest < 6, "the held-out loss did not rise"
    assert (best.exported_step, last.exported_step, best.step) == (lowest, 6, 6)
    for run, step in ((best.output, lowest), (last.output, 6)):
        measured = evaluate(EvaluateOptions(model=run, data=held_out, precision="fp32", micro_batch_size=3))
        assert measured.loss == evaluations[step]  # the same sums in the same order: to the bit
    assert last.evaluation is not None
    assert last.evaluation.loss == evaluations[6]

    # the other choice, after the fact
    assert train(from_checkpoint(output=tmp_path / "best", export="last", resume=True, **common)).exported_step == 6
    assert same_weights(best.output, last.output)
    resumed = train(from_checkpoint(output=tmp_path / "last", export="best", resume=True, max_steps=7, **common))
    assert resumed.exported_step == 7  # the best since the choice


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        (torch.float16, "auto", torch.float16),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "auto", torch.float32),
        (torch.float16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_the_exported_dtype(
    *, from_checkpoint: Start, checkpoint: Path, tmp_path: Path, stored: torch.dtype, asked: str, written: torch.dtype
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    save_file({name: t.to(stored) for name, t in weights(checkpoint).items()}, model / "model.safetensors")
    run = train(from_checkpoint(model=model, max_steps=1, save_dtype=asked)).output
    assert {tensor.dtype for tensor in weights(run).values()} == {written}
    assert json.loads((run / "config.json").read_text())["dtype"] == str(written).removeprefix("torch.")
    # the run's own state keeps every bit
    state = load_file(RunFolder(run).checkpoints / "step-00000001" / "layer-000.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_metrics_and_tensorboard_agree(trained: Path) -> None:
    shown = scalars(trained)
    for tag in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory", "epoch", "data_seconds"):
        assert [step for step, _ in shown[tag]] == list(range(1, 101)), tag
        expected = [value for _, value in losses(trained, tag)]
        assert [value for _, value in shown[tag]] == pytest.approx(expected, rel=1e-6), tag  # events hold fp32
    for tag in ("eval_loss", "eval_perplexity", "eval_bits_per_byte"):
        assert [step for step, _ in shown[tag]] == [50, 100], tag
    for row in rows(trained):
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert all(math.isfinite(value) for value in row.values())


def test_steps_follow_from_epochs(from_checkpoint: Start, corpus: Path) -> None:
    pairs = len((corpus / "pairs.jsonl").read_text().splitlines())
    result = train(
        from_checkpoint(data=(corpus / "pairs.jsonl",), max_steps=None, epochs=0.8, packing="none", global_batch_size=7)
    )
    assert result.step == math.ceil(0.8 * pairs / 7)
    assert rows(result.output)[-1]["epoch"] == pytest.approx(0.8)  # the last step takes what is left of it


def test_the_saved_options_say_what_was_used(from_checkpoint: Start, corpus: Path) -> None:
    run = train(from_checkpoint(max_steps=None, eval_data=(corpus / "heldout.jsonl",))).output
    saved = RunFolder(run).saved_options()
    assert (saved.packing, saved.long_documents, saved.sequence_length) == ("concat", None, 64)
    assert (saved.max_steps, saved.epochs, saved.precision) == (None, 1.0, "fp32")
    assert (saved.resume, saved.overwrite) == (False, False)


def test_prepared_data_gives_the_same_run(
    from_checkpoint: Start, checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    from gptj_stream.options import PrepareOptions  # noqa: PLC0415
    from gptj_stream.prepare import prepare  # noqa: PLC0415

    prepare(PrepareOptions(model=checkpoint, data=(corpus / "docs.jsonl",), output=tmp_path / "tokens"))
    raw = train(from_checkpoint(output=tmp_path / "raw")).output
    prepared = train(from_checkpoint(output=tmp_path / "prepared", data=(tmp_path / "tokens",))).output
    assert losses(prepared) == losses(raw)
    assert same_weights(prepared, raw)


def test_what_changes_speed_alone_does_not_change_the_result(from_checkpoint: Start, tmp_path: Path) -> None:
    runs = [
        train(from_checkpoint(output=tmp_path / str(kept), kept_layers=kept, dropout=0.1)).output for kept in (0, 1, 2)
    ]
    assert same_weights(runs[0], runs[1])
    assert same_weights(runs[0], runs[2])
    # sums in another order: fp32's rounding over six steps
    whole = train(from_checkpoint(output=tmp_path / "whole", micro_batch_size=8)).output
    parts = train(from_checkpoint(output=tmp_path / "parts", micro_batch_size=1)).output
    assert [x for _, x in losses(whole)] == pytest.approx([x for _, x in losses(parts)], rel=1e-5)


def test_the_seed_decides(from_checkpoint: Start, tmp_path: Path) -> None:
    a, b, c = (
        train(from_checkpoint(output=tmp_path / name, seed=seed, max_steps=2, dropout=0.1)).output
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert same_weights(a, b)
    assert not same_weights(a, c)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    from_checkpoint: Start, checkpoint: Path, tokenizer_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """One token's embedding is finite but overflows; it stands in one document, which has its turn at some step."""
    tokenizer = Tokenizer.load(tokenizer_folder)
    (token,) = tokenizer.encode("~")
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    tensors = weights(checkpoint)
    tensors["transformer.wte.weight"][token] = torch.tensor([3e38, -3e38]).repeat(16)
    save_file(tensors, model / "model.safetensors")
    documents = (corpus / "docs.jsonl").read_text().splitlines()[:40]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([*documents, json.dumps({"text": "One ~ fish."})]))

    options = from_checkpoint(model=model, data=(data,), packing="none", max_steps=5, save_steps=1, save_total_limit=1)
    with pytest.raises(UserError) as raised:
        train(options)
    done = len(rows(options.output))
    assert 0 < done < 5, "choose another seed: the document's turn should come in the middle"
    dataset = TokenDataset.open(RunFolder(options.output).tokens / "train")
    batches = Batches(dataset, pack(dataset, 64, "none"), micro_batch_size=3, global_batch_size=8, seed=0)
    for step in range(1, done + 2):
        hit = [i for i, batch in enumerate(batches.next_step(), 1) if (batch.input_ids == token).any()]
        assert bool(hit) == (step == done + 1)
    message = str(raised.value)
    assert f"step {done + 1}: the loss of micro-batch {hit[0]} of 3 is not finite" in message
    assert f"sequences from {8 * done} on" in message
    assert f"the state after step {done} is saved" in message

    # What is kept is the state of the last good step: that of a run from the healthy checkpoint, which differs from
    # this one in the row alone until the document has its turn.
    healthy = from_checkpoint(**dict(options) | {"model": checkpoint, "output": tmp_path / "ok", "save_total_limit": 5})
    train(healthy)
    (kept,) = RunFolder(options.output).checkpoints.iterdir()
    assert kept.name == f"step-{done:08}"
    for path in kept.glob("layer-*.safetensors"):
        expected = load_file(RunFolder(healthy.output).checkpoints / kept.name / path.name)
        for name, tensor in load_file(path).items():
            assert torch.isfinite(tensor).all()
            row = slice(token * 32, (token + 1) * 32) if path.name == "layer-000.safetensors" else slice(0)
            tensor[row] = expected[name][row]
            assert torch.equal(tensor, expected[name])

    with pytest.raises(UserError, match=rf"step {done + 1}: the loss"):  # resumed, it comes to the same place
        train(options.model_copy(update={"resume": True}))
    assert [step for step, _ in losses(options.output)] == list(range(1, done + 1))


def test_an_absurd_learning_rate_ends_in_a_message_or_a_finite_model(from_checkpoint: Start) -> None:
    options = from_checkpoint(learning_rate=0.9, max_grad_norm=0.0, max_steps=30, precision="bf16")
    try:
        train(options)
    except UserError as error:
        assert "is not finite" in str(error)
    history = losses(options.output)
    assert [step for step, _ in history] == list(range(1, len(history) + 1))
    assert all(math.isfinite(loss) for _, loss in history)
