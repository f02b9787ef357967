"""Every attack, with controls: what can be inverted must be, and nothing comes from nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cases import ATTACKS, AttackCase
from louver.attacks import Decoder, Likelihood, MeanImage, Shadow, View
from louver.attacks.decoder import _Network
from louver.attacks.likelihood import frozen, total_variation
from louver.attacks.linear import feature_statistics, fit_flat, fit_local, standardization, to_grid
from louver.errors import AttackError, ConfigError, DataError, ThreatError
from louver.features import FreshRows
from louver.measures import psnr, ssim, summarize
from louver.stochastic import Noise as DefenseNoise
from louver.stochastic import RandomMask
from toys import SHAPE, Mixed, Noise, Shuffled, Silent, Tokens, Wide, features_of, pictures, view_of

N_TEST = 24
SMALL_DECODER = Decoder(width=64, blocks=1, epochs=4, trial_steps=5, restarts=2)


def scores(view: View, attack: object, *, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Truth, reconstruction, and floor for test images that nothing else has seen."""
    assert view.edge is not None
    test = features_of(view.edge, pictures(N_TEST, seed=9, shape=view.image_shape))
    index = np.arange(N_TEST)
    truth, features = test.images.rows(index), test.features.rows(index)
    guess = attack.prepare(view, seed=seed)(features)
    floor = MeanImage().prepare(view, seed=seed)(features)
    return truth, guess, floor


@pytest.mark.parametrize("case", ATTACKS, ids=lambda c: c.name)
def test_inverter_returns_pictures_and_comes_back_from_its_state(case: AttackCase) -> None:
    edge = Wide(channels=12)
    view = view_of(edge, n=80, cloud=nn.Sequential(nn.Flatten(), nn.Linear(12 * SHAPE[1] * SHAPE[2], 3)))
    inverter = case.attack.prepare(view, seed=7)
    features = features_of(edge, pictures(5, seed=9)).features.rows(np.arange(5))
    guess = inverter(features)
    assert guess.shape == (5, *SHAPE)
    assert 0 <= float(guess.min()) <= float(guess.max()) <= 1
    state = {name: tensor.clone() for name, tensor in inverter.state().items()}
    torch.testing.assert_close(case.attack.restore(view, state)(features), guess, rtol=0, atol=0)


@pytest.mark.parametrize("case", ATTACKS, ids=lambda c: c.name)
def test_attack_leaves_edge_and_cloud_untouched(case: AttackCase) -> None:
    edge = Wide(channels=12).train()
    cloud = nn.Sequential(nn.Flatten(), nn.Linear(12 * SHAPE[1] * SHAPE[2], 3)).train()
    before = [p.clone() for p in (*edge.parameters(), *cloud.parameters())]
    case.attack.prepare(view_of(edge, n=60, cloud=cloud), seed=1)
    after = [*edge.parameters(), *cloud.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.requires_grad and p.grad is None for p in after)
    assert edge.training
    assert cloud.training


@pytest.mark.parametrize("case", ATTACKS, ids=lambda c: c.name)
def test_same_seed_gives_the_same_pictures(case: AttackCase) -> None:
    view = view_of(Wide(channels=12), n=60, cloud=nn.Sequential(nn.Flatten(), nn.Linear(12 * SHAPE[1] * SHAPE[2], 3)))
    features = view.validation.features.rows(np.arange(5))
    first, second = (case.attack.prepare(view, seed=3)(features) for _ in range(2))
    assert torch.equal(first, second)


# Positive controls: an attack that misses these is broken, whatever it says of a defense


INVERTIBLE = {
    "orthogonal mixing": Mixed(),
    "shuffled pixels": Shuffled(),
    "features scaled by 1e-4": Wide(scale=1e-4),
    "more channels than pixels": Wide(),
    "tokens": Tokens(),
}


@pytest.mark.parametrize("name", INVERTIBLE)
def test_decoder_inverts_what_can_be_inverted(name: str) -> None:
    # 576 pixels mixed need as many examples before a matrix is known.
    truth, guess, floor = scores(view_of(INVERTIBLE[name], n=700), SMALL_DECODER)
    assert float(psnr(truth, guess).mean()) > 30
    assert float(psnr(truth, guess).mean()) > float(psnr(truth, floor).mean()) + 10
    assert float(ssim(truth, guess).mean()) > 0.9


