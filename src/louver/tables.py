"""The tables of defenses: which ones, at which strengths, on which images, judged by what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from louver.attacks import Attack, Decoder, Likelihood
from louver.audit import Settings
from louver.cut import split
from louver.data import assign_roles, load_images
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
from louver.models import load_model
from louver.study import Judging
from louver.tasks import Classification, ReIdentification, Task
from louver.training import Training, fit
from louver.types import Images, Progress, Roles

__all__ = ["BENCHES", "Bench", "Cell", "Scale"]

Scale = Literal["laptop", "paper"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One defended split of a table. Without `is_trained` the network is judged as it came; `epochs` are the table's
    unless it says otherwise.
    """

    name: str
    defense: Defense
    cut: str
    knob: str | None = None
    strength: float | None = None
    variant: str = ""
    is_trained: bool = True
    epochs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A table: its victim, images, task, how cells are trained and judged, and the cells."""

    group: str
    model: str
    n_outputs: int
    roles: Roles
    task: Task
    label: str | None
    judging: Judging
    training: Training
    cells: tuple[Cell, ...]
    victim: Callable[[Path, Progress], nn.Module]
    seed: int = 0


def _attacks(scale: Scale, *, is_small: bool) -> dict[str, Attack]:
    """On a laptop, pictures that are not small are attacked by the decoder alone, in fewer passes."""
    if scale == "paper":
        return {"decoder": Decoder(), "likelihood": Likelihood()}
    decoder = Decoder(width=64, blocks=2, epochs=4 if is_small else 3, trial_steps=40, restarts=1)
    likelihood = Likelihood(steps=120, sweep_steps=40, n_sweep=4)
    return {"decoder": decoder, "likelihood": likelihood} if is_small else {"decoder": decoder}


def _swept(
    name: str, make: Callable[[float], Defense], knob: str, values: tuple[float, ...], cut: str, variant: str = ""
) -> list[Cell]:
    return [
        Cell(name=f"{name}-{value:g}", defense=make(value), cut=cut, knob=knob, strength=value, variant=variant)
        for value in values
    ]


def _unprotected(cut: str, *, is_trained: bool = False) -> Cell:
    return Cell(
        name=f"none-{cut}" + ("-tuned" if is_trained else ""),
        defense=NoDefense(),
        cut=cut,
        variant=f"{cut}, fine-tuned" if is_trained else cut,
        is_trained=is_trained,
    )


def _ablations(strength: float, make: Callable[..., Defense], cut: str) -> list[Cell]:
    """PATROL without each of its parts."""
    parts = {"pruning": "is_pruned", "Lipschitz term": "has_lipschitz", "adversary": "has_adversary"}
    return [
        Cell(
            name=f"patrol-no-{part.split()[0].lower()}",
            defense=make(strength, **{flag: False}),
            cut=cut,
            knob="beta",
            strength=strength,
            variant=f"without {part}",
        )
        for part, flag in parts.items()
    ]


def _cifar10(scale: Scale, seed: int) -> Bench:
    """Every defense at several strengths, at the cut after the second of three stages."""
    is_laptop = scale == "laptop"
    cut, shallower = "layer2", "layer1"
    budget = _edge_macs(_cifar_model(), shallower, (3, 32, 32))

    def patrol(beta: float, **switches: bool) -> Defense:
        return PATROL(target_macs=budget, beta=beta, mending_share=0.67 if is_laptop else 0.4, **switches)

    cells = [
        _unprotected(shallower),
        _unprotected(cut),
        _unprotected("layer3"),
        _unprotected(shallower, is_trained=True),
        _unprotected(cut, is_trained=True),
        *_swept("noise", lambda s: AddedNoise(std=s), "std", (0.5, 1.0, 2.0), cut),
        *_swept("nopeek", lambda w: NoPeek(weight=w), "weight", (1.0, 4.0, 16.0), cut),
        *_swept("patrol", patrol, "beta", (0.25, 1.0, 4.0), cut),
        *_ablations(1.0, patrol, cut),
        *_swept("siftfunnel", lambda c: SiftFunnel(channels=int(c)), "channels", (12, 6, 3), cut),
        *_swept("privynet", lambda d: PrivyNet(n_channels=int(d), secret_seed=seed), "n_channels", (16, 8, 4), cut),
        *_swept("hybrid", _hybrid("advanced", 64), "noise_std", (0.5, 1.0, 2.0), cut),
        *(
            []
            if is_laptop
            else _swept("hybrid-noisy", _hybrid("noisy", 64), "noise_std", (0.5, 1.0, 2.0), cut, "noisy")
        ),
        *_swept("bottleneck", lambda c: Bottleneck(channels=int(c)), "channels", (12, 6, 3), cut),
        *_swept("dropout", lambda r: FeatureDropout(rate=r), "rate", (0.8,), cut),
        *_swept("adversarial", lambda w: AdversarialTraining(weight=w), "weight", (1.0,), cut),
        *([] if is_laptop else _swept("laplace", _laplace, "std", (0.5, 1.0, 2.0), cut, "laplace")),
    ]
    return _on_cifar10("CIFAR-10", cells, scale, seed, completion_counts=() if is_laptop else (5, 20, 100))


def _cifar10_choices(scale: Scale, seed: int) -> Bench:
    """What to choose within one defense: PrivyNet's layers, number and kind of channels; SiftFunnel's decorrelation;
    how smooth PATROL's edge is made and how long it is trained.
    """
    layers = {1: "layer1", 2: "layer2", 3: "layer3"}
    cut = layers[2]
    sizes = (16, 8, 4)
    budget = _edge_macs(_cifar_model(), layers[1], (3, 32, 32))
    long = 12 if scale == "laptop" else 160
    cells = [
        _unprotected(cut),
        *(
            Cell(
                name=f"layers-{m}",
                defense=PrivyNet(n_channels=8, secret_seed=seed),
                cut=cut_m,
                knob="m",
                strength=m,
                variant="8 channels after m stages",
            )
            for m, cut_m in layers.items()
        ),
        *_swept("fisher", _channels("fisher", seed), "n_channels", sizes, cut, "Fisher's channels"),
        # Which channels are drawn is chance: Fisher's choice is fixed, what it is compared to is drawn several times.
        *(
            cell
            for draw in range(3 if scale == "laptop" else 10)
            for cell in _swept(
                f"random{draw}", _channels("random", draw), "n_channels", sizes, cut, f"random channels, draw {draw}"
            )
        ),
        *_swept(
            "decorrelated", lambda g: SiftFunnel(channels=12, gamma=g), "gamma", (0.0, 2.0, 20.0), cut, "12 channels"
        ),
        *_swept(
            "smooth",
            lambda a: PATROL(target_macs=budget, alpha=a, has_adversary=False, mending_share=0.67),
            "alpha",
            (0.005, 0.05, 0.5),
            cut,
            "smooth, no adversary",
        ),
        *(
            replace(cell, epochs=long)
            for cell in _swept(
                "patrol-long",
                lambda b: PATROL(target_macs=budget, beta=b, mending_share=0.67),
                "beta",
                (0.25, 1.0),
                cut,
                f"{long} epochs",
            )
        ),
    ]
    counts = (20,) if scale == "laptop" else (5, 20, 100)
    return _on_cifar10("CIFAR-10, choices", cells, scale, seed, completion_counts=counts)


def _cifar10_longer(scale: Scale, seed: int) -> Bench:
    """SiftFunnel, and what it must beat, trained four times as long; its other published weights, too."""
    cut = "layer2"
    published = SiftFunnel(channels=12, smoothing=0.35, alpha=4.5, beta=0.4, gamma=0.1)
    cells = [
        _unprotected(cut, is_trained=True),
        *_swept("noise", lambda s: AddedNoise(std=s), "std", (0.5,), cut),
        *_swept("bottleneck", lambda c: Bottleneck(channels=int(c)), "channels", (12,), cut),
        *_swept("adversarial", lambda w: AdversarialTraining(weight=w), "weight", (1.0,), cut),
        *_swept("siftfunnel", lambda c: SiftFunnel(channels=int(c)), "channels", (12,), cut),
        Cell(name="siftfunnel-published", defense=published, cut=cut, variant="other published weights"),
    ]
    epochs = 12 if scale == "laptop" else 160
    longer = [replace(cell, epochs=epochs) for cell in cells]
    return _on_cifar10("CIFAR-10, longer", longer, scale, seed, completion_counts=())


def _cifar_model() -> nn.Module:
    return load_model("cifar_resnet20", weights="resnet20_cifar10")


def _edge_macs(model: nn.Module, cut: str, image_shape: tuple[int, int, int]) -> int:
    example = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0))
    return split(model, cut, example).cut.cost.edge.macs


def _on_cifar10(group: str, cells: list[Cell], scale: Scale, seed: int, *, completion_counts: tuple[int, ...]) -> Bench:
    is_laptop = scale == "laptop"
    model = _cifar_model()
    roles = assign_roles(
        train=load_images("cifar10/train[:5000]" if is_laptop else "cifar10/train[:45000]"),
        # Not of the train split: the published weights have seen all of it, and would validate their own memory.
        validation=load_images("cifar10/test[9000:]"),
        test=load_images("cifar10/test[:1000]"),
        auxiliary=load_images("cifar10/test[1000:2500]" if is_laptop else "cifar10/test[1000:9000]"),
    )
    return Bench(
        group=group,
        model="cifar_resnet20",
        n_outputs=10,
        roles=roles,
        task=Classification("label", 10),
        label="label",
        judging=Judging(
            attacks=_attacks(scale, is_small=True),
            settings=_settings(scale, 300, has_likelihood=True),
            information_images=1000 if is_laptop else 8000,
            mine_steps=200 if is_laptop else 3000,
            completion_counts=completion_counts,
        ),
        training=Training(
            epochs=3 if is_laptop else 40,
            batch_size=64 if is_laptop else 128,
            lr=2e-3,
            flip=True,
            shift=4,
            warmup=0.1,
        ),
        cells=tuple(cells),
        victim=lambda folder, tell: model,
        seed=seed,
    )


def _channels(choice: Literal["fisher", "random"], draw: int) -> Callable[[float], Defense]:
    """PrivyNet's choice of channels alone: none dropped for leaking, none to spare."""

    def make(n_channels: float) -> Defense:
        return PrivyNet(n_channels=int(n_channels), choice=choice, drop_leaky=0.0, spare=0.0, secret_seed=draw)

    return make


