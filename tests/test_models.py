import collections
import os
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from louver.data import data_root, load_images
from louver.errors import ConfigError, StorageError, WeightsError
from louver.models import OWN, Normalized, load_model, perceptual_backbone, save_weights
from louver.weights import fit_weights, read_weights, weights_file

needs_data = pytest.mark.skipif(data_root() is None, reason="no real images: LOUVER_DATA is not set")
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def pictures(n=2, c=3, h=32, w=32):
    return torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(1))


def shared(source):
    images = load_images(source)
    return torch.from_numpy(images.floats()), torch.from_numpy(images.column("label"))


def normalisation(model):
    return [value.flatten().tolist() for value in (model.normalize.mean, model.normalize.std)]


def states_equal(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


# name, arguments, shape of the images, classes, mean and spread. The figures are those of the libraries' model cards.
MODELS = [
    ("cifar_resnet20", {}, (3, 32, 32), 10, IMAGENET),
    ("cifar_resnet32", {"n_classes": 7, "image_shape": (1, 28, 28)}, (1, 28, 28), 7, ([0.0], [1.0])),
    ("street_net", {"n_classes": 5}, (3, 64, 64), 5, ([0.5], [0.25])),
    ("torchvision:resnet18", {}, (3, 40, 33), 1000, IMAGENET),
    ("resnet18", {"n_classes": 4}, (3, 40, 33), 4, IMAGENET),
    ("torchvision:vit_b_32", {"image_shape": (3, 64, 64), "n_classes": 3}, (3, 64, 64), 3, IMAGENET),
    ("timm:vit_tiny_patch16_224", {"image_shape": (3, 32, 48)}, (3, 32, 48), 1000, ([0.5] * 3, [0.5] * 3)),
    ("resnet10t", {"image_shape": (1, 40, 33), "n_classes": 4}, (1, 40, 33), 4, ([0.0], [1.0])),
    ("mobilenet_v2", {"n_classes": 4, "mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]}, (3, 40, 33), 4, None),
]


@pytest.mark.parametrize(("name", "options", "shape", "n_classes", "expected"), MODELS, ids=[row[0] for row in MODELS])
def test_a_name_gives_a_network_for_images_in_0_1(name, options, shape, n_classes, expected):
    model = load_model(name, **options)
    x = pictures(2, *shape)
    with torch.no_grad():
        assert model(x).shape == (2, n_classes)
        mean, std = expected or (options["mean"], options["std"])
        assert normalisation(model) == [pytest.approx(mean), pytest.approx(std)]
        by_hand = (x - torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1)) / torch.tensor(
            std, dtype=torch.float32
        ).view(1, -1, 1, 1)
        assert torch.equal(model(x), model.network(by_hand))
    assert all(not module.training for module in model.modules())
    assert isinstance(model, Normalized)
    assert model.transparent_child == "network"


@pytest.mark.parametrize("name", ["cifar_resnet20", "torchvision:squeezenet1_1", "timm:resnet10t"])
def test_random_weights_follow_the_seed_and_leave_the_generator_alone(name):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    model = load_model(name, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert states_equal(model, load_model(name, seed=3))
    assert not states_equal(model, load_model(name, seed=4))


def test_module_names_of_the_own_networks_are_those_that_cuts_are_named_after():
    resnet = [name for name, _ in load_model("cifar_resnet20").network.named_children()]
    assert resnet == ["conv1", "bn1", "relu", "layer1", "layer2", "layer3", "pool", "flatten", "linear"]
    street = [name for name, _ in load_model("street_net", n_classes=3).network.named_children()]
    assert street == ["stage1", "stage2", "stage3", "stage4", "pool", "flatten", "head"]


def test_street_net_is_cheap():
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        load_model("street_net", n_classes=5)(pictures(1, 3, 64, 64))
    assert 13e6 < counter.get_total_flops() / 2 < 14e6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar_resnet21", {}, "nearest: cifar_resnet"),
        ("resnet81", {}, "no network is named"),
        ("torchvision:resnet81", {}, "torchvision has no classifier 'resnet81'; nearest: resnet18"),
        ("timm:vit_tiny_patch16_242", {}, "timm has no network .*nearest: vit_tiny_patch16_224"),
        ("no_such_module:build", {}, "module 'no_such_module' cannot be imported"),
        ("math:sqroot", {}, "math has no function 'sqroot'; nearest: sqrt"),
        ("builtins:dict", {}, r"expected a torch\.nn\.Module back, got dict"),
        ("street_net", {}, "expected n_classes"),
        ("resnet18", {"n_classes": 0}, "n_classes of 1 or more"),
        ("resnet18", {"mean": [0.5]}, "both of mean and std"),
        ("resnet18", {"mean": [0.5], "std": [0.0]}, "std above zero"),
        ("resnet18", {"mean": [0.5], "std": [1.0, 1.0]}, "of one length"),
        ("torchvision:resnet18", {"image_shape": (1, 32, 32)}, "takes images of 3 channels"),
        ("torchvision:vit_b_32", {"image_shape": (3, 32, 64)}, "square"),
    ],
)
def test_what_cannot_be_built_is_refused_with_what_can(name, options, message):
    with pytest.raises(ConfigError, match=message):
        load_model(name, **options)


USER_MODULE = """
from torch import nn

def build(n_classes, width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, n_classes))

def plain():
    return nn.Conv2d(3, 2, 1)

def sized(image_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(image_shape[0] * image_shape[1] * image_shape[2], 2))
"""


def test_the_users_function_gets_what_it_accepts(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = list(sys.path)
    try:
        x = pictures(2, 3, 8, 10)
        assert load_model("my_networks:build", n_classes=6)(x).shape == (2, 6)
        plain = load_model("my_networks:plain", n_classes=6)
        assert torch.equal(plain(x), plain.network(x))
        assert load_model("my_networks:sized", image_shape=(3, 8, 10))(x).shape == (2, 2)
        assert sys.path == before
    finally:
        sys.modules.pop("my_networks", None)


def test_saved_weights_come_back_with_their_normalisation(tmp_path):
    model = load_model("cifar_resnet20", n_classes=4, seed=1, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    path = tmp_path / "new" / "net.safetensors"
    save_weights(model, path)
    again = load_model("cifar_resnet20", n_classes=4, weights=path)
    assert torch.equal(model(pictures()), again(pictures()))
    given = load_model("cifar_resnet20", n_classes=4, weights=path, mean=[0.0] * 3, std=[1.0] * 3)
    assert normalisation(given) == [[0.0] * 3, [1.0] * 3]
    assert [file.name for file in path.parent.iterdir()] == ["net.safetensors"]


def test_tied_weights_can_be_saved(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_weights(model, tmp_path / "tied.safetensors")
    assert torch.equal(read_weights(tmp_path / "tied.safetensors")["1.weight"], model[0].weight)


def test_a_full_disk_keeps_the_weights_before(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    save_weights(nn.Linear(3, 2), path)
    kept = path.read_bytes()

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="No space left"):
        save_weights(nn.Linear(3, 2), path)
    assert path.read_bytes() == kept
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


def reference():
    return load_model("cifar_resnet20", seed=9).network


def written(kind, path):
    state = reference().state_dict()
    parallel = {f"module.{name}": value for name, value in state.items()}
    match kind:
        case "safetensors":
            safetensors.torch.save_file(state, path := path / "w.safetensors")
        case "npz":
            np.savez(path := path / "w.npz", **{name: value.numpy() for name, value in state.items()})
        case "pt":
            torch.save(state, path := path / "w.pt")
        case "nested and parallel":
            torch.save({"state_dict": parallel, "epoch": 3}, path := path / "w.pth")
        case "lightning":
            torch.save({"model": {"state_dict": state}}, path := path / "w.pth")
        case "half":
            safetensors.torch.save_file({k: v.half() for k, v in parallel.items()}, path := path / "w.safetensors")
        case "without counters":
            kept = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
            safetensors.torch.save_file(kept, path := path / "w.safetensors")
    return path


KINDS = ["safetensors", "npz", "pt", "nested and parallel", "lightning", "half", "without counters"]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_every_kind_load(tmp_path, kind):
    model = load_model("cifar_resnet20", weights=written(kind, tmp_path))
    close = 1e-3 if kind == "half" else 0.0
    for name, value in reference().state_dict().items():
        if not name.endswith("num_batches_tracked"):
            loaded = model.network.state_dict()[name]
            assert loaded.dtype == value.dtype
            torch.testing.assert_close(loaded, value, atol=close, rtol=close)


class Runs:
    """A pickle that leaves a file behind if it is ever opened carelessly."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "it_ran"
    torch.save({"weight": torch.zeros(2), "extra": Runs(str(trace))}, tmp_path / "bad.pt")
    with pytest.raises(WeightsError, match="convert it with safetensors"):
        load_model("cifar_resnet20", weights=tmp_path / "bad.pt")
    np.savez(tmp_path / "bad.npz", weight=np.array([Runs(str(trace))], dtype=object))
    with pytest.raises(WeightsError, match="plain arrays"):
        load_model("cifar_resnet20", weights=tmp_path / "bad.npz")
    assert not trace.exists()


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(WeightsError, match="convert it with safetensors"):
        read_weights(tmp_path / "model.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="expected tensors by name, got list"):
        read_weights(tmp_path / "list.pt")
    torch.save({}, tmp_path / "empty.pt")
    with pytest.raises(WeightsError, match="got none"):
        read_weights(tmp_path / "empty.pt")


@pytest.mark.parametrize("kind", ["safetensors", "npz", "pt"])
def test_a_damaged_file_is_refused(tmp_path, kind):
    path = written(kind, tmp_path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(WeightsError, match=r"w\."):
        read_weights(path)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match=r"w\."):
        read_weights(path)


def changed(**changes):
    state = collections.OrderedDict(reference().state_dict())
    for name, value in changes.items():
        if value is None:
            del state[name.replace("__", ".")]
        else:
            state[name.replace("__", ".")] = value
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed(conv1__weight=None, bn1__bias=None), r"2 missing \(conv1\.weight, bn1\.bias\).*another network"),
        (changed(surplus=torch.zeros(1)), r"1 unexpected \(surplus\)"),
        (changed(conv1__weight=torch.zeros(16, 1, 3, 3)), r"conv1\.weight \(16, 1, 3, 3\) instead of \(16, 3, 3, 3\)"),
        (
            changed(linear__weight=torch.zeros(100, 64), linear__bias=torch.zeros(100)),
            r"2 of another shape \(linear.*probably 100",
        ),
        (changed(linear__bias=torch.full((10,), torch.nan)), r"tensor linear\.bias holds NaN"),
    ],
    ids=["missing", "unexpected", "misshaped", "classes", "nan"],
)
def test_weights_that_do_not_fit_are_refused_by_name_and_change_nothing(state, message):
    network = load_model("cifar_resnet20", seed=1).network
    with pytest.raises(WeightsError, match=message):
        fit_weights(network, state, source="file")
    assert states_equal(network, load_model("cifar_resnet20", seed=1).network)


def test_weights_that_are_not_there_are_refused(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "resnet20_mine.npz").write_bytes(b"")
    monkeypatch.setenv("LOUVER_DATA", str(tmp_path))
    assert weights_file("resnet20_mine") == tmp_path / "weights" / "resnet20_mine.npz"
    with pytest.raises(WeightsError, match="nearest: resnet20_mine"):
        load_model("cifar_resnet20", weights="resnet20_mime")
    (tmp_path / "net.onnx").write_bytes(b"1")
    with pytest.raises(WeightsError, match="ends in"):
        load_model("cifar_resnet20", weights=tmp_path / "net.onnx")
    with pytest.raises(WeightsError, match="for torchvision and timm networks"):
        load_model("cifar_resnet20", weights="pretrained")


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "timm:resnet10t"])
def test_a_download_that_fails_says_what_to_do(name, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no way out")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", refuse)
    with pytest.raises(WeightsError, match=r"no way out.*give the file as weights"):
        load_model(name, weights="pretrained")


def test_a_published_head_of_another_size_is_left_random(monkeypatch):
    published = load_model("torchvision:squeezenet1_1", seed=8).network.state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(published))
    network = load_model("torchvision:squeezenet1_1", weights="pretrained", n_classes=4, seed=1).network
    assert torch.equal(network.features[0].weight, published["features.0.weight"])
    assert network.classifier[1].weight.shape == (4, 512, 1, 1)


@needs_data
@pytest.mark.data
def test_the_cifar_resnet_reaches_its_published_accuracy():
    # 91.73 %: measured by those who packed the weights (README of the data).
    x, y = shared("cifar10/test")
    model = load_model("cifar_resnet20", weights="resnet20_cifar10").to(memory_format=torch.channels_last)
    with torch.inference_mode():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
    assert right / len(y) == pytest.approx(0.9173, abs=2e-4)


@needs_data
@pytest.mark.data
def test_squeezenet_of_the_shared_data_knows_its_photographs():
    # 65.4 % of all thousand photographs (README of the data).
    model = load_model("torchvision:squeezenet1_0", weights="squeezenet1_0_imagenet")
    x, y = shared("imagenet1000[:200]")
    with torch.inference_mode():
        right = (torch.cat([model(batch) for batch in x.split(50)]).argmax(1) == y).float().mean()
    assert right > 0.5


@needs_data
@pytest.mark.data
@pytest.mark.parametrize(("h", "w"), [(32, 32), (40, 57)])
def test_the_perceptual_backbone_gives_four_maps_and_passes_gradients_to_the_image(h, w):
    backbone = perceptual_backbone("squeezenet1_0")
    x = pictures(2, 3, h, w).requires_grad_()
    maps = backbone(x)
    assert [value.shape[:2] for value in maps] == [(2, 96), (2, 256), (2, 512), (2, 512)]
    sum(value.mean() for value in maps).backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
    assert all(value.grad is None for value in backbone.parameters())
    with pytest.raises(ConfigError, match="nearest: squeezenet1_0"):
        perceptual_backbone("squeezenet")


def test_own_names_are_listed():
    assert {"cifar_resnet20", "cifar_resnet56", "street_net"} <= set(OWN)
