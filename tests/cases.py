"""Tables of cases that contract tests run over. A new case is one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.vgg import cfgs, make_layers

from louver.attacks import Attack, Decoder, Likelihood, MeanImage, Shadow
from louver.defenses import (
    PATROL,
    AddedNoise,
    AdversarialTraining,
    Bottleneck,
    Defense,
    FeatureDropout,
    Hybrid,
    NoDefense,
    NoPeek,
    PrivyNet,
    SiftFunnel,
)


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """A network with random weights, the height and width of images small enough for it, and cuts it must have."""

    name: str
    build: Callable[[], nn.Module]
    image: tuple[int, int]
    must_have: tuple[str, ...]
    n_cuts: int

    def network(self) -> nn.Module:
        torch.manual_seed(20)
        network = self.build().eval()
        # Fresh batch norms do nothing, and fresh layer scales nearly nothing: either would hide a mistake.
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.8, 1.2)
        for name, parameter in network.named_parameters():
            if name.endswith(("layer_scale", "gamma")):
                nn.init.uniform_(parameter, 0.5, 1.5)
        return network

    def images(self, n: int) -> Tensor:
        return torch.rand(n, 3, *self.image, generator=torch.Generator().manual_seed(n))


def cifar_resnet20() -> nn.Module:
    from louver.networks import CifarResNet

    return CifarResNet(depth=20)


def vgg11_bn() -> nn.Module:
    """With a narrow classifier, and the wide one never made: it has a hundred million weights."""
    with torch.device("meta"):
        network = torchvision.models.vgg11_bn(init_weights=False)
    network.features = make_layers(cfgs["A"], batch_norm=True)
    network.classifier = nn.Sequential(nn.Linear(25088, 11), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(11, 5))
    return network


def googlenet() -> nn.Module:
    return torchvision.models.googlenet(num_classes=5, init_weights=False)


def vision_transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=24, patch_size=8, num_layers=3, num_heads=2, hidden_dim=20, mlp_dim=28, num_classes=5
    )


def convnext() -> nn.Module:
    """Of the kind of convnext_tiny, with three blocks in one stage and one in the others."""
    widths, depths = (24, 28, 36, 44, None), (1, 1, 3, 1)
    stages = [CNBlockConfig(a, b, n) for a, b, n in zip(widths[:-1], widths[1:], depths, strict=True)]
    return torchvision.models.ConvNeXt(stages, num_classes=5)


def timm_vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), num_classes=5)


def timm_convnext() -> nn.Module:
    return timm.create_model("convnext_atto", num_classes=5)


MODELS = [
    ModelCase(
        name="cifar_resnet20",
        build=cifar_resnet20,
        image=(24, 32),
        must_have=("conv1", "relu", "layer1.0", "layer1", "layer2", "layer3", "layer3.1.add"),
        n_cuts=23,
    ),
    ModelCase(
        name="resnet18",
        build=torchvision.models.resnet18,
        image=(40, 56),
        must_have=("maxpool", "layer1.0", "layer1", "layer1.1.relu_1", "layer4", "avgpool", "flatten"),
        n_cuts=22,
    ),
    ModelCase(
        name="vgg11_bn",
        build=vgg11_bn,
        image=(40, 56),
        must_have=("features.0", "features", "features.28", "avgpool", "classifier.1", "classifier.2"),
        n_cuts=33,
    ),
    ModelCase(
        name="mobilenet_v3_small",
        build=torchvision.models.mobilenet_v3_small,
        image=(40, 56),
        must_have=("features.0", "features.2.block.1", "features.11", "features", "classifier.0"),
        n_cuts=57,
    ),
    ModelCase(
        name="efficientnet_b0",
        build=torchvision.models.efficientnet_b0,
        image=(40, 56),
        must_have=("features.0", "features.1", "features.5.1", "features.7", "features", "avgpool"),
        n_cuts=77,
    ),
    ModelCase(
        name="densenet121",
        build=torchvision.models.densenet121,
        image=(40, 56),
        must_have=("features.pool0", "features.denseblock1", "features.transition2", "features.denseblock4"),
        n_cuts=24,
    ),
    ModelCase(
        name="googlenet",
        build=googlenet,
        image=(40, 56),
        must_have=("conv1", "inception3a", "inception4d", "inception5b"),
        n_cuts=24,
    ),
    ModelCase(
        name="vision_transformer",
        build=vision_transformer,
        image=(24, 24),
        must_have=("conv_proj", "encoder.layers.encoder_layer_0", "encoder.layers", "encoder"),
        n_cuts=13,
    ),
    ModelCase(
        name="convnext",
        build=convnext,
        image=(40, 56),
        must_have=("features.0", "features.1.0", "features.1", "features.5.2", "features"),
        n_cuts=27,
    ),
    ModelCase(
        name="timm_vit",
        build=timm_vit,
        image=(32, 48),
        must_have=("patch_embed", "blocks.0", "blocks.5", "norm"),
        n_cuts=31,
    ),
    ModelCase(
        name="timm_convnext",
        build=timm_convnext,
        image=(40, 56),
        must_have=("stem", "stages.0", "stages.2.blocks.1", "stages.3"),
        n_cuts=33,
    ),
]


@dataclass(frozen=True, kw_only=True)
class AttackCase:
    """An attack with knobs small enough for a test, and whether it needs to see the edge's weights or a label."""

    name: str
    attack: Attack


ATTACKS = [
    AttackCase(name="mean_image", attack=MeanImage()),
    AttackCase(name="decoder", attack=Decoder(width=64, blocks=1, epochs=4, trial_steps=5, restarts=2)),
    AttackCase(name="likelihood", attack=Likelihood(steps=150, sweep_steps=60, n_sweep=4)),
    AttackCase(name="shadow", attack=Shadow(epochs=2, decoder=Decoder(width=64, blocks=1, epochs=2, restarts=1))),
]


@dataclass(frozen=True, kw_only=True)
class DefenseCase:
    """A defense with knobs that fit stage 2 of the small street network."""

    name: str
    defense: Defense


DEFENSES = [
    DefenseCase(name="none", defense=NoDefense()),
    DefenseCase(name="noise", defense=AddedNoise(std=0.5)),
    DefenseCase(name="laplace", defense=AddedNoise(std=0.5, kind="laplace")),
    DefenseCase(name="dropout", defense=FeatureDropout(rate=0.4)),
    DefenseCase(name="nopeek", defense=NoPeek(weight=1.0)),
    DefenseCase(name="adversarial", defense=AdversarialTraining(weight=0.5, width=16)),
    DefenseCase(name="bottleneck", defense=Bottleneck(channels=5)),
    DefenseCase(name="patrol", defense=PATROL(target_share=0.6, adversary_width=16)),
    DefenseCase(name="siftfunnel", defense=SiftFunnel(channels=6)),
    DefenseCase(name="privynet", defense=PrivyNet(n_channels=6, secret_seed=5)),
    DefenseCase(name="privynet-random", defense=PrivyNet(n_channels=6, choice="random", secret_seed=6)),
    DefenseCase(name="siamese", defense=Hybrid(embedding="siamese")),
    DefenseCase(name="hybrid", defense=Hybrid(embedding="advanced", components=9, noise_std=0.1)),
]
