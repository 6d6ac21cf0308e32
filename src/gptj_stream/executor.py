"""The forward and backward pass, layer by layer: fetch a layer, run every micro-batch through it, go on.

The executor knows the model's layers and the store's interface, nothing else. Where the weights live, when they move
and when they are updated is the store's affair, so every store gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from gptj_stream.batch import MicroBatch
from gptj_stream.config import ModelConfig
from gptj_stream.layout import Layout
from gptj_stream.model import Attention, DocumentAttention, layer_templates, rotary_table
from gptj_stream.store import Store


def model_layouts(config: ModelConfig) -> list[Layout]:
    """Each layer's flat layout, in the order of the forward pass: what a store is made from."""
    return [Layout.of(prefix, module) for prefix, module in layer_templates(config)]


def block_activation_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """What a block keeps from forward to backward: 8 values of the model's width a token and 2 of the inner width.

    They are its input, the norm's output, q, k, v, their rotated forms and the attention's output, and the
    feed-forward's before and after GELU.
    """
    return tokens * dtype.itemsize * (8 * config.n_embd + 2 * config.inner_dim)


@dataclass(frozen=True)
class _Item:
    """A micro-batch on the device, with what is the same for it in every layer."""

    batch: MicroBatch
    table: Tensor
    attend: Attention


@dataclass(frozen=True)
class _Graph:
    """One layer's recorded forward for one micro-batch: the leaves to differentiate by, and the output."""

    x: Tensor | None
    parameters: list[Tensor]
    out: Tensor