@pytest.mark.parametrize("name", [name for name in INVERTIBLE if name != "tokens"])
def test_likelihood_inverts_what_can_be_inverted(name: str) -> None:
    truth, guess, floor = scores(view_of(INVERTIBLE[name], n=60), Likelihood(starts=("mean",)))
    assert float(psnr(truth, guess).mean()) > 30
    assert float(psnr(truth, guess).mean()) > float(psnr(truth, floor).mean()) + 10


def test_shadow_beats_the_floor_without_one_look_at_the_edge() -> None:
    # The task is to say where the picture is brightest and in which color; the cloud is told the mean color of each
    # place. A substitute that the cloud accepts has learned to say the same.
    edge, cloud = nn.AvgPool2d(4), nn.Sequential(nn.Flatten(), nn.Linear(36, 36, bias=False))
    nn.init.eye_(cloud[1].weight).data.mul_(20)
    view = view_of(edge, n=500, cloud=cloud)
    brightest = view.train.features.rows(np.arange(500)).flatten(1).argmax(1)
    blind = replace(view, edge=None, train=replace(view.train, features=None, labels=brightest))
    attack = Shadow(width=32, epochs=10, decoder=replace(SMALL_DECODER, restarts=1))
    test = features_of(edge, pictures(N_TEST, seed=9))
    truth, features = test.images.rows(np.arange(N_TEST)), test.features.rows(np.arange(N_TEST))
    floor = MeanImage().prepare(view, seed=7)(features)
    guess = attack.prepare(blind, seed=7)(features)
    scored = [psnr(truth, picture).double().numpy() for picture in (guess, floor)]
    assert summarize(*scored, "high", seed=0).beats_floor


# Negative controls: nothing comes from nothing


@pytest.mark.parametrize("attack", [SMALL_DECODER, Likelihood(steps=60, sweep_steps=30)], ids=["decoder", "likelihood"])
@pytest.mark.parametrize("edge", [Silent(), Noise()], ids=["constant", "noise"])
def test_nothing_beats_the_floor_on_features_that_say_nothing(attack: object, edge: nn.Module) -> None:
    if isinstance(attack, Likelihood) and isinstance(edge, Noise):
        pytest.skip("a search needs an edge that answers alike twice")
    truth, guess, floor = scores(view_of(edge, n=120), attack)
    for measure, leaks_when in ((psnr, "high"), (ssim, "high")):
        found, know_nothing = (measure(truth, g).double().numpy() for g in (guess, floor))
        assert not summarize(found, know_nothing, leaks_when, seed=0).beats_floor


# The parts


def test_decoder_has_no_bottleneck() -> None:
    with pytest.raises(ConfigError, match="64 or more"):
        Decoder(width=32)
    view = view_of(Wide(channels=12), n=40)
    mean, scale = feature_statistics(view.train, on_grid=SHAPE)
    fitted = fit_local(view.train, view.validation, mean, scale, SHAPE)
    assert fitted is not None
    network = _Network(SMALL_DECODER, fitted[0], mean, scale, mean.shape[1], SHAPE)
    widths = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d) and m is not network.leave]
    assert min(widths) >= 64


def test_decoder_takes_the_layout_that_inverts_better() -> None:
    shuffled, wide = view_of(Shuffled(), n=700), view_of(Wide(), n=100)
    one = replace(SMALL_DECODER, epochs=1, restarts=1)
    assert one.prepare(shuffled, seed=0).state()["base.weight"].ndim == 2
    assert one.prepare(wide, seed=0).state()["base.weight"].ndim == 4


def test_a_better_flat_inverse_does_not_win_without_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen by linear errors, NoPeek's edge looked a third more private than it is: its features are a grid."""
    from louver.attacks import decoder as module

    def flattered(*arguments: object) -> tuple[nn.Module, float] | None:
        fitted = fit_flat(*arguments)  # type: ignore[arg-type]
        return fitted and (fitted[0], 0.0)

    monkeypatch.setattr(module, "fit_flat", flattered)
    monkeypatch.setattr(module, "_variance", lambda _: 0.0)
    view, told = view_of(Wide(), n=100), []
    attack = replace(SMALL_DECODER, epochs=1, restarts=1)
    inverter = attack.prepare(view, seed=0, progress=lambda what, _: told.append(what))
    assert told[:2] == ["trial 1/2, local", "trial 2/2, flat"]
    assert inverter.state()["base.weight"].ndim == 4


