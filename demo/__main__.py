"""Run the demonstration: `make demo`, or `python -m demo`.

Each step prints the command it runs, so that it can be repeated with other data.
"""

from __future__ import annotations

import json
import lzma
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer, GPTJForCausalLM
from transformers.utils.logging import disable_progress_bar

import gptj_stream
from demo.corpus import write_corpus

OUT = Path("demo/out")
DATA = OUT / "data"
BASE, FINETUNED = OUT / "base", OUT / "fine-tuned"
EXAMPLES = 6

console = Console(highlight=False)


def main() -> None:
    started = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    console.rule("The corpus: this Python's standard library, one module in ten held out")
    write_corpus(DATA)

    console.rule("1. A byte-level BPE tokenizer from the training modules")
    gptj(f"tokenizer train --data {DATA}/modules-train.jsonl --vocab-size 4096 --output {OUT}/tokenizer")

    console.rule("2. A small GPT-J from fresh weights")
    gptj(f"prepare --model {OUT}/tokenizer --data {DATA}/modules-train.jsonl --output {OUT}/tokens")
    gptj(f"train --config demo/pretrain.yaml --tokenizer {OUT}/tokenizer --data {OUT}/tokens --output {BASE}")

    console.rule("3. Fine-tuning that checkpoint: function source -> docstring, loss on the docstring alone")
    show_record(DATA / "docstrings-train.jsonl")
    gptj(
        f"train --config demo/finetune.yaml --model {BASE} --data {DATA}/docstrings-train.jsonl "
        f"--eval-data {DATA}/docstrings-held-out.jsonl --output {FINETUNED}"
    )

    console.rule("4. Before and after, on held-out modules")
    results = {
        (model, part): evaluate(model, part) for model in (BASE, FINETUNED) for part in ("modules", "docstrings")
    }
    console.print(evaluation_table(results))

    console.rule("5. Docstrings for functions it has never seen")
    write_examples(OUT / "examples.jsonl")
    generated = gptj(
        f"generate --model {FINETUNED} --prompt-file {OUT}/examples.jsonl --max-new-tokens 48 --json", keep=True
    )
    console.print(example_table([json.loads(line)["text"] for line in generated.splitlines()]))

    console.rule("6. The result in transformers")
    compare_with_transformers()
    before, after = (results[model, "docstrings"]["loss"] for model in (BASE, FINETUNED))
    console.print(f"\nFine-tuning took the held-out docstring loss from {before:.2f} to {after:.2f}.")
    console.print(f"The model is in {FINETUNED}; all of this took {(time.monotonic() - started) / 60:.1f} minutes.")


def gptj(arguments: str, *, keep: bool = False) -> str:
    """Print and run one command; return its standard output if that is to be kept."""
    console.print(f"\n$ gptj {arguments}", style="bold", soft_wrap=True)
    command = [sys.executable, "-m", "gptj_stream", *shlex.split(arguments)]
    run = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE if keep else None)
    if run.returncode:
        sys.exit(run.returncode)
    return run.stdout or ""


def evaluate(model: Path, part: str) -> dict[str, Any]:
    data = DATA / f"{part}-held-out.jsonl"
    output = gptj(f"evaluate --model {model} --data {data} --sequence-length 256 --json", keep=True)
    result: dict[str, Any] = json.loads(output)
    return result


def show_record(path: Path) -> None:
    record = min(records(path)[:50], key=lambda record: len(record["prompt"]))
    console.print(f"A record: {json.dumps(record)}", style="dim", soft_wrap=True)


def evaluation_table(results: dict[tuple[Path, str], dict[str, Any]]) -> Table:
    text = "".join(record["text"] for record in records(DATA / "modules-held-out.jsonl")).encode()
    xz = 8 * len(lzma.compress(text, preset=9)) / len(text)
    table = Table("held-out", "measure", "base", "fine-tuned", f"xz -9 on the same {len(text):,} bytes")
    for part, measure, key, digits in (
        ("modules", "loss", "loss", 4),
        ("modules", "perplexity", "perplexity", 2),
        ("modules", "bits per byte", "bits_per_byte", 3),
        ("docstrings", "loss", "loss", 4),
        ("docstrings", "perplexity", "perplexity", 2),
    ):
        values = [f"{results[model, part][key]:.{digits}f}" for model in (BASE, FINETUNED)]
        table.add_row(part, measure, *values, f"{xz:.3f}" if key == "bits_per_byte" else "")
    return table


def examples() -> list[dict[str, str]]:
    """Held-out functions that fit on a screen, spread over the modules."""
    short = [record for record in records(DATA / "docstrings-held-out.jsonl") if record["prompt"].count("\n") <= 8]
    return short[:: max(1, len(short) // EXAMPLES)][:EXAMPLES]


def write_examples(path: Path) -> None:
    path.write_text("".join(json.dumps({"prompt": record["prompt"]}) + "\n" for record in examples()))


def example_table(generated: list[str]) -> Table:
    table = Table("function", "generated", "true", show_lines=True)
    for record, text in zip(examples(), generated, strict=True):
        function = record["prompt"].removesuffix("\n# Docstring:")
        table.add_row(*map(Text, (function, text.strip(), record["completion"].strip())))  # no markup in brackets
    return table


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compare_with_transformers() -> None:
    text = examples()[0]["prompt"]
    disable_progress_bar()
    ids = AutoTokenizer.from_pretrained(FINETUNED)(text)["input_ids"]
    ours = gptj_stream.load(FINETUNED, precision="fp32").logits(ids)
    with torch.no_grad():
        theirs = GPTJForCausalLM.from_pretrained(FINETUNED).eval()(torch.tensor([ids])).logits[0]
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    console.print(f"Logits of {len(ids)} tokens: ours and GPTJForCausalLM's differ by {difference:.1e} of the largest.")
    if difference > 1e-5:  # fp32 rounding in another order of sums; measured 1e-6
        sys.exit("the logits do not agree")


if __name__ == "__main__":
    main()
