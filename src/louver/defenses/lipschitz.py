"""How steep the blocks of an edge are: how much further apart each carries an image and its noisy twin."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from louver.errors import ConfigError

__all__ = ["block_ends", "graph_of", "lipschitz_constants", "shapes_of", "steepness", "tapped"]


def steepness(clean: Sequence[Tensor], noisy: Sequence[Tensor]) -> Float[Tensor, " blocks"]:
    """k_1 … k_N: the largest ratio in the batch of a block's change to the change that came in; 0 or more, no unit.

    Both hold the images and then what each block gives, h_0 … h_N, one row an image. A row that comes in unchanged
    (all of it cut off by a ReLU) has no ratio and is left out; where all are, the constant is 0. Gradients flow
    through the row with the largest ratio.

    Source: PATROL (arXiv 2307.10981), the Lipschitz regulariser: k_i = sup_x ‖h_i(x+δ) − h_i(x)‖ /
    ‖h_(i−1)(x+δ) − h_(i−1)(x)‖; we differ: the supremum is taken over the rows given.

    >>> h = [torch.ones(2, 3), torch.ones(2, 5)]
    >>> steepness(h, [h[0] + 1, 2 * h[1]])
    tensor([1.2910])
    """
    changes = [
        torch.linalg.vector_norm((there - here).flatten(1), dim=1, dtype=torch.float32)
        for here, there in zip(clean, noisy, strict=True)
    ]
    ratios = []
    for before, after in itertools.pairwise(changes):
        is_changed = before > 0
        ratios.append(torch.where(is_changed, after / torch.where(is_changed, before, 1), 0).amax())
    return torch.stack(ratios)


def lipschitz_constants(
    taps: nn.Module,
    images: Float[Tensor, "n c h w"],
    *,
    noise_std: float,
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Float[Tensor, " blocks"]:
    """`steepness` of the blocks of a `tapped` edge between images and images + δ, δ Gaussian with `noise_std`.

    Both go through the edge as one batch, so that batch normalisation treats them alike; its running statistics stay
    as they are, and dropout is off.

    Raises:
        ConfigError: `noise_std` is not above 0.
    """
    if not noise_std > 0:
        raise ConfigError(f"Lipschitz constants: expected a noise_std above 0, got {noise_std}")
    noise = torch.randn(images.shape, generator=generator, device=generator.device).to(images)
    pair = torch.cat([images, images + noise_std * noise])
    with _undisturbed(taps), autocast():
        values = (pair, *taps(pair))
    n = len(images)
    return steepness([value[:n] for value in values], [value[n:] for value in values])


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Batch normalisation works as it does, but remembers nothing; what draws by chance in training is off."""
    modes = {layer: layer.training for layer in module.modules()}
    norms = [layer for layer in modes if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    tracked = [layer for layer in norms if layer.track_running_stats]
    try:
        for layer in modes:
            if layer not in norms:
                layer.training = False
        for layer in tracked:
            layer.track_running_stats = False
        yield
    finally:
        for layer, was_training in modes.items():
            layer.training = was_training
        for layer in tracked:
            layer.track_running_stats = True


# Blocks


def block_ends(edge: nn.Module, example: Float[Tensor, "n c h w"]) -> list[str]:
    """The steps that end a block of an edge, in order; the last one is the feature.

    A block is what lies between two places where a single tensor crosses and has weights in it: a convolution with its
    normalisation, activation and pooling, or a whole residual block. What comes before the first weights (such as a
    normalisation of the images) belongs to the first block.

    Raises:
        ConfigError: the edge has no graph to follow, or no weights.
    """
    edge = graph_of(edge)
    shapes = shapes_of(edge, example)
    position = {node: i for i, node in enumerate(edge.graph.nodes)}
    data = [node for node in position if node.name in shapes and node.op != "get_attr"]
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in data}
    ends: list[str] = []
    is_weighted = False
    for i, node in enumerate(data):
        is_weighted |= _has_weights(edge, node)
        crossing = [other for other in data[: i + 1] if last_use[other] > position[node]]
        if crossing != [node] or node.op == "placeholder":
            continue
        if is_weighted:
            ends.append(node.name)
        elif ends:
            ends[-1] = node.name
        is_weighted = False
    if not ends:
        raise ConfigError("expected an edge with weights for the Lipschitz term, got none; cut deeper or drop the term")
    return ends


def tapped(edge: nn.Module, ends: Sequence[str]) -> nn.Module:
    """A module that gives the values of these steps of an edge as a tuple; it shares the edge's weights and modes.

    Raises:
        ConfigError: the edge has no graph to follow.
    """
    edge = graph_of(edge)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in edge.graph.nodes:
        if node.op != "output":
            copied[node] = graph.node_copy(node, copied.__getitem__)
    by_name = {node.name: new for node, new in copied.items()}
    graph.output(tuple(by_name[name] for name in ends))
    return fx.GraphModule(edge, graph)


def _has_weights(edge: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return any(parameter.ndim >= 2 for parameter in edge.get_submodule(str(node.target)).parameters())
    held = [edge.get_parameter(str(used.target)) for used in node.all_input_nodes if _is_parameter(edge, used)]
    return any(parameter.ndim >= 2 for parameter in held)


def _is_parameter(edge: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target) in dict(edge.named_parameters())


# Graphs


class _Shapes(fx.Interpreter):
    """Remembers the shape of every tensor on the way."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401 - a step may give anything
        """What the step gives."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value


def shapes_of(edge: nn.Module, example: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape, batch included, of every step of an edge that gives a tensor; modes and statistics are untouched.

    Raises:
        ConfigError: the edge has no graph to follow.
    """
    shapes = _Shapes(graph_of(edge))
    modes = {module: module.training for module in edge.modules()}
    edge.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        shapes.run(example)
    for module, was_training in modes.items():
        module.training = was_training
    return shapes.shapes


def graph_of(edge: nn.Module) -> fx.GraphModule:
    """The edge itself, which has a graph.

    Raises:
        ConfigError: it has none.
    """
    if not isinstance(edge, fx.GraphModule):
        raise ConfigError(
            f"expected an edge as `louver.split` cuts it, with a graph to follow, got {type(edge).__name__}; "
            "cut the network with `louver.split` before it is hardened"
        )
    return edge
