from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTJConfig, GPTJForCausalLM

from gptj_stream.config import PRESETS, ModelConfig
from gptj_stream.errors import UserError

if TYPE_CHECKING:
    from conftest import Tiny

SIX_B = PRESETS["gpt-j-6b"]


def test_the_defaults_are_those_of_transformers() -> None:
    theirs = GPTJConfig().to_dict()
    assert {name: theirs[name] for name in ModelConfig.model_fields} == ModelConfig().model_dump()


def test_six_billion() -> None:
    """EleutherAI's model card says 6,053,381,344: it counts what each of 8 shards repeats (the norms, fc_out's bias)
    and the embedding's bias, which checkpoints for PyTorch do not have."""
    assert SIX_B.parameters == 6_050_882_784
    repeated = 28 * (2 * 4096 + 4096) + 2 * 4096
    assert SIX_B.parameters + 7 * repeated + 8 * 4096 == 6_053_381_344
    assert (SIX_B.head_dim, SIX_B.inner_dim, SIX_B.rotary_dim) == (256, 16384, 64)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_presets(name: str) -> None:
    """Counted on transformers' model, without memory for its weights."""
    with torch.device("meta"):
        model = GPTJForCausalLM(GPTJConfig(**PRESETS[name].to_huggingface()))
    assert PRESETS[name].parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name: str) -> None:
    config = PRESETS[name]
    assert ModelConfig.from_huggingface(config.to_huggingface(), "config.json") == config
    theirs = GPTJConfig(**config.to_huggingface())
    assert theirs.architectures == ["GPTJForCausalLM"]
    assert ModelConfig.from_huggingface(theirs.to_dict(), "config.json") == config


def test_round_trip_of_every_field() -> None:
    config = ModelConfig(
        vocab_size=33,
        n_positions=7,
        n_embd=12,
        n_layer=3,
        n_head=2,
        rotary_dim=4,
        n_inner=5,
        resid_pdrop=0.1,
        embd_pdrop=0.2,
        attn_pdrop=0.3,
        layer_norm_epsilon=1e-6,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=None,
    )
    assert ModelConfig.from_huggingface(GPTJConfig(**config.to_huggingface()).to_dict(), "config.json") == config


def test_keys_that_older_checkpoints_have_or_lack() -> None:
    values = SIX_B.to_huggingface() | {
        "tie_word_embeddings": None,
        "n_inner": None,
        "gradient_checkpointing": False,
        "scale_attn_weights": True,
        "summary_type": "cls_index",
        "task_specific_params": {"text-generation": {"do_sample": True}},
        "torch_dtype": "float16",
        "transformers_version": "4.18.0.dev0",
    }
    assert ModelConfig.from_huggingface(values, "config.json") == SIX_B
    del values["tie_word_embeddings"]
    assert ModelConfig.from_huggingface(values, "config.json") == SIX_B


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_neox"}, "model_type is 'gpt_neox'; this program trains GPT-J"),
        ({"model_type": None}, "model_type is None"),
        ({"n_embd": 4097}, "n_embd 4097 is not a multiple of n_head 16"),
        ({"rotary_dim": 63}, "rotary_dim 63 must be even and at most the head size 256"),
        ({"rotary_dim": 258}, "rotary_dim 258 must be even and at most the head size 256"),
        ({"rotary_dim": 0}, "rotary_dim is 0: "),
        ({"rotary_dim": None}, "rotary_dim is None: "),
        ({"n_layer": 0}, "n_layer is 0: "),
        ({"n_inner": 0}, "n_inner is 0: "),
        ({"n_head": "many"}, "n_head is 'many': "),
        ({"vocab_size": -1}, "vocab_size is -1: "),
        ({"activation_function": "relu"}, "activation_function is 'relu': "),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True: "),
        ({"attn_pdrop": 1.0}, "attn_pdrop is 1.0: "),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0: "),
        ({"quantization_config": {"load_in_8bit": True}}, "the checkpoint is quantized"),
    ],
)
def test_refusals_are_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        ModelConfig.from_huggingface(SIX_B.to_huggingface() | change, "model/config.json")
    text = str(caught.value)
    assert text.startswith(f"model/config.json: {message}")
    assert "\n" not in text


def test_without_a_model_type() -> None:
    values = SIX_B.to_huggingface()
    del values["model_type"]
    with pytest.raises(UserError, match="model_type is None"):
        ModelConfig.from_huggingface(values, "config.json")


def test_ids_out_of_range(small_config: ModelConfig) -> None:
    small_config.check_ids([0, 100])
    small_config.check_ids([5] * 64)
    with pytest.raises(UserError, match="token id 101 is out of range of the model's vocabulary of 101"):
        small_config.check_ids([0, 101])
    with pytest.raises(UserError, match="token id -1 is out of range"):
        small_config.check_ids([-1])
    with pytest.raises(UserError, match="65 tokens exceed the model's 64 positions"):
        small_config.check_ids([5] * 65)


def test_with_dropout(small_config: ModelConfig) -> None:
    changed = small_config.with_dropout(0.25)
    assert (changed.embd_pdrop, changed.resid_pdrop, changed.attn_pdrop) == (0.25, 0.25, 0.25)
    assert changed.with_dropout(0.0) == small_config


@pytest.mark.parametrize("n_inner", [None, 50])
def test_training_flops(n_inner: int | None, small_config: ModelConfig, tiny: type[Tiny]) -> None:
    """As PyTorch counts transformers' step, which computes the scores above the diagonal too and projects every
    position: a context of N for each of N tokens, and N targets."""
    config = small_config.model_copy(update={"n_inner": n_inner})
    model, batch = tiny.oracle(config), tiny.batch(config, [24])
    with FlopCounterMode(display=False) as counter:
        tiny.oracle_loss(model, [batch]).backward()
    assert config.training_flops(24, 24, 24.0) == counter.get_total_flops()
