"""The forward and backward pass, layer by layer: fetch a layer, run every micro-batch through it, go on.

The executor knows the model's layers and the store's interface, nothing else. Where the weights live, when they move
and when they are updated is the store's affair, so every store gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gptj_stream.batch import MicroBatch
from gptj_stream.config import ModelConfig
from gptj_stream.layout import Layout
from gptj_stream.model import Attention, DocumentAttention, layer_templates, rotary_table
from gptj_stream.seeding import derived_seed
from gptj_stream.store import Store
from gptj_stream.token_sums import accumulate


def model_layouts(config: ModelConfig) -> list[Layout]:
    """Each layer's flat layout, in the order of the forward pass: what a store is made from."""
    return [Layout.of(prefix, module) for prefix, module in layer_templates(config)]


def block_activation_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype, *, inner: bool = True) -> int:
    """What a block keeps from forward to backward, beside its input and output: 4 values of the model's width a token
    and, with `inner`, one of the inner width.

    They are rotated q and k, v and the attention's output, and the feed-forward's values before GELU. Dropout adds the
    masks of the two outputs.
    """
    values = (6 if config.resid_pdrop else 4) * config.n_embd + inner * config.inner_dim
    return tokens * dtype.itemsize * values


@dataclass(frozen=True)
class _Pass:
    """What stays the same for a micro-batch from layer to layer."""

    input_ids: Tensor
    targets: Tensor | None
    table: Tensor
    attention: Callable[[int], Attention]


