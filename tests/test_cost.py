from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import Tensor, nn

from cases import MODELS, ModelCase
from louver.cost import measure_latency, with_latency
from louver.cut import cuts, split
from oracles_cut import all_splits, counted_macs, peak_bytes


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def case_of(name: str) -> ModelCase:
    return next(case for case in MODELS if case.name == name)


class Upsampling(nn.Module):
    """What the tables of networks lack: grouped and transposed convolution, attention as modules do it, a product."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 12, 3, stride=2, groups=3)
        self.up = nn.ConvTranspose2d(12, 10, 3, stride=2, groups=2)
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(10, 2, 17, batch_first=True)
        self.weight = nn.Parameter(torch.rand(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.down(x)).flatten(2).transpose(1, 2)
        x = self.attention(x, x, x)[0]
        return (self.block(x) @ self.weight).mean(1)


@pytest.mark.parametrize("name", ["cifar_resnet20", "googlenet", "vision_transformer", "timm_vit"])
def test_macs_of_both_halves_at_every_cut_are_those_that_torch_counts(name: str):
    case = case_of(name)
    network, x = case.network(), case.images(1)
    whole = counted_macs(network, x)
    for halves in all_splits(network, x):
        cost = halves.cut.cost
        with torch.no_grad():
            z = halves.edge(x)
        assert cost.edge.macs == counted_macs(halves.edge, x), halves.cut.name
        assert cost.cloud.macs == counted_macs(halves.cloud, z), halves.cut.name
        assert cost.edge.macs + cost.cloud.macs == whole, halves.cut.name


def test_macs_of_rarer_operators():
    network, x = Upsampling().eval(), torch.rand(1, 3, 9, 13)
    for halves in all_splits(network, x):
        assert halves.cut.cost.edge.macs == counted_macs(halves.edge, x), halves.cut.name
        assert halves.cut.cost.edge.macs + halves.cut.cost.cloud.macs == counted_macs(network, x), halves.cut.name


@pytest.mark.parametrize(
    ("builder", "weights"),
    [
        (torchvision.models.resnet18, torchvision.models.ResNet18_Weights.IMAGENET1K_V1),
        (torchvision.models.mobilenet_v3_small, torchvision.models.MobileNet_V3_Small_Weights.IMAGENET1K_V1),
        (torchvision.models.convnext_tiny, torchvision.models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1),
    ],
)
def test_macs_and_parameters_are_those_that_torchvision_publishes(builder, weights):
    # Golden: `_ops` (billions of multiply-accumulates) and `num_params` in the metadata of torchvision 0.29.
    for cut in cuts(builder(), torch.rand(1, 3, 224, 224))[::9]:
        edge, cloud = cut.cost.edge, cut.cost.cloud
        assert round((edge.macs + cloud.macs) / 1e9, 3) == weights.meta["_ops"]
        assert edge.parameters + cloud.parameters == weights.meta["num_params"]


def test_cost_is_of_one_image_whatever_the_example():
    case = case_of("cifar_resnet20")
    assert cuts(case.network(), case.images(1)) == cuts(case.network(), case.images(5))


def test_cost_by_hand():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(192, 5)
    )
    first, second, third, _ = cuts(network.double(), torch.rand(2, 3, 8, 10, dtype=torch.float64))
    image, feature, scores = 8 * 3 * 8 * 10, 8 * 4 * 6 * 8, 8 * 5
    assert (first.feature_shape, first.dtype, first.cost.feature_bytes) == ((4, 6, 8), "float64", feature)
    assert (first.cost.edge.macs, first.cost.cloud.macs) == (4 * 6 * 8 * 27, 192 * 5)
    assert (first.cost.edge.parameters, first.cost.cloud.parameters) == (4 * 27 + 4, 8 + 192 * 5 + 5)
    # Batch norm adds two buffers of four doubles and a counter of eight bytes.
    assert first.cost.cloud.weight_bytes == 8 * (8 + 192 * 5 + 5) + 8 * 8 + 8
    assert first.cost.edge.peak_activation_bytes == image + feature
    assert first.cost.cloud.peak_activation_bytes == 2 * feature
    assert second.cost.edge.peak_activation_bytes == max(image + feature, 2 * feature)
    # After batch norm the ReLU works in place, on a copy of what arrived; after the ReLU all is views but the scores.
    assert second.cost.cloud.peak_activation_bytes == 2 * feature
    assert third.cost.cloud.peak_activation_bytes == feature + scores


@pytest.mark.parametrize("name", ["cifar_resnet20", "googlenet"])
def test_peak_memory_is_what_the_garbage_collector_sees(name: str):
    case = case_of(name)
    for halves in list(all_splits(case.network(), case.images(2)))[::6]:
        cost = halves.cut.cost
        assert cost.edge.peak_activation_bytes == peak_bytes(halves.edge, (1, 3, *case.image)), halves.cut.name
        assert cost.cloud.peak_activation_bytes == peak_bytes(halves.cloud, (1, *halves.cut.feature_shape))


def test_attention_inside_a_module_counts_as_memory():
    network = nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(80, 2, 17, batch_first=True), nn.Flatten())
    (flat, block) = cuts(network, torch.rand(2, 30, 8, 10))
    assert flat.cost.edge.peak_activation_bytes == 4 * 30 * 80
    assert block.cost.edge.peak_activation_bytes > 4 * (30 * 80 * 4)


def test_latency_is_measured_on_request_only():
    halves = split(case_of("cifar_resnet20").network(), "layer1", torch.rand(2, 3, 24, 32))
    assert halves.cut.cost.edge.latency is halves.cut.cost.cloud.latency is None
    threads = torch.get_num_threads()
    edge, cloud = measure_latency(halves, torch.rand(2, 3, 24, 32), runs=7, warmup=1, threads=2)
    assert torch.get_num_threads() == threads
    for latency in (edge, cloud):
        assert 0 < latency.p10_ms <= latency.median_ms <= latency.p90_ms
        assert latency.runs == 7
    timed = with_latency(halves.cut, edge, cloud)
    assert (timed.cost.edge.latency, timed.cost.cloud.latency) == (edge, cloud)
    assert with_latency(timed, None, None) == halves.cut


class Taking(nn.Module):
    """Takes the given times one after the other, by a clock of its own."""

    def __init__(self, clock_s: list[float], times_s: list[float]) -> None:
        super().__init__()
        self.clock_s, self.times_s = clock_s, iter(times_s)

    def forward(self, x: Tensor) -> Tensor:
        self.clock_s[0] += next(self.times_s)
        return x


def test_latency_is_the_median_without_the_warm_up(monkeypatch: pytest.MonkeyPatch):
    clock_s = [0.0]
    monkeypatch.setattr("louver.cost.time", SimpleNamespace(perf_counter=lambda: clock_s[0]))
    # Of the edge's times the first is for the feature; then one pass to warm up and three to measure, in each half.
    halves = SimpleNamespace(
        edge=Taking(clock_s, [0.0, 9.0, 0.01, 0.03, 0.02]), cloud=Taking(clock_s, [9.0, 0.5, 0.2, 0.3])
    )
    edge, cloud = measure_latency(halves, torch.rand(2, 3, 4, 5), runs=3, warmup=1)
    assert (edge.p10_ms, edge.median_ms, edge.p90_ms) == pytest.approx((12, 20, 28))
    assert (cloud.p10_ms, cloud.median_ms, cloud.p90_ms) == pytest.approx((220, 300, 460))
    assert (edge.runs, cloud.runs) == (3, 3)


@pytest.mark.parametrize("wrong", [{"runs": 0}, {"warmup": -1}, {"threads": 0}])
def test_latency_refuses_nonsense(wrong: dict[str, int]):
    with pytest.raises(ValueError, match="expected runs >= 1"):
        measure_latency(
            split(nn.Sequential(nn.ReLU(), nn.Tanh()), "0", torch.rand(2, 3, 4, 5)), torch.rand(2, 3, 4, 5), **wrong
        )


@pytest.mark.parametrize(("name", "limit_s"), [("resnet18", 2), ("densenet121", 6)])
def test_listing_cuts_is_quick(name: str, limit_s: float):
    case = case_of(name)
    network, example = case.network(), torch.rand(1, 3, 224, 224)
    start = time.process_time()  # not the clock on the wall: the machine may be busy
    cuts(network, example)
    assert time.process_time() - start < limit_s