def _laplace(std: float) -> Defense:
    return AddedNoise(kind="laplace", std=std)


def _hybrid(embedding: Literal["noisy", "advanced"], components: int) -> Callable[[float], Defense]:
    def make(noise_std: float) -> Defense:
        return Hybrid(
            embedding=embedding,
            components=components,
            noise_std=noise_std,
            noise_scale="relative",
            mending_share=0.25,
        )

    return make


def _settings(scale: Scale, test_images: int, *, has_likelihood: bool) -> Settings:
    most = 64 if scale == "laptop" else 500
    return Settings(
        measures=("psnr", "ssim"),
        test_images=test_images if scale == "laptop" else 1000,
        limits={"likelihood": most} if has_likelihood else {},
    )


def _trained(bench_model: str, n_outputs: int, task: Task, roles: Roles, config: Training, seed: int) -> Any:  # noqa: ANN401
    def victim(folder: Path, tell: Progress) -> nn.Module:
        model = load_model(bench_model, n_classes=n_outputs, image_shape=roles.test.image_shape, seed=seed)
        return fit(
            model,
            task,
            roles.train,
            roles.validation,
            config=config,
            seed=seed,
            checkpoint=folder / "victim.safetensors",
            progress=lambda what, fraction: tell(f"victim: {what}", fraction * 0.01),
        )

    return victim


