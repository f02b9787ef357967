from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from cases import MODELS, ModelCase
from louver.cut import cuts, split
from louver.errors import CutError, DataError
from louver.points import Plan
from oracles_cut import all_splits, separating_steps


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(n: int = 7, h: int = 8, w: int = 10) -> Tensor:
    return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(n))


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 5))


class Residual(nn.Module):
    """Every habit that makes cutting hard: operations in place, a skip, an Identity, sizes, a dropout as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.skip = nn.Identity()
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[0], self.conv.out_channels
        x = self.relu(self.norm(self.stem(x)))
        y = self.skip(x)
        x = self.relu(x)
        x += self.conv(y)
        x = F.dropout(x.mul_(2), training=self.training)
        return self.head(x.view(n, c, -1).mean(2))


# Legal cuts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_every_cut_is_the_network_bit_for_bit(case: ModelCase):
    network, x = case.network(), case.images(7)
    with torch.no_grad():
        expected = network(x)
        listed = []
        for halves in all_splits(network, case.images(1)):
            cut = halves.cut
            z = halves.edge(x)
            sent = z.clone()
            assert torch.equal(halves.cloud(z), expected), cut.name
            assert torch.equal(z, sent), f"{cut.name}: the cloud changed what it was given"
            assert (tuple(z.shape), str(z.dtype)) == ((7, *cut.feature_shape), f"torch.{cut.dtype}"), cut.name
            assert not {p.data_ptr() for p in halves.edge.parameters()} & {
                p.data_ptr() for p in halves.cloud.parameters()
            }
            for half, cost in ((halves.edge, cut.cost.edge), (halves.cloud, cut.cost.cloud)):
                weights = [*half.parameters(), *half.buffers()]
                assert sum(p.numel() for p in half.parameters()) == cost.parameters, cut.name
                assert sum(t.numel() * t.element_size() for t in weights) == cost.weight_bytes, cut.name
            listed.append(cut)
    assert len(listed) == case.n_cuts
    names = [name for cut in listed for name in (cut.name, *cut.aliases)]
    assert len(names) == len(set(names))
    assert [name for name in case.must_have if name not in names] == []


@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet18", "vgg11_bn", "mobilenet_v3_small", "googlenet"])
def test_every_separating_step_is_listed(name: str):
    (case,) = (case for case in MODELS if case.name == name)
    network, example = case.network(), case.images(2)
    wanted = separating_steps(network, example)
    listed = cuts(network, example)
    assert len(listed) == len(wanted)
    names = {name for cut in listed for name in (cut.name, *cut.aliases)}
    modules = dict(network.named_modules())
    weighty = [step for step in wanted if step in modules and any(True for _ in modules[step].parameters())]
    assert weighty
    assert [step for step in weighty if step not in names] == []


def test_the_outermost_module_gives_the_name():
    by_name = {cut.name: cut for cut in cuts(torchvision.models.resnet18(), images(2, 40, 56))}
    assert by_name["layer1"].aliases == ("layer1.1", "layer1.1.relu_1")
    assert "layer1.1" not in by_name


@pytest.mark.parametrize("at", ["layer1", "layer1.1", "layer1.1.relu_1"])
def test_aliases_cut_at_the_same_place(at: str):
    assert split(torchvision.models.resnet18(), at, images(2, 40, 56)).cut.name == "layer1"


def test_identity_and_dropout_make_no_second_cut():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.Dropout(), nn.Flatten(), nn.Linear(192, 5))
    assert [(cut.name, cut.aliases) for cut in cuts(network, images())] == [("0", ("1", "2")), ("3", ())]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_batch_of_the_example_does_not_matter(n: int):
    network = Residual().eval()
    for halves in all_splits(network, images(n)):
        assert torch.equal(halves(images(7)), network(images(7)))
        assert torch.equal(halves(images(1)), network(images(1)))


def test_operations_in_place_are_cut_around():
    network = Residual().eval()
    names = [cut.name for cut in cuts(network, images(2))]
    assert names == ["stem", "norm", "relu", "relu_1", "add", "mul", "view", "mean"]
    for halves in all_splits(network, images(2)):
        x = images(7)
        z = halves.edge(x)
        sent = z.clone()
        assert torch.equal(halves.cloud(z), network(x)), halves.cut.name
        assert torch.equal(z, sent), halves.cut.name
        assert torch.equal(x, images(7)), halves.cut.name


def test_a_first_operation_in_place_spares_the_image():
    network = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(240, 5)).eval()
    x = images() - 0.5
    halves = split(network, "0", images())
    result, before = halves(x), x.clone()
    assert torch.equal(x, images() - 0.5)
    assert torch.equal(result, network(before))


class Rope(nn.Module):
    """A constant table that is read in two places: copied to both halves, since nothing changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.register_buffer("table", torch.rand(10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.table
        return self.second(x) * self.table


def test_a_constant_table_is_copied_to_both_halves():
    network = Rope().eval()
    halves = split(network, "mul", images())
    assert torch.equal(halves(images()), network(images()))
    assert len({half.table.data_ptr() for half in (halves.edge, halves.cloud, network)}) == 3


class Wrapper(nn.Module):
    transparent_child = "network"

    def __init__(self) -> None:
        super().__init__()
        self.normalize, self.network = nn.BatchNorm2d(3, affine=False), small_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.normalize(x))


def test_a_transparent_wrapper_does_not_show_in_names():
    assert [cut.name for cut in cuts(Wrapper(), images())] == ["normalize", "0", "1", "2"]
    assert split(Wrapper(), "network.1", images()).cut == split(Wrapper(), "1", images()).cut
    assert split(Wrapper(), "network.1", images()).cut.name == "1"


class Branching(nn.Module):
    """Decides by image size, which torch.fx cannot follow and torch.export can."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 4:
            x = self.stem(x)
        return self.head(x).reshape(x.shape[0], -1)


def test_what_fx_cannot_trace_is_exported():
    network = Branching().eval()
    plan = Plan.of(network, images(1))
    assert plan.trace.engine == "torch.export"
    assert [cut.name for cut, _ in plan.cuts] == ["stem.0", "stem.1", "stem", "head"]
    for halves in all_splits(network, images(1)):
        x = images(7)
        z = halves.edge(x)
        sent = z.clone()
        assert torch.equal(halves.cloud(z), network(x))
        assert torch.equal(z, sent)


class Boxed(nn.Module):
    """One module that cannot be followed between others that can."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(3, 3, 3), Branching(), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


def test_a_module_that_cannot_be_followed_is_kept_whole():
    network = Boxed().eval()
    assert [cut.name for cut in cuts(network, images())] == ["first", "inner"]
    assert torch.equal(split(network, "inner", images(2))(images()), network(images()))
    with pytest.raises(CutError, match=r"inside 'inner', which runs as one step .*if x.shape\[2\] > 4.*'first' before"):
        split(network, "inner.stem", images())


# Refusals ------------------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(7, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x, self.relu(self.conv(x))], 1)).mean((2, 3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.second = nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.middle(self.first(self.stem(x)))))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fork, self.head = nn.Conv2d(3, 4, 3), Fork(), nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fork(self.stem(x))
        return self.head(a + b)


class Fork(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), x.cos()


class Chunks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(2, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        return self.head(a + b)


class Windows(nn.Module):
    """Folds the width into the batch, as window attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        x = self.inner(x.permute(0, 3, 2, 1).reshape(n * w, h, c))
        return self.head(x.reshape(n, w * h, c).mean(1))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.auxiliary = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.auxiliary(x) if self.training else self.head(x)


REFUSALS = [
    (
        Residual,
        "conv",
        r"inside a residual block or branch: 'relu_1' also crosses \(used until 'add'\).*'relu_1' before and",
    ),
    (Dense, "relu", r"the raw image skips past it \(used until 'cat'\).*nearest legal: 'cat' after"),
    (Tied, "middle", r"weight 'first.weight' is shared by 'first' and 'second'.*'stem' before and 'second' after"),
    (Pair, "fork", r"'fork': it returns a tuple, and exactly one tensor can cross.*'stem' before and 'add' after"),
    (Chunks, "chunk", r"it is a tuple of 2 values, and exactly one tensor can cross.*'stem' before and 'add' after"),
    (
        Windows,
        "inner",
        r"the batch is not its first dimension: 2 images make a tensor of shape \(20, 8, 4\).*'permute' before",
    ),
    (Windows, "getitem", r"it is not computed from the image's pixels.*'stem' before"),
    (Unused, "auxiliary", r"that module is not used in evaluation mode; legal: stem"),
    (small_net, "input", r"nothing would be left on the device.*nearest legal: '0' after"),
    (small_net, "3", r"nothing would be left for the cloud.*nearest legal: '2' before"),
    (torchvision.models.resnet18, "layr1", r"ResNet has no point 'layr1': unknown name; nearest: layer1,"),
    (torchvision.models.resnet18, "layer2.0.conv2", r"'layer1' also crosses|'layer1.*before and 'layer2.0.add' after"),
    (small_net, "zzz", r"unknown name; legal: 0, 1, 2$"),
]


@pytest.mark.parametrize(("build", "at", "message"), REFUSALS)
def test_a_refusal_says_why_and_what_instead(build, at: str, message: str):
    example = images(2, 40, 56) if build is torchvision.models.resnet18 else images(2)
    with pytest.raises(CutError, match=message):
        split(build(), at, example)


class ByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0.5:
            x = x.flip(3)
        return self.conv(x).relu()


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(x), training=True).relu()


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).view(7, 192).relu()


class Selecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x[x > 0].relu()


class SkipsEverything(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.relu()


WHOLE_REFUSALS = [
    (
        ByValue,
        r"torch.fx: control flow depends on the input \(`if x.mean\(\) > 0.5:`.*torch.export: control flow depends",
    ),
    (Noisy, r"two passes over the same image differ"),
    (FixedBatch, r"cannot be followed with a batch of 2: shape"),
    (Selecting, r"shapes or control flow depend on the data"),
    (SkipsEverything, r"no legal cut: the raw image skips past it"),
    (lambda: nn.Conv2d(3, 4, 3), r"Conv2d has no legal cut: nothing would be left for the cloud"),
    (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()), r"lazy parameters"),
]


@pytest.mark.parametrize(("build", "message"), WHOLE_REFUSALS)
def test_a_network_that_cannot_be_cut_is_refused_whole(build, message: str, capfd):
    with pytest.raises(CutError, match=message):
        cuts(build(), images())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("example", [torch.rand(3, 8, 10), torch.rand(0, 3, 8, 10), torch.rand(2, 4, 8, 10)])
def test_a_wrong_example_is_refused(example: Tensor):
    with pytest.raises(DataError, match=r"expected an example|does not run on an example"):
        cuts(small_net(), example)


def test_images_of_another_size_are_refused():
    halves = split(small_net(), "1", images())
    with pytest.raises(DataError, match=r"expected features of shape \(4, 6, 8\), got \(4, 7, 8\)"):
        halves(images(7, 9, 10))


class AsksForKind(nn.Module):
    """Takes another way for what is not a tensor, so torch.fx follows the wrong one without noticing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.relu() if isinstance(x, Tensor) else x.sin()


def test_a_wrong_trace_is_noticed():
    network = AsksForKind().eval()
    assert Plan.of(network, images()).trace.engine == "torch.export"
    assert torch.equal(split(network, "conv", images())(images()), network(images()))


# The user's network is left as it was --------------------------------------------------------------------------------


def state(network: nn.Module) -> list[object]:
    modules = dict(network.named_modules())
    return [
        {
            name: (id(tensor), tensor._version, tensor.requires_grad)
            for name, tensor in network.state_dict(keep_vars=True).items()
        },
        copy.deepcopy(network.state_dict()),
        {name: (id(module), module.training, sorted(vars(module))) for name, module in modules.items()},
        {name: (list(m._forward_hooks.items()), list(m._forward_pre_hooks.items())) for name, m in modules.items()},
        torch.is_grad_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        list(warnings.filters),
        torch.random.get_rng_state(),
    ]


def assert_same_state(before: list[object], after: list[object]) -> None:
    for left, right in zip(before, after, strict=True):
        if isinstance(left, Tensor):
            assert torch.equal(left, right)
        elif isinstance(left, dict) and left and isinstance(next(iter(left.values())), Tensor):
            assert all(torch.equal(left[name], right[name]) for name in left)
        else:
            assert left == right


class Counting(nn.Module):
    """Changes its own buffer and attribute whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n_calls", torch.zeros(1))
        self.conv, self.seen = nn.Conv2d(3, 4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        self.seen += 1
        return self.conv(x).relu()


@pytest.mark.parametrize("build", [Residual, Counting, Branching, Boxed, ByValue, Noisy, FixedBatch, Tied, Wrapper])
@pytest.mark.parametrize("at", ["stem", "nowhere"])
def test_the_network_is_untouched_also_after_an_error(build, at: str):
    network = build().train()
    next(network.parameters()).requires_grad_(False)
    first = next(iter(network.children()))
    first.eval()
    first.register_forward_hook(lambda module, args, result: result * 2)
    before = state(network)
    try:
        halves = split(network, at, images())
    except CutError:
        halves = None
    assert_same_state(before, state(network))
    if halves is not None:
        with torch.no_grad():
            for tensor in (*halves.parameters(), *halves.buffers()):
                tensor.zero_()
        assert_same_state(before, state(network))


def test_hooks_are_part_of_what_the_network_computes():
    network = small_net().eval()
    plain = network(images())
    network[0].register_forward_hook(lambda module, args, result: result * 2)
    halves = split(network, "1", images())
    assert torch.equal(halves(images()), network(images()))
    assert not torch.equal(halves(images()), plain)


def test_a_hook_is_never_shown_a_stand_in():
    network, seen = nn.Sequential(small_net(), nn.Softmax(1)).eval(), []
    network[0].register_forward_hook(lambda module, args, result: seen.append(isinstance(result, Tensor)))
    assert [cut.name for cut in cuts(network, images())] == ["0"]
    assert seen
    assert all(seen)


def test_the_halves_keep_what_trains_and_start_in_evaluation_mode():
    network = small_net().train()
    network[0].weight.requires_grad_(False)
    halves = split(network, "1", images())
    assert not any(module.training for module in halves.edge.modules())
    grads = [parameter.requires_grad for parameter in halves.parameters()]
    assert grads == [parameter.requires_grad for parameter in network.parameters()]
    halves(images()).sum().backward()
    assert halves.edge.get_parameter("0.bias").grad is not None
    assert network[0].bias.grad is None
