"""Random tiny GPT-Js, as transformers' model and as ours with the same weights, and what to feed them.

Then what whole jobs need: a corpus, a tokenizer, checkpoint folders, a finished run, the command line.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptj_stream.batch import IGNORE, MicroBatch
from gptj_stream.cli import main
from gptj_stream.config import ModelConfig
from gptj_stream.data.tokenizer import Tokenizer, train_tokenizer
from gptj_stream.executor import model_layouts
from gptj_stream.optim import AdamW
from gptj_stream.options import TrainOptions
from gptj_stream.store import ResidentStore, Store
from gptj_stream.train import train

if TYPE_CHECKING:
    from transformers import GPTJForCausalLM

CPU = torch.device("cpu")

# The models here are tiny. A second thread gains nothing, and where other processes want the cores (as with
# pytest-xdist) waiting for it at every operation makes a step 15 to 50 times slower.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is measured of this machine is remembered for the tests alone."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


class Tiny:
    """The helpers of `tiny`, in one class since test modules cannot import one another."""

    @staticmethod
    @torch.no_grad()
    def oracle(config: ModelConfig, seed: int = 0) -> GPTJForCausalLM:
        """transformers' model. Every parameter is random, so that none can hide by being 0 or 1."""
        from transformers import GPTJConfig, GPTJForCausalLM  # noqa: PLC0415  (seconds, and few tests need it)

        model = GPTJForCausalLM(GPTJConfig(**config.to_huggingface()))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:  # activations of about 1 throughout, and scores that are far from uniform
                parameter.copy_(noise if "wte" in name else noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(0.2 * noise + (1.0 if ".ln_" in name and name.endswith("weight") else 0.0))
        return model

    @staticmethod
    @torch.no_grad()
    def store(
        config: ModelConfig,
        model: GPTJForCausalLM,
        *,
        dtype: torch.dtype = torch.float32,
        optimizer: AdamW | None = None,
        device: torch.device = CPU,
        cls: type[ResidentStore] = ResidentStore,
    ) -> ResidentStore:
        """A store with the weights of transformers' model."""
        store = cls(model_layouts(config), device=device, dtype=dtype, optimizer=optimizer)
        parameters = dict(model.named_parameters())
        for layer, layout in enumerate(store.layouts):
            flat = torch.empty(layout.numel)
            for slot, view in layout.views(flat):
                view.copy_(parameters[slot.name])
            store.load(layer, flat)
        return store

    @staticmethod
    def batch(config: ModelConfig, lengths: Sequence[int], *, seed: int = 0, ignored: float = 0.0) -> MicroBatch:
        """Random documents. The last token of each has no target, nor has a share `ignored` of the others."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(config.vocab_size, (sum(lengths),), generator=generator)
        targets = ids.roll(-1)
        targets[torch.tensor(lengths).cumsum(0) - 1] = IGNORE
        targets[torch.rand(len(ids), generator=generator) < ignored] = IGNORE
        return MicroBatch(ids, targets, tuple(lengths))

    @staticmethod
    def oracle_logits(model: GPTJForCausalLM, batch: MicroBatch) -> Tensor:
        """transformers' logits, (N, V): each document on its own, without padding."""
        documents = batch.input_ids.split(list(batch.lengths))
        return torch.cat([model(document[None], use_cache=False).logits[0] for document in documents])

    @staticmethod
    def oracle_loss(model: GPTJForCausalLM, batches: Sequence[MicroBatch]) -> Tensor:
        """Mean over all target tokens of a step, by transformers' logits and PyTorch's cross-entropy."""
        logits = torch.cat([Tiny.oracle_logits(model, batch) for batch in batches]).float()
        return F.cross_entropy(logits, torch.cat([batch.targets for batch in batches]), ignore_index=IGNORE)

    @staticmethod
    def gradients(store: Store) -> dict[str, Tensor]:
        """A copy of what the last step left in the store, by Hugging Face's names."""
        return {
            slot.name: view.clone()
            for layer, layout in enumerate(store.layouts)
            for slot, view in layout.views(store.home.fetch_gradient(layer))
        }

    @staticmethod
    def weights(store: Store) -> dict[str, Tensor]:
        """A copy of the store's weights, by Hugging Face's names."""
        return {
            slot.name: view.clone()
            for layer, layout in enumerate(store.layouts)
            for slot, view in layout.views(store.read(layer)["weight"])
        }


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(scope="session")
def small_config() -> ModelConfig:
    """Two layers, four heads, a vocabulary that divides by nothing."""
    return ModelConfig(
        vocab_size=101, n_positions=64, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, bos_token_id=0, eos_token_id=0
    )


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", 0)


class Outcome(NamedTuple):
    """How a command ended: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def gptj(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def gptj_process() -> Callable[..., subprocess.Popen[str]]:
    """Start a command in a process of its own, its output in pipes."""

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "error", "-m", "gptj_stream", *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=environment
        )

    return start


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents (docs.jsonl), others (heldout.jsonl), questions and answers (pairs.jsonl), text.txt."""
    draw = random.Random(0)
    parts = (
        ("The cat", "A dog", "My bird", "The old fox", "One fish", "Das Kätzchen"),
        ("sees", "finds", "likes", "hears", "follows"),
        ("the river", "a tree", "the moon 🌙", "some bread", "an open door"),
    )

    def document() -> str:
        sentences = (" ".join(draw.choice(words) for words in parts) for _ in range(draw.randint(1, 6)))
        return " ".join(sentence + "." for sentence in sentences)

    def pair() -> dict[str, str]:
        who, does, what = (draw.choice(words) for words in parts)
        return {"prompt": f"{who} {does}?", "completion": f" {what}."}

    folder = tmp_path_factory.mktemp("corpus")
    records = {
        "docs.jsonl": [{"text": document()} for _ in range(100)],
        "heldout.jsonl": [{"text": document()} for _ in range(15)],
        "pairs.jsonl": [pair() for _ in range(60)],
    }
    for name, lines in records.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "text.txt").write_text("\n".join(document() for _ in range(20)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 340 tokens, learned from the corpus."""
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(iter([(corpus / "docs.jsonl").read_text(encoding="utf-8"), "日本"]), 340, folder)
    return folder


@pytest.fixture(scope="session")
def job_config(tokenizer_folder: Path) -> ModelConfig:
    """A model for that tokenizer, with rows to spare as GPT-J has."""
    tokenizer = Tokenizer.load(tokenizer_folder)
    eos = tokenizer.eos_token_id
    return ModelConfig(
        vocab_size=tokenizer.vocab_size + 12,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        bos_token_id=eos,
        eos_token_id=eos,
    )


@pytest.fixture(scope="session")
def checkpoint(job_config: ModelConfig, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder as transformers saves it. Not to be changed: tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("checkpoint") / "gptj"
    Tiny.oracle(job_config).save_pretrained(folder)
    for path in tokenizer_folder.iterdir():
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def preset(job_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json for fresh weights."""
    path = tmp_path_factory.mktemp("preset") / "config.json"
    path.write_text(json.dumps(job_config.to_huggingface()))
    return path


@pytest.fixture(scope="session")
def trained(preset: Path, tokenizer_folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run whose model has learned the corpus's words. Not to be changed."""
    options = TrainOptions(
        preset=str(preset),
        tokenizer=tokenizer_folder,
        data=(corpus / "docs.jsonl",),
        eval_data=(corpus / "heldout.jsonl",),
        output=tmp_path_factory.mktemp("run") / "run",
        packing="documents",
        max_steps=100,
        eval_steps=50,
        save_steps=40,
        learning_rate=1e-2,
        warmup_steps=5,
        precision="fp32",
    )
    return train(options).output