def _faces(scale: Scale, seed: int) -> Bench:
    """Gender is the task, identity the secret."""
    is_laptop = scale == "laptop"
    size = 64
    train = load_images("celeba299_faces/targets/train", size=size)
    test = load_images("celeba299_faces/targets/test", size=size)
    n_validation = len(test) // 3
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed)).numpy()
    roles = assign_roles(
        train=train,
        validation=test.take(order[:n_validation]),
        test=test.take(order[n_validation:]),
        auxiliary=load_images(
            "celeba299_faces/attackers[:1500]" if is_laptop else "celeba299_faces/attackers", size=size
        ),
    )
    task = Classification("female", 2)
    cut = "stage3"
    config = Training(epochs=20 if is_laptop else 60, batch_size=64, lr=3e-3, flip=True, shift=3)
    cells = [
        _unprotected(cut),
        Cell(name="simple", defense=Hybrid(embedding="simple"), cut=cut, variant="simple"),
        Cell(name="siamese", defense=Hybrid(embedding="siamese"), cut=cut, variant="siamese"),
        *_swept(
            "reduced", lambda c: Hybrid(embedding="reduced", components=int(c)), "components", (8, 4), cut, "reduced"
        ),
        *_swept("noisy", _hybrid("noisy", 8), "noise_std", (0.3, 1.0, 3.0), cut, "noisy"),
        *_swept("advanced", _hybrid("advanced", 8), "noise_std", (0.1, 0.3, 1.0, 3.0), cut, "advanced"),
        *_swept("noise", lambda s: AddedNoise(std=s), "std", (0.5, 1.0, 2.0), cut),
        *_swept("siftfunnel", lambda c: SiftFunnel(channels=int(c)), "channels", (12, 4), cut),
    ]
    return Bench(
        group="faces",
        model="street_net",
        n_outputs=2,
        roles=roles,
        task=task,
        label="female",
        judging=Judging(
            attacks=_attacks(scale, is_small=False),
            settings=_settings(scale, 300, has_likelihood=not is_laptop),
            identity="identity",
            information_images=1000 if is_laptop else 4000,
            mine_steps=200 if is_laptop else 3000,
        ),
        training=replace(config, epochs=10 if is_laptop else 30, lr=1e-3),
        cells=tuple(cells),
        victim=_trained("street_net", 2, task, roles, config, seed),
        seed=seed,
    )


