"""What can be taken out of an edge, and taking it out for good.

Two kinds of structure go: channels, in groups that depend on each other (found by torch-pruning over both halves, since
the cloud may read fewer channels), and whole residual blocks whose skip carries on alone. Every structure is tried
before it is offered: where the network without it does not compute what the masked network does (channels padded,
shuffled or normalised together), it is left alone.
"""

from __future__ import annotations

import copy
import itertools
import operator
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from louver.cut import Split
from louver.defenses.lipschitz import graph_of, shapes_of
from louver.defenses.masks import Block, Group, all_of, folded, is_tail, masked, soft_masks, step_of
from louver.errors import CutError, LouverError

__all__ = ["drop_blocks", "residual_blocks", "shaped_like", "structures", "without"]

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_EXACT = 1e-4
"""Share of the largest output by which a pruned network may differ from the masked one: float32 rounding, no more."""


# Finding


def structures(
    split: Split, example: Float[Tensor, "n c h w"], *, names: Iterable[str] | None = None
) -> tuple[list[Group], list[Block]]:
    """All channel groups and residual blocks that can leave the edge, each seen to leave the rest exact.

    With `names`, those of these names, which were tried before.

    Raises:
        ConfigError: the edge has no graph to follow.
    """
    groups, blocks = _channel_groups(split, example), _blocks(split, example)
    if names is not None:
        known = set(names)
        return [group for group in groups if group.name in known], [block for block in blocks if block.name in known]
    if not _is_exact(split, groups, [], example):
        groups = [group for group in groups if _is_exact(split, [group], [], example)]
    if not _is_exact(split, [], blocks, example):
        blocks = [block for block in blocks if _is_exact(split, [], [block], example)]
    return groups, blocks


def _blocks(split: Split, example: Tensor) -> list[Block]:
    shapes = shapes_of(split.edge, example)
    blocks = []
    for block in residual_blocks(split.edge):
        terms = {shapes[term.name] for term in step_of(split.edge, block.name).all_input_nodes}
        if terms == {shapes[block.name]}:
            blocks.append(replace(block, channels=shapes[block.name][1]))
    return blocks


def residual_blocks(edge: nn.Module) -> list[Block]:
    """Branches that start where their skip does and end in a layer that can take up a factor; shapes not yet known."""
    graph_module = graph_of(edge)
    calls = Counter(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module")
    found = []
    for node in graph_module.graph.nodes:
        if not _is_addition(node):
            continue
        for branch, skip in (node.args, node.args[::-1]):
            inside = _between(graph_module, branch, skip)
            layers = tuple(str(step.target) for step in inside if step.op == "call_module")
            weighted = [path for path in layers if any(True for _ in graph_module.get_submodule(path).parameters())]
            is_closed = all(user in inside or user is node for step in inside for user in step.users)
            is_own = is_closed and all(calls[path] == 1 for path in weighted)
            if inside and is_own and str(branch.target) in weighted and _takes_factor(graph_module, branch):
                found.append(Block(name=node.name, channels=0, tail=str(branch.target), layers=tuple(weighted)))
    return found


def _is_addition(node: fx.Node) -> bool:
    is_call = node.op == "call_function" and node.target in _ADDITIONS
    is_call = is_call or (node.op == "call_method" and node.target in ("add", "add_"))
    return is_call and not node.kwargs and len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)


def _takes_factor(edge: fx.GraphModule, node: fx.Node) -> bool:
    layer = edge.get_submodule(str(node.target))
    return isinstance(layer, (nn.Conv2d, nn.Linear)) or (isinstance(layer, _NORMS) and layer.affine)


def _origin(edge: fx.GraphModule, node: fx.Node) -> fx.Node:
    while node.op == "call_module" and isinstance(edge.get_submodule(str(node.target)), nn.Identity):
        node = node.all_input_nodes[0]
    return node


def _between(edge: fx.GraphModule, branch: fx.Node, skip: fx.Node) -> list[fx.Node]:
    """The steps from `skip` (left out) to `branch`; empty if the branch draws on anything else."""
    start, waiting = _origin(edge, skip), [branch]
    inside: dict[fx.Node, None] = {}
    while waiting:
        node = waiting.pop()
        if _origin(edge, node) is start or node in inside:
            continue
        if node.op in ("placeholder", "get_attr"):
            return []
        inside[node] = None
        waiting.extend(node.all_input_nodes)
    return list(inside)


