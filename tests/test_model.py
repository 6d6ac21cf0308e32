from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers.models.gptj.modeling_gptj import GPTJBlock

from gptj_stream.config import ModelConfig
from gptj_stream.executor import model_layouts
from gptj_stream.model import Block, DocumentAttention, Head, initialize, layer_templates, rotary_table, rotate

if TYPE_CHECKING:
    from conftest import Tiny


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(2, 2), (8, 2), (16, 8), (16, 16), (256, 64)])
def test_rotary_is_a_complex_rotation(head_dim: int, rotary_dim: int) -> None:
    """Pair i at position p is multiplied by exp(i p theta_i), here in complex fp64."""
    positions = torch.tensor([0, 1, 2, 500, 2047])
    x = torch.randn(5, 3, head_dim, generator=torch.Generator().manual_seed(0))
    theta = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), positions[:, None, None] * theta)
    pairs = torch.view_as_complex(x[..., :rotary_dim].double().unflatten(-1, (-1, 2)).contiguous())
    expected = torch.cat((torch.view_as_real(pairs * turn).flatten(-2), x[..., rotary_dim:].double()), dim=-1)
    actual = rotate(x, rotary_table(positions, rotary_dim))
    # 1e-3: the angle is computed in fp32 as in GPT-J, and 2047 has its last digit at 1.2e-4; up to 2 it is 2e-7
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(actual[:3].double(), expected[:3], rtol=0, atol=1e-6)
    assert torch.equal(actual[..., rotary_dim:], x[..., rotary_dim:])
    assert torch.equal(actual[0], x[0])


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> Tensor:
        return (rotate(q, rotary_table(torch.tensor([i]), 16)) * rotate(k, rotary_table(torch.tensor([j]), 16))).sum()

    # 1e-5: fp32 angles of up to 60
    torch.testing.assert_close(score(7, 3), score(60, 56), rtol=0, atol=1e-5)
    assert abs(score(7, 3) - score(7, 2)) > 0.01


def test_rotary_keeps_the_dtype() -> None:
    x = torch.randn(4, 2, 8, dtype=torch.bfloat16)
    table = rotary_table(torch.arange(4), 4)
    assert table.dtype == torch.float32
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())  # rounded once, at the end


@pytest.mark.parametrize("lengths", [(1,), (9,), (5, 5, 5), (1, 1), (7, 1, 12, 3)], ids=str)
def test_documents_attend_to_their_own_past(lengths: tuple[int, ...]) -> None:
    """Against softmax over all pairs in fp64, with every pair masked that is not of one document and in order."""
    total = sum(lengths)
    q, k, v = torch.randn(3, total, 2, 4, generator=torch.Generator().manual_seed(0))
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    allowed = (document[:, None] == document) & (torch.arange(total)[:, None] >= torch.arange(total))
    scores = torch.einsum("nhk,mhk->hnm", q.double(), k.double()) / 2.0  # sqrt(4)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    expected = torch.einsum("hnm,mhk->nhk", weights, v.double())
    actual = DocumentAttention(lengths)(q, k, v)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)  # fp32 on values of about 1