class _Place(NamedTuple):
    """A piece of a layer's weights, by where it lies in the layer's buffer."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, piece: Tensor, start: int) -> _Place:
        """Of a buffer that starts `start` elements into its storage."""
        return cls(piece.size(), piece.stride(), int(piece.storage_offset()) - start)

    def view(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.size, self.stride, flat.storage_offset() + self.offset)


class _StandIn(torch.autograd.Function):
    """A weight for the forward pass; its gradient goes to a leaf of the same shape that has no memory."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Graph:
    """One layer's recorded forward for one micro-batch, without a hold on the layer's weights or on its norm's output.

    Where the backward pass needs weights, the graph remembers their place, and finds them in the buffer that
    `differentiate` is given. So a store may reuse the forward's buffer, and a kept graph costs activations alone. Every
    matrix product of a block needs the norm's output, which is cheap to compute again.
    """

    def __init__(
        self,
        flat: Tensor,
        weights: dict[str, Tensor],
        x: Tensor,
        run: Callable[[dict[str, Tensor], Tensor], Tensor],
        norm: nn.Module | None,
    ) -> None:
        """Record `run(weights, x)`; `weights` are views of `flat`, and a block begins with its `norm`, `ln_1`."""
        self._x = x.detach().requires_grad_(x.is_floating_point())  # the first layer's input is token ids
        self._leaves = {
            name: weight.new_empty(()).expand(weight.shape).requires_grad_() for name, weight in weights.items()
        }
        # numbers, not `flat` itself: what the graph refers to lives as long as it
        start, storage = int(flat.storage_offset()), flat.untyped_storage().data_ptr()
        self._norm = norm
        # [the layer's buffer, the norm's output] while the graph is differentiated; not `self`, for a cycle through
        # autograd's nodes is one that Python cannot collect
        at_hand: list[Tensor] = []
        self._at_hand = at_hand
        if norm:
            self._norm_places = {name: _Place.of(weights[f"ln_1.{name}"], start) for name, _ in norm.named_parameters()}

        def pack(saved: Tensor) -> Tensor | _Place | None:
            if saved.untyped_storage().data_ptr() == storage:
                return _Place.of(saved, start)
            return None if any(saved is output for output in normed) else saved

        def unpack(saved: Tensor | _Place | None) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            flat, normed_again = at_hand
            return normed_again if saved is None else saved.view(flat)

        with _outputs(norm) as normed, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            stand_ins = {name: _StandIn.apply(self._leaves[name], weight) for name, weight in weights.items()}  # type: ignore[no-untyped-call]
            self.out = run(stand_ins, self._x)

    def differentiate(self, flat: Tensor, grad_output: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """The gradients by the weights, in their order, and by the input (meaningless where that is token ids)."""
        normed = self._x
        if self._norm:
            with torch.no_grad():
                weights = {name: place.view(flat) for name, place in self._norm_places.items()}
                normed = functional_call(self._norm, weights, (self._x,))
        self._at_hand += [flat, normed]
        leaves = [*self._leaves.values(), self._x] if self._x.requires_grad else [*self._leaves.values()]
        grads = torch.autograd.grad(self.out, leaves, grad_output.expand_as(self.out))
        return grads[: len(self._leaves)], grads[-1]


@contextmanager
def _outputs(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """What a module returns within the block; held no longer than that."""
    outputs: list[Tensor] = []
    if module is None:
        yield outputs
        return
    hook = module.register_forward_hook(lambda _module, _arguments, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()
        outputs.clear()


class Executor:
    """Runs a GPT-J whose weights come from a store.

    Args:
        config: the model's shape, and its dropout rates.
        store: where its layers live.
        kept_layers: for how many blocks (the last ones) the activations stay from forward to backward.
        narrow_layers: for how many blocks before those they stay but for the feed-forward's inner ones, half of them,
            for a tenth more work. The others keep their input alone and are computed again, for a third more work.
            All of it gives the same bits.
        seed: of the dropout masks.
    """

    def __init__(
        self, config: ModelConfig, store: Store, *, kept_layers: int = 0, narrow_layers: int = 0, seed: int = 0
    ) -> None:
        self.config = config
        self.store = store
        self._modules = [module for _, module in layer_templates(config)]
        self._head = len(self._modules) - 1
        self._first_kept = self._head - kept_layers
        self._first_narrow = self._first_kept - narrow_layers
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
        passes = [self._pass(batch, self.config.attn_pdrop) for batch in batches]
        inputs: list[list[Tensor]] = [[each.input_ids for each in passes]]  # inputs[layer][i]: of micro-batch i
        kept: dict[tuple[int, int], _Graph] = {}
        for layer, flat in self.store.stream(range(self._head)):
            outputs = []
            for i, (each, x) in enumerate(zip(passes, inputs[layer], strict=True)):
                with self._dropout_masks(step, layer, i):
                    if layer >= self._first_narrow:
                        kept[layer, i] = self._record(layer, flat, x, each, keep_inner=layer >= self._first_kept)
                        outputs.append(kept[layer, i].out.detach())
                    else:
                        with torch.no_grad():
                            outputs.append(self._run(layer, self._weights(layer, flat), x, each))
            inputs.append(outputs)
            del outputs

        losses: list[Tensor] = []
        targets = sum(batch.target_count for batch in batches)
        assert targets, "a step without a target has no mean loss"
        grad_outputs = [torch.full((), 1 / targets, device=self.store.device)] * len(passes)
        for layer, flat in self.store.stream(range(self._head, -1, -1)):
            gradient = self.store.gradient(layer)
            for i, (each, x) in enumerate(zip(passes, inputs.pop(), strict=True)):
                graph = kept.pop((layer, i), None)
                if graph is None:
                    with self._dropout_masks(step, layer, i):
                        graph = self._record(layer, flat, x, each)
                if layer == self._head:
                    losses.append(graph.out.detach().sum(dtype=torch.float64))
                grads, grad_outputs[i] = graph.differentiate(flat, grad_outputs[i])
                for (_, view), grad in zip(self.store.layouts[layer].views(gradient), grads, strict=True):
                    if i == 0:
                        view.copy_(grad)
                    else:
                        accumulate(view, grad)
                del graph, grads, grad  # before the next ones are made
            self.store.put_gradient(layer, gradient)
        return [loss.item() for loss in losses]

    @torch.no_grad()
    def token_losses(self, batch: MicroBatch) -> Tensor:
        """Negative log-likelihood of every target in nats, (N,) fp32, 0 where there is no target."""
        return self._forward(self._pass(batch, dropout=0.0))[: len(batch.targets)]

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
        device = self.store.device
        table = rotary_table(positions.to(device), self.config.rotary_dim)
        return self._forward(_Pass(input_ids.to(device), None, table, attention), rows)

    def _forward(self, each: _Pass, rows: Tensor | None = None) -> Tensor:
        self._set_training(False)
        x = each.input_ids
        for layer, flat in self.store.stream(range(self._head + 1)):
            if layer == self._head and rows is not None:
                x = x[rows.to(x.device)]
            x = self._run(layer, self._weights(layer, flat), x, each)
        return x

    def _pass(self, batch: MicroBatch, dropout: float) -> _Pass:
        batch = batch.padded()
        device, attend = self.store.device, DocumentAttention(batch.lengths, dropout)
        table = rotary_table(batch.positions.to(device), self.config.rotary_dim)
        return _Pass(batch.input_ids.to(device), batch.targets.to(device), table, lambda _: attend)

    def _weights(self, layer: int, flat: Tensor) -> dict[str, Tensor]:
        return {slot.local: view for slot, view in self.store.layouts[layer].views(flat)}

    def _run(
        self, layer: int, weights: dict[str, Tensor], x: Tensor, each: _Pass, *, keep_inner: bool = True
    ) -> Tensor:
        arguments: tuple[object, ...]
        if layer == 0:
            arguments = (x,)
        elif layer == self._head:
            arguments = (x, each.targets)
        else:
            arguments = (x, each.table, each.attention(layer - 1), keep_inner)
        # strict: without it a missing name silently computes with the template's own, empty weights
        out: Tensor = functional_call(self._modules[layer], weights, arguments, strict=True)
        return out

    def _record(self, layer: int, flat: Tensor, x: Tensor, each: _Pass, *, keep_inner: bool = True) -> _Graph:
        def run(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return self._run(layer, weights, x, each, keep_inner=keep_inner)

        return _Graph(flat, self._weights(layer, flat), x, run, getattr(self._modules[layer], "ln_1", None))

    def _set_training(self, training: bool) -> None:
        for module in self._modules:
            module.train(training)

    @contextmanager
    def _seeded(self, step: int, layer: int, index: int) -> Iterator[None]:
        key = derived_seed(self._seed, step, layer, index)
        if self.store.device.type == "cuda":
            with torch.random.fork_rng([self.store.device]), torch.cuda.device(self.store.device):
                torch.cuda.manual_seed(key)
                yield
        else:
            with torch.random.fork_rng([]):
                torch.default_generator.manual_seed(key)
                yield

    def _dropout_masks(self, step: int, layer: int, index: int) -> AbstractContextManager[None]:
        """Masks that depend on these numbers alone, so that a second forward, or a resumed run, draws the same."""
        config = self.config
        if config.embd_pdrop or config.resid_pdrop or config.attn_pdrop:
            return self._seeded(step, layer, index)
        return nullcontext()