class Executor:
    """Runs a GPT-J whose weights come from a store.

    Args:
        config: the model's shape, and its dropout rates.
        store: where its layers live.
        kept_layers: for how many blocks (the last ones) the activations stay from forward to backward. The others
            keep their input alone and are computed again, which gives the same bits for a third more work.
        seed: of the dropout masks.
    """

    def __init__(self, config: ModelConfig, store: Store, *, kept_layers: int = 0, seed: int = 0) -> None:
        self.config = config
        self.store = store
        self._modules = [module for _, module in layer_templates(config)]
        self._head = len(self._modules) - 1
        self._first_kept = self._head - kept_layers
        self._seed = seed

    def gradients(self, batches: Sequence[MicroBatch], step: int) -> list[float]:
        """Leave in the store the gradient of the mean loss over all target tokens of `batches`.

        Every layer is fetched once for the forward pass and once for the backward pass, whatever the number of
        micro-batches; their gradients are summed in fp32.

        Args:
            step: keys the dropout masks, with the seed, the layer and the micro-batch.

        Returns:
            Each micro-batch's loss, summed over its target tokens, in nats.
        """
        self._set_training(True)
        targets = sum(batch.target_count for batch in batches)
        items = [self._item(batch, self.config.attn_pdrop) for batch in batches]
        inputs: list[list[Tensor | None]] = [[None] * len(items)]  # inputs[layer][i] of micro-batch i; embed has none
        kept: dict[tuple[int, int], _Graph] = {}

        for layer, flat in self.store.stream(range(self._head)):
            outputs: list[Tensor | None] = []
            for i, item in enumerate(items):
                with self._dropout_masks(step, layer, i):
                    if self._first_kept <= layer:
                        graph = kept[layer, i] = self._record(layer, flat, inputs[layer][i], item)
                        outputs.append(graph.out.detach())
                    else:
                        with torch.no_grad():
                            outputs.append(self._run(layer, self._weights(layer, flat), inputs[layer][i], item))
            inputs.append(outputs)

        losses: list[Tensor] = []
        grad_outputs = [torch.full((), 1 / targets, device=self.store.device)] * len(items)
        for layer, flat in self.store.stream(range(self._head, -1, -1)):
            gradient = self.store.gradient(layer)
            layer_inputs = inputs.pop()
            for i, item in enumerate(items):
                graph_or_none = kept.pop((layer, i), None)
                if graph_or_none is None:
                    with self._dropout_masks(step, layer, i):
                        graph_or_none = self._record(layer, flat, layer_inputs[i], item)
                graph, layer_inputs[i] = graph_or_none, None
                if layer == self._head:
                    losses.append(graph.out.detach().sum(dtype=torch.float64))
                leaves = graph.parameters if graph.x is None else [graph.x, *graph.parameters]
                grads = list(torch.autograd.grad(graph.out, leaves, grad_outputs[i].expand_as(graph.out)))
                if graph.x is not None:
                    grad_outputs[i] = grads.pop(0)
                for (_, view), grad in zip(self.store.layouts[layer].views(gradient), grads, strict=True):
                    if i == 0:
                        view.copy_(grad)
                    else:
                        view.add_(grad)
            self.store.put_gradient(layer, gradient)
        return [loss.item() for loss in losses]

    @torch.no_grad()
    def token_losses(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Negative log-likelihood of every target in nats, (N,) fp32 a micro-batch, 0 where there is no target."""
        self._set_training(False)
        items = [self._item(batch, 0.0) for batch in batches]
        xs: list[Tensor | None] = [None] * len(items)
        for layer, flat in self.store.stream(range(self._head + 1)):
            weights = self._weights(layer, flat)
            xs = [self._run(layer, weights, x, item) for x, item in zip(xs, items, strict=True)]
        return [x for x in xs if x is not None]

    @torch.no_grad()
    def logits(
        self, input_ids: Tensor, positions: Tensor, attention: Callable[[int], Attention], rows: Tensor | None = None
    ) -> Tensor:
        """Next-token logits.

        Args:
            input_ids: (N,) int64.
            positions: (N,) int64, each token's place in its document.
            attention: the attention of a block, by the block's number.
            rows: (M,) int64, the tokens whose logits are wanted; all of them if None.

        Returns:
            (M, vocab_size), in the store's dtype.
        """
        self._set_training(False)
        table = rotary_table(positions.to(self.store.device), self.config.rotary_dim)
        x = input_ids.to(self.store.device)
        for layer, flat in self.store.stream(range(self._head + 1)):
            arguments: tuple[Tensor | Attention, ...] = (x,)
            if 0 < layer < self._head:
                arguments = (x, table, attention(layer - 1))
            elif layer == self._head and rows is not None:
                arguments = (x[rows],)
            x = functional_call(self._modules[layer], self._weights(layer, flat), arguments, strict=True)
        return x

    def _item(self, batch: MicroBatch, dropout: float) -> _Item:
        table = rotary_table(batch.positions.to(self.store.device), self.config.rotary_dim)
        return _Item(batch.to(self.store.device), table, DocumentAttention(batch.lengths, dropout))

    def _weights(self, layer: int, flat: Tensor) -> dict[str, Tensor]:
        return {slot.local: view for slot, view in self.store.layouts[layer].views(flat)}

    def _run(self, layer: int, weights: dict[str, Tensor], x: Tensor | None, item: _Item) -> Tensor:
        arguments: tuple[object, ...] = (x, item.table, item.attend)
        if layer == 0:
            arguments = (item.batch.input_ids,)
        elif layer == self._head:
            arguments = (x, item.batch.targets)
        # strict: without it a missing name silently computes with the template's own, empty weights
        out: Tensor = functional_call(self._modules[layer], weights, arguments, strict=True)
        return out

    def _record(self, layer: int, flat: Tensor, x: Tensor | None, item: _Item) -> _Graph:
        weights = {name: view.detach().requires_grad_() for name, view in self._weights(layer, flat).items()}
        x = x if x is None else x.detach().requires_grad_()
        return _Graph(x, list(weights.values()), self._run(layer, weights, x, item))

    def _set_training(self, training: bool) -> None:
        for module in self._modules:
            module.train(training)

    @contextmanager
    def _seeded(self, step: int, layer: int, index: int) -> Iterator[None]:
        devices = [self.store.device] if self.store.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(hash((self._seed, step, layer, index)))  # of integers: the same in every process
            yield

    def _dropout_masks(self, step: int, layer: int, index: int) -> AbstractContextManager[None]:
        """Masks that depend on these numbers alone, so that a second forward, or a resumed run, draws the same."""
        config = self.config
        if config.embd_pdrop or config.resid_pdrop or config.attn_pdrop:
            return self._seeded(step, layer, index)
        return nullcontext()