def _channel_groups(split: Split, example: Tensor) -> list[Group]:
    work = copy.deepcopy(split)
    dependencies = _dependencies(work, example)
    names = {module: name for name, module in work.named_modules()}
    found = (_group(items, names) for items in dependencies.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))
    return [group for group in found if group is not None]


def _dependencies(split: Split, example: Tensor) -> Any:  # noqa: ANN401 - torch-pruning has no types
    """The dependency graph of both halves, whose parameters get gradients: it is read off autograd's graph."""
    import torch_pruning

    split.requires_grad_(True)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        return torch_pruning.DependencyGraph().build_dependency(
            split, example_inputs=example, forward_fn=lambda model, images: model.cloud(model.edge(images))
        )


def _group(items: Iterable[tuple[Any, Sequence[int]]], names: Mapping[nn.Module, str]) -> Group | None:
    """The group in our terms; None if the cloud makes some of its channels or they are tied in another way."""
    producers: list[str] = []
    inputs: dict[str, int] = {}
    channels = 0
    for dependency, index in items:
        module, path = dependency.target.module, names.get(dependency.target.module)
        if isinstance(module, nn.Parameter):
            return None
        if path is None:
            continue
        size = _outputs(module)
        is_convolution = isinstance(module, nn.Conv2d)
        is_depthwise = is_convolution and module.groups == module.in_channels == module.out_channels > 1
        if is_convolution and module.groups > 1 and not is_depthwise:
            return None
        is_layer = is_convolution or isinstance(module, nn.Linear)
        if is_layer and not is_depthwise and "prune_in" in dependency.handler.__name__:
            size = module.weight.shape[1]
            inputs[path] = size
        else:
            producers.append(path)
            channels = channels or size
            if size != channels:
                return None
        if sorted(index) != list(range(size)):
            return None
    is_ours = bool(producers and inputs) and all(path.startswith("edge.") for path in producers)
    if not is_ours or channels < 2 or any(size % channels for size in inputs.values()):
        return None
    consumers = {path: size // channels for path, size in inputs.items()}
    name = producers[0].removeprefix("edge.")
    return Group(name=name, channels=channels, producers=tuple(dict.fromkeys(producers)), consumers=consumers)


def _outputs(module: nn.Module) -> int:
    own = next((parameter for parameter in module.parameters(recurse=False)), None)
    running = getattr(module, "running_mean", None)
    shaped = own if own is not None else running
    return len(shaped) if isinstance(shaped, Tensor) else 0


def _is_exact(split: Split, groups: Sequence[Group], blocks: Sequence[Block], example: Tensor) -> bool:
    """Whether masks of which half are zero, on all of these at once, can be folded and cut away without a trace."""
    generator = torch.Generator().manual_seed(0)
    masks, gone = {}, {}
    for structure in all_of(groups, blocks):
        n = structure.channels if isinstance(structure, Group) else 2
        order = torch.randperm(n, generator=generator)
        scale = 0.5 + torch.rand(n, generator=generator)
        scale[order[: n // 2]] = 0
        masks[structure.name] = scale if isinstance(structure, Group) else torch.zeros(1)
        gone[structure.name] = order[: n // 2].tolist()
    soft = masked(split, groups, blocks)
    for name, mask in soft_masks(soft.edge).items():
        mask.scale.data.copy_(masks[name])
    whole = folded(split, groups, blocks, masks)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        soft.eval()
        feature = soft.edge(example)
        expected = soft.cloud(feature)
        for group in groups:
            if group.is_sent:
                # What is folded into the cloud is not in the features.
                repeat = feature.shape[1] // group.channels
                scale = masks[group.name].repeat_interleave(repeat)
                feature = feature[:, scale > 0] / scale[scale > 0].view(-1, *[1] * (feature.ndim - 2))
        try:
            hard = without(whole, groups, gone, {block.name for block in blocks}, example).eval()
            got = hard.edge(example)
            is_exact = _is_close(got, feature) and _is_close(hard.cloud(got), expected)
        except (RuntimeError, ValueError, IndexError, KeyError, AttributeError, LouverError):
            # Whatever breaks without these structures shows that they cannot go.
            return False
    return is_exact


def _is_close(got: object, expected: object) -> bool:
    if not (isinstance(got, Tensor) and isinstance(expected, Tensor)) or got.shape != expected.shape:
        return False
    return bool((got - expected).abs().max() <= _EXACT * expected.abs().max())


# Taking out


def without(
    split: Split, groups: Sequence[Group], channels: Mapping[str, Sequence[int]], blocks: Iterable[str], example: Tensor
) -> Split:
    """A copy of an unmasked split that lacks these channels of each group (by name) and these blocks.

    Its `cut` is still the old one: shape and cost are to be measured anew, as by `louver.cut.joined`.
    """
    split = copy.deepcopy(split)
    needs_gradient = {name: parameter.requires_grad for name, parameter in split.named_parameters()}
    drop_blocks(split.edge, blocks)
    dependencies = _dependencies(split, example)
    modules = dict(split.named_modules())
    for group in groups:
        # A block that is gone may have taken some of the producers, or the whole group, with it.
        left = (modules[path] for path in group.producers if path in modules)
        root = next((module for module in left if isinstance(module, (nn.Conv2d, nn.Linear))), None)
        if root is None or not channels.get(group.name):
            continue
        prune = dependencies.get_pruner_of_module(root).prune_out_channels
        dependencies.get_pruning_group(root, prune, sorted(channels[group.name])).prune()
    for name, parameter in split.named_parameters():
        parameter.requires_grad_(needs_gradient[name])
        parameter.grad = None
    return split


def drop_blocks(edge: nn.Module, names: Iterable[str]) -> None:
    """Takes residual branches out of the edge itself; their skips carry on."""
    graph_module = graph_of(edge)
    tails = {block.name: block.tail for block in residual_blocks(edge)}
    for name in names:
        node = step_of(edge, name)
        is_first = is_tail(node.args[0], tails[name])
        branch, skip = node.args if is_first else node.args[::-1]
        assert isinstance(branch, fx.Node), name
        inside = set(_between(graph_module, branch, skip))  # type: ignore[arg-type]
        node.replace_all_uses_with(skip)  # type: ignore[arg-type]
        graph_module.graph.erase_node(node)
        for step in reversed(list(graph_module.graph.nodes)):
            if step in inside:
                graph_module.graph.erase_node(step)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def shaped_like(split: Split, state: Mapping[str, Tensor]) -> Split:
    """A copy of an undefended split in the shapes of `state`, without the blocks that `state` lacks.

    Numbers are to be loaded; `cut.feature_shape` follows the channels, `cut.cost` is still the old one.

    Raises:
        CutError: `state` lacks a part of a block, or has more than the split.
    """
    split = copy.deepcopy(split)
    lost = [
        block.name
        for block in residual_blocks(split.edge)
        if not any(key.startswith(f"edge.{path}.") for path in block.layers for key in state)
    ]
    drop_blocks(split.edge, lost)
    unlike = sorted(set(split.state_dict()) ^ set(state))
    if unlike:
        raise CutError(
            f"expected the weights of this split with channels or whole residual blocks taken out, but {unlike[0]!r} "
            f"is in only one of the two ({len(unlike)} such names); rebuild from the network and cut that were hardened"
        )
    before = _sent_channels(split.edge)
    for path, module in split.named_modules():
        own = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in list(own):
            like = state.get(f"{path}.{name}" if path else name)
            if like is not None and like.shape != tensor.shape:
                _resize(module, name, tensor, like)
    after = _sent_channels(split.edge)
    first, *rest = split.cut.feature_shape
    split.cut = replace(split.cut, feature_shape=(first * after // before, *rest))
    return split


def _resize(module: nn.Module, name: str, tensor: Tensor, like: Tensor) -> None:
    empty = torch.zeros(like.shape, dtype=tensor.dtype, device=tensor.device)
    is_parameter = isinstance(tensor, nn.Parameter)
    setattr(module, name, nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty)
    if isinstance(module, nn.Conv2d) and name == "weight":
        if module.groups == module.in_channels == module.out_channels and module.groups > 1:
            module.groups = len(like)
        module.out_channels, module.in_channels = len(like), like.shape[1] * module.groups
    elif isinstance(module, nn.Linear) and name == "weight":
        module.out_features, module.in_features = like.shape
    elif hasattr(module, "num_features"):
        module.num_features = len(like)  # type: ignore[assignment]


def _sent_channels(edge: nn.Module) -> int:
    """Channels of the last layer before the cut; they change as the feature's first dimension does."""
    graph_module = graph_of(edge)
    node = next(iter(reversed(graph_module.graph.nodes))).all_input_nodes[0]
    while node.op != "placeholder":
        outputs = _outputs(graph_module.get_submodule(str(node.target))) if node.op == "call_module" else 0
        if outputs:
            return outputs
        node = node.all_input_nodes[0]
    return 1
