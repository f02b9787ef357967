"""Experiment files: what they say is what runs, and what they get wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from louver.attacks import Decoder, Likelihood, Shadow
from louver.config import ATTACKS, Experiment, read_experiment
from louver.errors import ConfigError
from louver.training import Training

WHOLE = """
name = "toy"
seed = 3
thresholds = ["ssim<=0.3", "worst5(decoder.ssim)<=0.5"]

[model]
name = "street_net"

[training]
epochs = 2

[data]
label = "body"
train = "streets/0[:40]"
validation = "streets/1[:20]"
test = "streets/2[:20]"
auxiliary = "streets/3[:40]"

[threat]
grants = ["auxiliary", "query"]
n_auxiliary = 30

[audit]
cuts = ["stage1"]
test_images = 12

[attacks.decoder]
width = 64
epochs = 1
test_images = 9

[attacks.shadow]
decoder = { epochs = 3, restarts = 1 }
"""


def read(tmp_path: Path, text: str = WHOLE, **changes: list[str]) -> Experiment:
    path = tmp_path / "toy.toml"
    path.write_text(text)
    return read_experiment(path, **changes)


def test_a_file_is_read_as_it_says(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert (found.name, found.seed, found.audit.cuts) == ("toy", 3, ("stage1",))
    assert found.training == Training(epochs=2)
    assert found.threat.grants == {"auxiliary", "query"}
    assert found.threat.n_auxiliary == 30
    assert found.attacks["decoder"].attack == Decoder(width=64, epochs=1)
    assert found.attacks["decoder"].test_images == 9
    assert found.attacks["shadow"].attack == Shadow(decoder=Decoder(epochs=3, restarts=1))
    assert found.thresholds == ("ssim<=0.3", "worst5(decoder.ssim)<=0.5")


def test_the_command_line_replaces_what_it_names_and_the_copy_holds_it(tmp_path: Path) -> None:
    found = read(tmp_path, cuts=["stage2"], attacks=["decoder", "likelihood"], thresholds=["psnr<=15"])
    assert found.audit.cuts == ("stage2",)
    assert found.attacks["decoder"].attack == Decoder(width=64, epochs=1)
    assert found.attacks["likelihood"].attack == Likelihood()
    again = read(tmp_path, found.to_toml())
    assert again == found


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[training]", "[trainign]", "unknown key 'trainign'; nearest: training"),
        ("epochs = 2", "epoch = 2", r"\[training\]: unknown key 'epoch'; nearest: epochs"),
        ("test_images = 12", "test_imgs = 12", r"\[audit\]: unknown key 'test_imgs'; nearest: test_images"),
        ("width = 64", "widht = 64", r"\[attacks.decoder\]: unknown key 'widht'; nearest: width"),
        ("restarts = 1", "restart = 1", r"\[attacks.shadow\], decoder: unknown key 'restart'; nearest: restarts"),
        ("[attacks.shadow]", "[attacks.shadows]", "unknown attack 'shadows'; nearest: shadow"),
        ("[attacks.shadow]", "[attacks.mean_image]", "the floor is part of every audit"),
        ('"query"]', '"querry"]', "unknown grant 'querry'; nearest: query"),
        ("width = 64", "width = 8", "64 or more"),
        ("width = 64", 'width = "wide"', "width.*valid integer.*'wide'"),
        ("ssim<=0.3", "ssim>=0.3", "would pass"),
        ("seed = 3", 'seed = "three"', "seed.*valid integer"),
        ('name = "street_net"', "", r"\[model\]: expected 'name', got none"),
        ('name = "street_net"', 'name = "street_net"\nweights = "w.safetensors"', "got both"),
        ("[training]\nepochs = 2", "", "no weights and no"),
        ('train = "streets/0[:40]"', "", "needs data.train"),
        ('name = "toy"', 'name = "../../evil"', "names a folder"),
        ("seed = 3", "seed = -1", "seed of 0 or more"),
        ("seed = 3", 'seed = "3"', "seed.*valid integer"),
        ("epochs = 2", "epochs = true", "epochs.*valid integer"),
        ('name = "toy"', "name = toy", "is not TOML.*line"),
        ('name = "toy"', "", "expected 'name'"),
    ],
)
def test_what_is_wrong_is_named_with_the_nearest_legal_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert WHOLE.count(old) >= 1
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        read(tmp_path, WHOLE.replace(old, new, 1))


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nothing.toml.*experiment file"):
        read_experiment(tmp_path / "nothing.toml")


def test_every_attack_can_be_named() -> None:
    import louver.attacks as module

    attacks = {
        a
        for a in map(module.__dict__.get, module.__all__)
        if hasattr(a, "prepare") and hasattr(a, "__dataclass_fields__")
    }
    assert set(ATTACKS.values()) == attacks - {module.MeanImage}


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("examples/*.toml")), ids=lambda p: p.name)
def test_examples_are_read(path: Path) -> None:
    assert read_experiment(path).name == path.stem
