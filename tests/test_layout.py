from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from gptj_stream.config import PRESETS, ModelConfig
from gptj_stream.executor import model_layouts
from gptj_stream.layout import Layout

if TYPE_CHECKING:
    from conftest import Tiny


class Mixed(nn.Module):
    """Parameters of 0 to 3 dimensions, vectors between the matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(()))
        self.linear = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(7)
        self.cube = nn.Parameter(torch.empty(2, 3, 4))


def test_matrices_come_first() -> None:
    layout = Layout.of("layer.", Mixed())
    assert [(slot.name, slot.local, slot.shape, slot.offset) for slot in layout.slots] == [
        ("layer.cube", "cube", (2, 3, 4), 0),
        ("layer.linear.weight", "linear.weight", (5, 3), 24),
        ("layer.scale", "scale", (), 39),
        ("layer.linear.bias", "linear.bias", (5,), 40),
        ("layer.norm.weight", "norm.weight", (7,), 45),
        ("layer.norm.bias", "norm.bias", (7,), 52),
    ]
    assert (layout.matrix_numel, layout.numel) == (39, 59)


def test_views_cover_the_buffer_once() -> None:
    layout = Layout.of("", Mixed())
    flat = torch.zeros(layout.numel)
    for slot, view in layout.views(flat):
        assert view.shape == slot.shape
        assert view.is_contiguous()
        view.add_(1.0)  # seen in the buffer, so these are views and not copies
    assert torch.equal(flat, torch.ones(layout.numel))


def test_views_do_not_mix_elements() -> None:
    layout = Layout.of("", Mixed())
    parts = dict(layout.views(torch.arange(layout.numel)))
    assert torch.equal(torch.cat([view.flatten() for view in parts.values()]), torch.arange(layout.numel))


@pytest.mark.parametrize("name", PRESETS)
def test_the_layouts_hold_every_parameter(name: str) -> None:
    config = PRESETS[name]
    layouts = model_layouts(config)
    assert len(layouts) == config.n_layer + 2
    assert sum(layout.numel for layout in layouts) == config.parameters
    assert {layout.numel for layout in layouts[1:-1]} == {config.block_parameters}


def test_six_billion() -> None:
    layouts = model_layouts(PRESETS["gpt-j-6b"])
    assert sum(layout.numel for layout in layouts) == 6_050_882_784
    assert layouts[1].numel == 201_355_264


def test_names_and_shapes_are_those_of_transformers(small_config: ModelConfig, tiny: type[Tiny]) -> None:
    ours = {slot.name: slot.shape for layout in model_layouts(small_config) for slot in layout.slots}
    theirs = {name: tuple(tensor.shape) for name, tensor in tiny.oracle(small_config).state_dict().items()}
    assert ours == theirs
