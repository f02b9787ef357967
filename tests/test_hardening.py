"""Every defense, from surgery to a file and back, on a network small enough for a second."""

import dataclasses
import json

import pytest
import torch

from cases import DEFENSES
from louver.attacks import Decoder
from louver.audit import Settings, audit
from louver.cut import Split, cuts, split
from louver.data import assign_roles, streets
from louver.defenses import DEFENSES as KINDS
from louver.defenses import AddedNoise, FeatureDropout, NoDefense, NoPeek, Pressure, PrivyNet
from louver.errors import ConfigError, DataError, WeightsError
from louver.hardening import Origin, harden, load_split, save_split
from louver.models import load_model
from louver.stochastic import Stochastic
from louver.tasks import Classification
from louver.training import Training

TASK = Classification("body", 6)
CONFIG = Training(epochs=4, batch_size=16, lr=2e-3, precision="float32")
TRAIN, VALIDATION = streets(96, seed=1), streets(32, seed=2)
CUT = "stage2"


def network(name="street_net", n_classes=6):
    return load_model(name, n_classes=n_classes, image_shape=(3, 64, 64), seed=4)


@pytest.fixture(scope="module")
def halves():
    return split(network(), CUT, torch.rand(2, 3, 64, 64))


def answers(halves, images, seed=0):
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        return halves.eval()(torch.from_numpy(images.floats()))


def hardened(halves, defense, **options):
    options = {"config": CONFIG, "seed": 3} | options
    return harden(halves, TASK, TRAIN, VALIDATION, defense, **options)


def test_the_table_of_cases_holds_every_defense():
    assert {type(case.defense) for case in DEFENSES} == set(KINDS.values())


@pytest.mark.parametrize("case", DEFENSES, ids=lambda case: case.name)
def test_a_hardened_split_is_an_ordinary_split_and_comes_back_from_its_files(case, halves, tmp_path):
    before = {name: value.clone() for name, value in halves.state_dict().items()}
    modes = [module.training for module in halves.modules()]
    hard = hardened(halves, case.defense, folder=tmp_path)
    assert isinstance(hard, Split)
    assert not hard.training
    assert all(torch.equal(value, before[name]) for name, value in halves.state_dict().items())
    assert [module.training for module in halves.modules()] == modes
    assert hard.cut.name == CUT
    with torch.no_grad():
        sent = hard.edge(torch.from_numpy(TRAIN.floats(slice(0, 7))))
    assert tuple(sent.shape) == (7, *hard.cut.feature_shape)
    assert hard.cut.cost.feature_bytes == 4 * sent[0].numel()
    assert cuts(hard, torch.rand(2, 3, 64, 64))
    origin = Origin(model="street_net", n_classes=6, image_shape=(3, 64, 64), cut=CUT, defense=case.defense)
    save_split(hard, tmp_path, origin)
    again = load_split(tmp_path)
    assert again.cut == hard.cut
    assert torch.equal(answers(again, VALIDATION), answers(hard, VALIDATION))


# How channels are chosen is nothing that training keeps.
@pytest.mark.parametrize(
    "case", [case for case in DEFENSES if case.name != "privynet-random"], ids=lambda case: case.name
)
def test_a_killed_run_ends_with_the_same_weights(case, halves, tmp_path):
    whole = hardened(halves, case.defense)

    class StoppedError(Exception):
        pass

    for stop in ("training: epoch 1 ", "training: epoch 2 ", "mending: epoch 1 "):

        def progress(what, fraction, stop=stop):
            if what.startswith(stop):
                raise StoppedError

        try:
            hardened(halves, case.defense, folder=tmp_path, progress=progress)
        except StoppedError:
            continue
    resumed = hardened(halves, case.defense, folder=tmp_path)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_noise_stays_on_and_is_fresh(halves):
    for defense in (AddedNoise(std=0.5), FeatureDropout(rate=0.3)):
        hard = hardened(halves, defense, config=dataclasses.replace(CONFIG, epochs=2))
        x = torch.from_numpy(VALIDATION.floats(slice(0, 5)))
        with torch.no_grad():
            assert not torch.equal(hard.edge(x), hard.edge(x))
        assert any(isinstance(layer, Stochastic) for layer in hard.edge.modules())


def test_an_audit_of_a_noisy_edge_is_repeatable_and_averages_what_is_sent_twice(halves):
    hard = hardened(halves, AddedNoise(std=2.0), config=dataclasses.replace(CONFIG, epochs=2))
    nothing = TRAIN.take(slice(0, 0))
    roles = assign_roles(train=nothing, validation=nothing, test=streets(24, seed=5), auxiliary=streets(96, seed=6))
    attack = {"decoder": Decoder(width=64, blocks=1, epochs=2, restarts=1)}

    def audited(**options):
        return audit([hard], roles, attack, settings=Settings(measures=("psnr",), test_images=24, **options)).rows[1]

    first = audited()
    assert first == dataclasses.replace(audited(), seconds=first.seconds)
    assert audited(observations=16).mean > first.mean