def test_decoder_keeps_the_epoch_that_validation_likes_best(monkeypatch: pytest.MonkeyPatch) -> None:
    from louver.attacks import decoder as module

    errors = iter([5.0, 4.0, 1.0, 3.0, 2.0, 6.0])
    seen: list[dict[str, torch.Tensor]] = []

    def judged(run: object) -> float:
        seen.append({name: p.clone() for name, p in run._average.items()})  # type: ignore[attr-defined]
        return next(errors)

    monkeypatch.setattr(module._Run, "_judge", judged)
    attack = Decoder(width=64, blocks=1, epochs=4, restarts=1)
    inverter = attack.prepare(view_of(Wide(channels=12), n=64), seed=0)
    kept = inverter.state()
    assert all(torch.equal(kept[name], tensor) for name, tensor in seen[2].items())
    assert not torch.equal(seen[2]["enter.weight"], seen[-1]["enter.weight"])


def test_decoder_says_when_it_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    from louver.attacks import decoder as module

    monkeypatch.setattr(module, "_loss", lambda kind, guess, truth: guess.sum() * math.nan)
    with pytest.raises(AttackError, match="diverged"):
        SMALL_DECODER.prepare(view_of(Wide(channels=12), n=64), seed=0)


def test_standardization_matches_numpy_and_hears_small_signals_on_large_means() -> None:
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(
        (rng.normal(size=(50, 4, 3, 5)) * [[[[1.0]], [[1e-4]], [[0.0]], [[1e-3]]]]).astype("float32")
    )
    rows[:, 3] += 10
    mean, scale = standardization(iter(rows.split(7)))
    expected = rows.double().numpy()
    np.testing.assert_allclose(mean.flatten(), expected.mean((0, 2, 3)), rtol=1e-5, atol=1e-7)
    deviation = expected.std((0, 2, 3))
    np.testing.assert_allclose(scale.flatten()[[0, 1, 3]], 1 / deviation[[0, 1, 3]], rtol=1e-3)
    assert float(scale.flatten()[2]) == 0


@pytest.mark.parametrize(
    ("features", "image", "grid"),
    [
        ((7, 16, 32, 32), (3, 32, 32), (7, 64, 16, 16)),
        ((7, 5, 9, 11), (3, 36, 44), (7, 5, 9, 11)),
        ((7, 4, 15, 17), (3, 15, 17), (7, 16, 8, 9)),
        ((7, 14, 14, 96), (3, 56, 56), (7, 96, 14, 14)),
        ((7, 17, 12), (3, 16, 16), (7, 24, 4, 4)),
        ((7, 16, 12), (3, 16, 16), (7, 12, 4, 4)),
        ((7, 15, 12), (3, 16, 16), (7, 180, 1, 1)),
        ((7, 10), (3, 16, 16), (7, 10, 1, 1)),
    ],
)
def test_features_become_a_grid_and_lose_nothing(
    features: tuple[int, ...], image: tuple[int, int, int], grid: tuple[int, ...]
) -> None:
    x = torch.rand(features, generator=torch.Generator().manual_seed(0)) + 1
    out = to_grid(x, image)
    assert out.shape == grid
    assert set(x.flatten().tolist()) <= set(out.flatten().tolist())


def test_linear_inverses_are_those_of_least_squares() -> None:
    view = view_of(Mixed((3, 4, 5)), n=200, shape=(3, 4, 5))
    mean, scale = feature_statistics(view.train)
    fitted = fit_flat(view.train, view.validation, mean, scale, (3, 4, 5))
    assert fitted is not None
    index = np.arange(200)
    columns = ((view.train.features.rows(index) - mean) * scale).double()
    columns = torch.cat([columns, torch.ones(200, 1, dtype=torch.float64)], 1)
    targets = view.train.images.rows(index).flatten(1).double()
    truth = columns @ torch.linalg.lstsq(columns, targets).solution
    with torch.no_grad():
        guess = fitted[0]((view.train.features.rows(index) - mean) * scale).flatten(1)
    torch.testing.assert_close(guess.double(), truth, rtol=0, atol=2e-3)


def test_folded_edge_has_the_features_of_the_edge() -> None:
    from louver.cut import split

    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    net(torch.rand(5, *SHAPE))
    edge = split(net.eval(), "2", torch.rand(2, *SHAPE)).edge
    folded = frozen(edge, SHAPE)
    x = torch.rand(7, *SHAPE)
    torch.testing.assert_close(folded(x), edge(x), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())