def test_the_block_is_that_of_transformers(small_config: ModelConfig, tiny: type[Tiny]) -> None:
    theirs = tiny.oracle(small_config).transformer.h[1]
    assert isinstance(theirs, GPTJBlock)
    with torch.device("meta"):
        ours = Block(small_config)
    x = torch.randn(13, small_config.n_embd, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(13)
    causal = torch.full((13, 13), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        arguments = (x, rotary_table(positions, small_config.rotary_dim), DocumentAttention((13,)))
        actual = functional_call(ours, dict(theirs.named_parameters()), arguments, strict=True)
        expected = theirs(x[None], attention_mask=causal, position_ids=positions[None])
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(actual, expected.view_as(actual), rtol=0, atol=1e-5)  # fp32 on values of up to 10


def test_the_head_gives_logits_or_losses(small_config: ModelConfig, tiny: type[Tiny]) -> None:
    theirs = tiny.oracle(small_config)
    with torch.device("meta"):
        head = Head(small_config)
    weights = {name: tensor for name, tensor in theirs.named_parameters() if "ln_f" in name or "lm_head" in name}
    x = torch.randn(6, small_config.n_embd, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, -100, 0, 100, 7, -100])
    with torch.no_grad():
        logits = functional_call(head, weights, (x,), strict=True)
        losses = functional_call(head, weights, (x, targets), strict=True)
        assert torch.equal(logits, theirs.lm_head(theirs.transformer.ln_f(x)))
    expected = -logits.log_softmax(-1)[torch.arange(6), targets.clamp(0)] * (targets >= 0)
    torch.testing.assert_close(losses, expected, rtol=0, atol=2e-6)  # fp32 on losses of up to 10


def test_templates_hold_no_memory(small_config: ModelConfig) -> None:
    templates = layer_templates(small_config)
    assert [prefix for prefix, _ in templates] == ["", "transformer.h.0.", "transformer.h.1.", ""]
    assert templates[1][1] is templates[2][1]
    tensors = [tensor for _, module in templates for tensor in (*module.parameters(), *module.buffers())]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


SCHEME = {  # mesh-transformer-jax, layers.py: the standard deviation before the cut, for V 1024, D 256 and 8 layers
    "transformer.wte.weight": 1024**-0.5,
    "transformer.h.3.attn.q_proj.weight": 256**-0.5,
    "transformer.h.3.attn.k_proj.weight": 256**-0.5,
    "transformer.h.3.attn.v_proj.weight": 256**-0.5,
    "transformer.h.3.attn.out_proj.weight": 2 / 8 * 256**-0.5,
    "transformer.h.3.mlp.fc_in.weight": 256**-0.5,
    "transformer.h.3.mlp.fc_out.weight": 2 / 8 * 256**-0.5,
    "lm_head.weight": 256**-0.5,
}
FRESH = ModelConfig(
    vocab_size=1024, n_embd=256, n_layer=8, n_head=4, rotary_dim=16, bos_token_id=0, eos_token_id=0, n_inner=512
)


def fresh(name: str, seed: int = 0) -> Tensor:
    shapes = {slot.name: slot.shape for layout in model_layouts(FRESH) for slot in layout.slots}
    parameter = torch.full(shapes[name], torch.nan)
    initialize(name, parameter, FRESH, torch.Generator().manual_seed(seed))
    return parameter


def test_every_parameter_is_matrix_norm_or_bias() -> None:
    slots = [slot for layout in (model_layouts(FRESH)[i] for i in (0, 4, -1)) for slot in layout.slots]
    assert {slot.name for slot in slots if len(slot.shape) > 1} == set(SCHEME)
    vectors = {slot.name: fresh(slot.name) for slot in slots if len(slot.shape) == 1}
    ones = {name for name, vector in vectors.items() if (vector == 1).all()}
    assert ones == {"transformer.h.3.ln_1.weight", "transformer.ln_f.weight"}
    zeros = {name for name, vector in vectors.items() if (vector == 0).all()}
    assert zeros == {
        "transformer.h.3.ln_1.bias",
        "transformer.h.3.mlp.fc_in.bias",
        "transformer.h.3.mlp.fc_out.bias",
        "transformer.ln_f.bias",
        "lm_head.bias",
    }
    assert set(vectors) == ones | zeros


@pytest.mark.parametrize("name", SCHEME)
def test_fresh_weights(name: str) -> None:
    """Normal, cut at two standard deviations, which leaves 0.87963 of the standard deviation and 95 % of one sigma's
    neighbours: P(|z| < 1) = 0.68269 / 0.95450 = 0.71523 after the cut."""
    std, weight = SCHEME[name], fresh(name).double()
    assert weight.abs().max() <= 2 * std * (1 + 1e-6)  # fp32's rounding of the bound
    assert weight.abs().max() > 1.99 * std
    deviation = weight.numel() ** -0.5  # 65,536 values or more: 0.4 % at most
    assert abs(weight.mean()) < 5 * std * deviation
    assert weight.std() / std == pytest.approx(0.87963, rel=5 * deviation)
    assert (weight.abs() < std).double().mean() == pytest.approx(0.71523, abs=5 * deviation)


def test_fresh_weights_depend_on_the_generator_alone() -> None:
    name = "lm_head.weight"
    torch.manual_seed(1)
    first = fresh(name)
    torch.manual_seed(2)
    assert torch.equal(fresh(name), first)
    assert not torch.equal(fresh(name, seed=1), first)