def breaking(spite):
    """A defense with one term: what `spite` makes of features, and from the third epoch on with `is_broken`."""

    class Term(Pressure):
        calls = 0

        def terms(self, split, batch):
            self.calls += 1
            return {"spite": spite(batch.features, is_broken=self.calls > 2 * 6)}

    class Breaking(NoPeek):
        def pressure(self, split, *, is_mending, seed):
            return Term()

    return Breaking()


def test_a_term_that_breaks_is_named_and_the_last_good_epoch_kept(halves, tmp_path):
    defense = breaking(lambda z, is_broken: z.square().mean() * (float("nan") if is_broken else 1))
    with pytest.raises(ConfigError, match=r"broke in epoch 3 of 4: the loss is nan, through 'spite'.*holds epoch 2"):
        hardened(halves, defense, folder=tmp_path)
    assert (tmp_path / "training-1.safetensors").is_file()


@pytest.mark.parametrize("gradient_norm", [None, 1.0])
def test_a_term_whose_gradient_breaks_is_named_before_it_reaches_the_weights(halves, tmp_path, gradient_norm):
    """The square root of 0 is 0, and its slope is not finite: the loss says nothing of it."""

    defense = breaking(lambda z, is_broken: ((z * 0).square().sum() + (0.0 if is_broken else 1.0)).sqrt())
    config = dataclasses.replace(CONFIG, gradient_norm=gradient_norm)
    with pytest.raises(ConfigError, match=r"epoch 3 of 4: the gradient is nan, through 'spite'.*holds epoch 2"):
        hardened(halves, defense, folder=tmp_path, config=config)


def test_a_batch_of_one_cannot_be_correlated(halves):
    one = TRAIN.take(slice(0, 2))
    with pytest.raises((ConfigError, DataError), match="batch"):
        harden(halves, TASK, one, VALIDATION, _OfOne(), config=dataclasses.replace(CONFIG, batch_size=2), seed=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfOne(NoPeek):
    def pressure(self, split, *, is_mending, seed):
        inner = super().pressure(split, is_mending=is_mending, seed=seed)

        class First(Pressure):
            def terms(self, split, batch):
                return inner.terms(
                    split, dataclasses.replace(batch, images=batch.images[:1], features=batch.features[:1])
                )

        return First()


def test_one_epoch_cannot_be_trained_and_mended(halves):
    mended = next(case.defense for case in DEFENSES if case.defense.mending)
    with pytest.raises(ConfigError, match="2 epochs or more"):
        hardened(halves, mended, config=dataclasses.replace(CONFIG, epochs=1))


@pytest.mark.parametrize("damage", ["no json", "torn weights", "other knobs", "unknown defense"])
def test_damaged_files_are_refused(halves, tmp_path, damage):
    origin = Origin(model="street_net", n_classes=6, image_shape=(3, 64, 64), cut=CUT, defense=NoDefense())
    save_split(halves, tmp_path, origin)
    record = json.loads((tmp_path / "split.json").read_text())
    if damage == "no json":
        (tmp_path / "split.json").unlink()
    elif damage == "torn weights":
        content = (tmp_path / "split.safetensors").read_bytes()
        (tmp_path / "split.safetensors").write_bytes(content[: len(content) // 2])
    elif damage == "other knobs":
        (tmp_path / "split.json").write_text(json.dumps(record | {"defense": "bottleneck", "knobs": {"channels": 3}}))
    else:
        (tmp_path / "split.json").write_text(json.dumps(record | {"defense": "prayer"}))
    with pytest.raises((ConfigError, WeightsError), match=r"harden|unknown defense"):
        load_split(tmp_path)


def test_weights_are_chosen_in_the_second_half(halves):
    scores = iter([0.9, 0.1, 0.3, 0.2])
    kept = []

    class Scored(Classification):
        def evaluate(self, model, images, *, batch_size=256, device="cpu"):
            kept.append({name: value.clone().contiguous() for name, value in model.state_dict().items()})
            return {"accuracy": next(scores), "n": 1.0}

    hard = harden(halves, Scored("body", 6), TRAIN, VALIDATION, NoDefense(), config=CONFIG, seed=0)
    assert all(torch.equal(value, kept[2][name]) for name, value in hard.state_dict().items())


def test_a_secret_drawn_from_the_system_survives_a_killed_run_and_is_not_told(halves, tmp_path):
    defense = PrivyNet(n_channels=4, choice="random")
    stopped = hardened(halves, defense, folder=tmp_path)
    (tmp_path / "training-1.safetensors").unlink()
    again = hardened(halves, defense, folder=tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in stopped.state_dict().items())
    assert (tmp_path / "secret.json").stat().st_mode & 0o077 == 0
    save_split(
        again, tmp_path, Origin(model="street_net", n_classes=6, image_shape=(3, 64, 64), cut=CUT, defense=defense)
    )
    assert "secret" not in (tmp_path / "split.json").read_text()
    assert torch.equal(answers(load_split(tmp_path), VALIDATION), answers(again, VALIDATION))