class _Uneven(nn.Module):
    """The pictures' coordinates on an orthogonal basis, of which all but a few hardly ever change; then noise."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = Mixed()
        self.noise = DefenseNoise(0.05)
        self.register_buffer("gain", torch.cat([torch.ones(60), torch.full((516,), 0.02)]))

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(self.mix(x) * self.gain)


def test_likelihood_weighs_channels_by_the_noise_and_not_by_what_they_say() -> None:
    view = view_of(_Uneven(), n=100)
    attack = Likelihood(steps=80, starts=("mean",), tv=(0.01,), l2=(0.0,))
    search = attack.prepare(view, seed=0)
    scale = search.state()["scale"]
    assert len(scale.unique()) == 1
    _, own = feature_statistics(view.train)
    assert float(own.min()) < float(scale.max()) < float(own.max())
    again = attack.restore(view, search.state())
    truth, features = view.validation.images.rows(np.arange(8)), view.validation.features.rows(np.arange(8))
    alike = float(psnr(truth, search(features)).mean())
    assert alike == pytest.approx(float(psnr(truth, again(features)).mean()))
    again._scale = own
    assert alike > float(psnr(truth, again(features)).mean()) + 0.5


def test_likelihood_knows_what_a_mask_dropped() -> None:
    """Read as zeros that were seen, what was dropped would pull every picture towards one that sends nothing."""
    view = view_of(nn.Sequential(Wide(channels=20), RandomMask(0.6)), n=100)
    attack = Likelihood(steps=80, starts=("mean",), tv=(0.01,), l2=(0.0,))
    truth, features = view.validation.images.rows(np.arange(8)), view.validation.features.rows(np.arange(8))
    knowing = attack.prepare(view, seed=0)
    naive = attack.prepare(replace(view, observations=2), seed=0)  # as for means, whose zeros say something
    assert float(psnr(truth, knowing(features)).mean()) > float(psnr(truth, naive(features)).mean()) + 2


def test_a_decoder_learns_from_fresh_noise() -> None:
    """Of one draw for each picture a network that sees all of it learns the noise by heart."""
    edge = nn.Sequential(Wide(channels=8), DefenseNoise(1.0))
    fixed = view_of(edge, n=60)
    fresh = FreshRows(edge, fixed.train.images, torch.device("cpu"), 3)
    attack = Decoder(width=64, blocks=1, epochs=25, restarts=1, layout="flat", patience=99)
    index = np.arange(len(fixed.validation.images))
    truth, features = fixed.validation.images.rows(index), fixed.validation.features.rows(index)
    views = (replace(fixed, train=replace(fixed.train, fresh=fresh)), fixed)
    with_fresh, with_fixed = (float(psnr(truth, attack.prepare(v, seed=0)(features)).mean()) for v in views)
    assert with_fresh > with_fixed + 0.05, (with_fresh, with_fixed)


def test_fresh_rows_differ_by_look_and_are_repeatable() -> None:
    edge = nn.Sequential(Wide(channels=8), DefenseNoise(0.5))
    images = view_of(edge, n=20).train.images
    first, again = (FreshRows(edge, images, torch.device("cpu"), 3) for _ in range(2))
    index = np.arange(5)
    looks = [first.rows(index) for _ in range(2)]
    assert len(first) == 20
    assert not torch.equal(*looks)
    assert all(torch.equal(look, again.rows(index)) for look in looks)
    many = FreshRows(edge, images, torch.device("cpu"), 3, observations=50).rows(index)
    clean = edge[0](images.rows(index))
    assert float((many - clean).detach().std()) < float((looks[0] - clean).detach().std()) / 5


def test_likelihood_does_not_fold_what_would_change() -> None:
    assert isinstance(frozen(Wide(), SHAPE), Wide)


def test_total_variation_is_that_of_a_slow_loop() -> None:
    x = torch.rand(2, 3, 4, 5)
    down = [
        (x[i, c, y + 1, z] - x[i, c, y, z]) ** 2 for i in range(2) for c in range(3) for y in range(3) for z in range(5)
    ]
    over = [
        (x[i, c, y, z + 1] - x[i, c, y, z]) ** 2 for i in range(2) for c in range(3) for y in range(4) for z in range(4)
    ]
    slow = [sum(down[i * 45 : i * 45 + 45]) / 45 + sum(over[i * 48 : i * 48 + 48]) / 48 for i in range(2)]
    torch.testing.assert_close(total_variation(x), torch.stack(slow))


def test_likelihood_keeps_the_picture_with_the_smallest_objective() -> None:
    """Restarts can only lower the objective; keeping the worst is a mistake of published code."""
    edge = Wide(channels=12)
    view = view_of(edge, n=60)
    features = view.validation.features.rows(np.arange(6))
    few = Likelihood(steps=10, starts=("noise",), tv=(0.0,), l2=(0.0,))

    def misfit(attack: Likelihood) -> torch.Tensor:
        guess = attack.prepare(view, seed=2)(features)
        _, scale = feature_statistics(view.train)
        with torch.no_grad():
            return ((edge(guess) - features) * scale).square().flatten(1).mean(1)

    assert bool((misfit(replace(few, restarts=3)) <= misfit(few) + 1e-6).all())
    assert bool((misfit(replace(few, restarts=3)) < misfit(few)).any())


def test_likelihood_stops_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    edge = Wide(channels=12)
    view = view_of(edge, n=60)
    sizes: list[int] = []
    attack = Likelihood(steps=300, starts=("mean",), tv=(0.0,), l2=(0.0,), check_every=10, tolerance=0.2)
    inverter = attack.prepare(view, seed=0)
    run = inverter._edge.forward
    inverter._edge.forward = lambda x: (sizes.append(len(x)), run(x))[1]
    inverter(view.validation.features.rows(np.arange(9)))
    assert sizes[0] == 9
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1


def test_likelihood_refuses_an_edge_that_gives_nan() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(x - 2) if x.requires_grad else x * 3

    with pytest.raises(AttackError, match="NaN"):
        Likelihood().prepare(view_of(Broken(), n=40), seed=0)


@pytest.mark.parametrize(
    "stop", [torch.round, Tensor.detach, lambda z: (z > 1.2).float()], ids=["round", "detach", "step"]
)
def test_likelihood_refuses_an_edge_that_no_gradient_passes(stop: Callable[[Tensor], Tensor]) -> None:
    """It would return its start, and that would look like privacy."""

    class Stopped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return stop(torch.relu(x) * 4)

    with pytest.raises(AttackError, match="no gradient"):
        Likelihood().prepare(view_of(Stopped(), n=40), seed=0)


def test_shadow_refuses_labels_that_the_cloud_does_not_know() -> None:
    view = view_of(nn.AvgPool2d(4), n=80, cloud=nn.Sequential(nn.Flatten(), nn.Linear(36, 2)))
    with pytest.raises(DataError, match=r"labels in 0\.\.1"):
        Shadow().prepare(view, seed=0)


def test_likelihood_starts_from_each_earlier_attack() -> None:
    edge = Wide(channels=12)
    first = view_of(edge, n=60)
    decoder = SMALL_DECODER.prepare(first, seed=0)
    view = replace(first, earlier={"decoder": decoder})
    inverter = Likelihood(steps=1, sweep_steps=1, learning_rate=1e-9, starts=("earlier", "mean")).prepare(view, seed=0)
    features = first.validation.features.rows(np.arange(4))
    torch.testing.assert_close(inverter(features), decoder(features), rtol=0, atol=1e-5)


def test_attacks_refuse_a_view_without_what_they_need() -> None:
    view = view_of(Wide(channels=12), n=40)
    blind = replace(view, train=replace(view.train, features=None, labels=None), edge=None)
    with pytest.raises(ThreatError, match="edge or query"):
        Decoder().prepare(blind, seed=0)
    with pytest.raises(ThreatError, match="edge half"):
        Likelihood().prepare(blind, seed=0)
    with pytest.raises(ThreatError, match="labels"):
        Shadow().prepare(blind, seed=0)
    with pytest.raises(ThreatError, match="auxiliary"):
        MeanImage().prepare(replace(view, train=None), seed=0)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Decoder(epochs=0), "epochs"),
        (lambda: Decoder(trial_steps=0), "trial_steps"),
        (lambda: Decoder(learning_rate=math.nan), "learning_rate"),
        (lambda: Likelihood(steps=0), "steps"),
        (lambda: Likelihood(tv=()), "tv"),
        (lambda: Likelihood(l2=(-1.0,)), "l2"),
        (lambda: Likelihood(starts=("decoder",)), "start"),
        (lambda: Shadow(width=0), "width"),
        (lambda: Shadow(statistics_weight=-1.0), "statistics_weight"),
    ],
)
def test_knobs_out_of_range_are_refused(make: object, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        make()