def _vehicles(scale: Scale, seed: int) -> Bench:
    """The real vehicle set: re-identification is the task."""
    size = 64
    # Pictures come in pairs of a vehicle: whole vehicles are set aside for the attacker, and generated ones added,
    # since a few hundred pictures alone would make a weak attack.
    real = load_images("vehicle_reid/train[600:]", size=size)
    generated = load_images("streets/77[:1200]" if scale == "laptop" else "streets/77[:10000]")
    unknown = np.full(len(generated), -1)
    owned = Images(
        pixels=np.concatenate([real.pixels, generated.pixels]),
        labels={name: np.concatenate([real.labels[name], unknown]) for name in ("camera", "type", "identity")},
        name="real and generated vehicles",
    )
    roles = assign_roles(
        train=load_images("vehicle_reid/train[:600]", size=size),
        validation=load_images("vehicle_reid/validation", size=size),
        test=load_images("vehicle_reid/test", size=size),
        auxiliary=owned,
    )
    task = ReIdentification(per_identity=2)
    bench = _reidentification(scale, seed, "vehicles", roles, task, private=("camera", "type"))
    # About as many as are real: what features say of generated pictures is another question.
    return replace(bench, judging=replace(bench.judging, information_images=300))


def _streets(scale: Scale, seed: int) -> Bench:
    """The generated world: re-identification is the task; place, pedestrian and door number must not leak.

    On a laptop the door number is left out, which 1,500 pictures of 64 pixels do not teach anyone to read, undefended
    features included.
    """
    is_laptop = scale == "laptop"
    n = 3000 if is_laptop else 20000
    task = ReIdentification()
    roles = assign_roles(
        train=load_images(f"streets/71[:{n}]"),
        validation=load_images("streets/72[:600]"),
        test=load_images("streets/73[:600]"),
        auxiliary=load_images("streets/74[:1500]" if is_laptop else "streets/74[:10000]"),
    )
    private = ("place", "pedestrian", *(() if is_laptop else ("door_number",)))
    return _reidentification(scale, seed, "streets", roles, task, private=private, is_short=is_laptop)


def _reidentification(
    scale: Scale,
    seed: int,
    group: str,
    roles: Roles,
    task: Task,
    *,
    private: tuple[str, ...],
    is_short: bool = False,
) -> Bench:
    """A table with re-identification as the task. `is_short`: fewer strengths, and PATROL only as a whole."""
    is_laptop = scale == "laptop"
    cut, shallower = "stage3", "stage2"
    model = load_model("street_net", n_classes=64, image_shape=roles.test.image_shape, seed=seed)
    budget = _edge_macs(model, shallower, roles.test.image_shape)
    config = Training(epochs=20 if is_laptop else 80, batch_size=64, lr=3e-3, flip=True, shift=3)

    def patrol(beta: float, **switches: bool) -> Defense:
        return PATROL(target_macs=budget, beta=beta, **switches)

    cells = [
        _unprotected(shallower),
        _unprotected(cut),
        _unprotected(shallower, is_trained=True),
        _unprotected(cut, is_trained=True),
        *_swept("noise", lambda s: AddedNoise(std=s), "std", (1.0, 2.0) if is_short else (0.5, 1.0, 2.0), cut),
        *_swept("patrol", patrol, "beta", (0.25, 1.0) if is_short else (0.25, 1.0, 4.0), cut),
        *([] if is_short else _ablations(1.0, patrol, cut)),
        *_swept("siftfunnel", lambda c: SiftFunnel(channels=int(c)), "channels", (12, 4), cut),
        *_swept("nopeek", lambda w: NoPeek(weight=w), "weight", (4.0,), cut),
    ]
    return Bench(
        group=group,
        model="street_net",
        n_outputs=64,
        roles=roles,
        task=task,
        label=None,
        judging=Judging(
            attacks=_attacks(scale, is_small=False),
            settings=_settings(scale, 300, has_likelihood=not is_laptop),
            private=private,
            on_reconstructions=bool(private),
            information_images=1000 if is_laptop else 4000,
            mine_steps=200 if is_laptop else 3000,
        ),
        training=replace(config, epochs=8 if is_laptop else 30, lr=1e-3),
        cells=tuple(cells),
        victim=_trained("street_net", 64, task, roles, config, seed),
        seed=seed,
    )


BENCHES: Mapping[str, Callable[[Scale, int], Bench]] = {
    "cifar10": _cifar10,
    "cifar10-choices": _cifar10_choices,
    "cifar10-longer": _cifar10_longer,
    "faces": _faces,
    "streets": _streets,
    "vehicles": _vehicles,
}
"""Tables by name."""
