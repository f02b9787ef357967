"""The audit: what attackers are given, what is scored, what is kept, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from louver.attacks import Decoder, Inverter, Likelihood, Shadow, View
from louver.attacks.mean_image import Constant
from louver.audit import FLOOR, Settings, audit
from louver.cut import Split, split
from louver.data import assign_roles
from louver.errors import AttackError, ConfigError, DataError, StorageError, ThreatError
from louver.measures import psnr, ssim
from louver.runs import load_audit, panels, to_json
from louver.stochastic import Noise
from louver.storage import unit_folder
from louver.tasks import Classification
from louver.thresholds import parse_rule
from louver.types import Audit, Progress, Roles, Threat
from toys import SHAPE, pictures

FAST = Settings(measures=("mse", "psnr", "ssim", "recognized", "reidentified"), test_images=20)


def small_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        return nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(12 * 3 * 4, 3)
        ).eval()


@pytest.fixture(scope="module")
def roles() -> Roles:
    nothing = pictures(1, seed=5).take(slice(0, 0))
    return assign_roles(train=nothing, validation=nothing, test=pictures(30, seed=6), auxiliary=pictures(90, seed=7))


@pytest.fixture(scope="module")
def splits() -> list[Split]:
    net, example = small_net(), torch.rand(2, *SHAPE)
    return [split(net, at, example) for at in ("1", "3")]


class Log:
    """What an attack was given; no knob of it, so that it reads the same in every key."""

    def __init__(self) -> None:
        self.views: list[View] = []
        self.features: list[Tensor] = []

    def __str__(self) -> str:
        return "log"

    def __deepcopy__(self, memo: object) -> Log:
        return self


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """An attack that writes down what it was given, and guesses gray."""

    log: Log
    needs: frozenset[str] = frozenset({"auxiliary"})
    level: float = 0.5

    def prepare(self, view: View, *, seed: int, progress: Progress | None = None) -> Inverter:
        self.log.views.append(view)
        recorder = self

        class Gray(Constant):
            def __call__(self, features: Tensor, *, progress: Progress | None = None) -> Tensor:
                recorder.log.features.append(features)
                return super().__call__(features)

        return Gray(torch.full(view.image_shape, self.level))

    def restore(self, view: View, state: Mapping[str, Tensor]) -> Inverter:
        return Constant(state["image"])


def recorder(**changes: object) -> Recorder:
    return Recorder(log=Log(), **changes)


def run(splits: list[Split], roles: Roles, attacks: dict[str, object], **changes: object) -> Audit:
    options = {"task": Classification("kind", 3), "label": "kind", "settings": FAST, "seed": 4} | changes
    return audit(splits, roles, attacks, **options)


def test_progress_never_goes_back(splits: list[Split], roles: Roles) -> None:
    told: list[tuple[float, str]] = []
    attacks = {
        "decoder": Decoder(width=64, blocks=1, epochs=2, restarts=2, trial_steps=1),
        "likelihood": Likelihood(steps=6, sweep_steps=3, n_sweep=2),
        "shadow": Shadow(epochs=2, decoder=Decoder(width=64, blocks=1, epochs=1, restarts=1)),
    }
    run(splits, roles, attacks, progress=lambda what, fraction: told.append((fraction, what)))
    for (before, _), (after, what) in itertools.pairwise(told):
        assert before <= after + 1e-9, what
    assert told[-1][0] == pytest.approx(1)
    assert len(told) > 20


def test_attackers_never_meet_a_test_image(splits: list[Split], roles: Roles) -> None:
    attack = recorder()
    run(splits, roles, {"recorder": attack})
    tests = {image.tobytes() for image in roles.test.floats()}
    for view in attack.log.views:
        for auxiliary in (view.train, view.validation):
            rows = auxiliary.images.rows(np.arange(len(auxiliary.images))).numpy()
            assert not tests & {row.tobytes() for row in rows}
    train, validation = attack.log.views[0].train, attack.log.views[0].validation
    seen = [{r.tobytes() for r in a.images.rows(np.arange(len(a.images))).numpy()} for a in (train, validation)]
    assert not seen[0] & seen[1]
    assert len(train.images) == 2 * 81  # mirrored
    assert len(validation.images) == 9


def test_scores_are_those_of_the_measures_beside_the_floor_on_the_same_images(
    splits: list[Split], roles: Roles
) -> None:
    found = run(splits[:1], roles, {"recorder": recorder()}, settings=replace(FAST, limits={"recorder": 7}))
    chosen = np.random.default_rng(4).permutation(30)[:20]
    truth = torch.from_numpy(roles.test.floats(chosen))
    by_name = {(f.attack, f.measure): f for f in found.findings}
    gray = torch.full((7, *SHAPE), 0.5)
    np.testing.assert_allclose(by_name["recorder", "psnr"].per_image, psnr(truth[:7], gray), rtol=1e-5)
    np.testing.assert_allclose(by_name["recorder", "ssim"].per_image, ssim(truth[:7], gray), atol=1e-5)
    floor = by_name[FLOOR, "psnr"]
    assert len(floor.per_image) == 20
    np.testing.assert_array_equal(by_name["recorder", "psnr"].floor, floor.per_image[:7])
    assert {row.attack for row in found.rows} == {FLOOR, "recorder"}
    assert set(found.utility) == {"accuracy"}


@pytest.mark.parametrize(
    ("grants", "has_edge", "has_features"),
    [({"auxiliary"}, False, False), ({"auxiliary", "query"}, False, True), ({"auxiliary", "edge"}, True, True)],
)
def test_a_view_holds_what_is_granted_and_no_more(
    splits: list[Split], roles: Roles, grants: set[str], has_edge: bool, has_features: bool
) -> None:
    attack = recorder()
    run(splits[:1], roles, {"recorder": attack}, threat=Threat(grants=frozenset(grants)))
    view = attack.log.views[0]
    assert (view.edge is not None) == has_edge
    assert (view.train.features is not None) == has_features


@pytest.mark.parametrize("is_stochastic", [True, False])
@pytest.mark.parametrize("grants", [{"edge", "auxiliary"}, {"query", "auxiliary"}])
def test_noise_is_drawn_anew_only_by_who_holds_an_edge_that_draws(
    splits: list[Split], roles: Roles, grants: set[str], is_stochastic: bool
) -> None:
    one = splits[0]
    if is_stochastic:
        one = Split(torch.nn.Sequential(one.edge, Noise(0.1)), one.cloud, one.cut)
    attack = recorder()
    run([one], roles, {"recorder": attack}, threat=Threat(grants=frozenset(grants)))
    assert (attack.log.views[0].train.fresh is not None) == (is_stochastic and "edge" in grants)


def test_budgets_bound_what_the_attacker_owns(splits: list[Split], roles: Roles) -> None:
    def count(**limits: object) -> int:
        attack = recorder()
        run(
            splits[:1],
            roles,
            {"recorder": attack},
            threat=Threat(**limits),
            settings=replace(FAST, mirror_auxiliary=False),
        )
        return len(attack.log.views[0].train.images) + len(attack.log.views[0].validation.images)

    assert count() == 90
    assert count(n_auxiliary=31) == 31
    query = frozenset({"auxiliary", "query"})
    assert count(grants=query, query_budget=25) == 25
    assert count(query_budget=25) == 90  # who holds the edge's weights needs no query


@pytest.mark.parametrize("attack", [Decoder(), Likelihood()])
def test_an_attack_beyond_the_threat_model_is_an_error(splits: list[Split], roles: Roles, attack: object) -> None:
    with pytest.raises(ThreatError, match="does not grant"):
        run(splits, roles, {"it": attack}, threat=Threat(grants=frozenset({"auxiliary"})))
    with pytest.raises(ThreatError, match="no floor"):
        run(splits, roles, {"it": attack}, threat=Threat(grants=frozenset({"edge"})))


@pytest.mark.parametrize("level", [float("nan"), float("inf")])
def test_a_broken_attack_is_an_error_and_not_a_finding(
    splits: list[Split], roles: Roles, level: float, tmp_path: Path
) -> None:
    with pytest.raises(AttackError, match="not a defense"):
        run(splits, roles, {"broken": recorder(level=level)}, folder=tmp_path)
    assert not unit_folder(tmp_path, "1", "broken").exists()
    assert not (tmp_path / "findings.json").exists()


def test_an_edge_that_sends_nan_is_an_error(roles: Roles) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x - 2)

    net = nn.Sequential(Broken(), nn.Flatten(), nn.Linear(3 * 12 * 16, 3)).eval()
    with pytest.raises(AttackError, match="edge sends NaN"):
        run(
            [split(net, "0", torch.rand(2, *SHAPE))],
            roles,
            {"recorder": recorder()},
            task=None,
            label=None,
            settings=replace(FAST, measures=("mse",)),
        )


def test_attacks_that_work_nowhere_do_not_pass(splits: list[Split], roles: Roles) -> None:
    found = run(splits, roles, {"recorder": recorder()}, rules=[parse_rule("ssim<=0.9")])
    assert not found.verdict.passed
    assert any("not seen to work" in warning for warning in found.verdict.warnings)


def test_findings_are_judged_and_notes_are_shown(splits: list[Split], roles: Roles) -> None:
    attack = Decoder(width=64, blocks=1, epochs=2, restarts=1)
    rules = [parse_rule("ssim<=0.2"), parse_rule("ssim<=0.999")]
    found = run(splits[:1], roles, {"decoder": attack}, rules=rules, notes=["3 images were dropped."])
    assert [check.status for check in found.verdict.checks] == ["broken", "holds"]
    assert not found.verdict.passed
    assert "3 images were dropped." in found.verdict.warnings


# The run folder


def test_a_second_run_takes_finished_units_from_the_folder(splits: list[Split], roles: Roles, tmp_path: Path) -> None:
    first = recorder()
    whole = run(splits, roles, {"recorder": first}, folder=tmp_path)
    second = recorder()
    again = run(splits, roles, {"recorder": second}, folder=tmp_path)
    assert len(first.log.views) == 2
    assert second.log.views == []
    assert again.rows == whole.rows


def test_a_stopped_run_goes_on_where_it_stopped(splits: list[Split], roles: Roles, tmp_path: Path) -> None:
    attacks = {
        "decoder": Decoder(width=64, blocks=1, epochs=1, restarts=1),
        "likelihood": Likelihood(steps=20, sweep_steps=5),
    }

    def stop(what: str, fraction: float) -> None:
        if what.startswith("1 · likelihood"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(splits, roles, attacks, folder=tmp_path, progress=stop)
    kept = unit_folder(tmp_path, "1", "decoder") / "unit.json"
    before = kept.stat().st_mtime_ns
    resumed = run(splits, roles, attacks, folder=tmp_path)
    assert kept.stat().st_mtime_ns == before
    straight = run(splits, roles, attacks)
    for a, b in zip(resumed.findings, straight.findings, strict=True):
        np.testing.assert_array_equal(a.per_image, b.per_image)


def test_a_unit_of_another_experiment_or_a_damaged_one_is_run_again(
    splits: list[Split], roles: Roles, tmp_path: Path
) -> None:
    run(splits[:1], roles, {"recorder": recorder()}, folder=tmp_path)
    for changes in ({"seed": 5}, {"threat": Threat(n_auxiliary=50)}, {"settings": replace(FAST, measures=("mse",))}):
        attack = recorder()
        run(splits[:1], roles, {"recorder": attack}, folder=tmp_path, **changes)
        assert len(attack.log.views) == 1


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:60] + b"xxxx" + b[64:]])
@pytest.mark.parametrize("name", ["pictures.npz", "state.safetensors", "unit.json"])
def test_a_damaged_unit_is_run_again(
    splits: list[Split], roles: Roles, tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    run(splits[:1], roles, {"recorder": recorder()}, folder=tmp_path)
    path = unit_folder(tmp_path, "1", "recorder") / name
    path.write_bytes(damage(path.read_bytes()))
    attack = recorder()
    run(splits[:1], roles, {"recorder": attack}, folder=tmp_path)
    assert len(attack.log.views) == 1


def test_a_network_that_computes_something_else_is_attacked_anew(roles: Roles, tmp_path: Path) -> None:
    """Same weights, another forward: what was found about the one says nothing about the other."""

    class Net(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor
            self.flatten, self.out = nn.Flatten(), nn.Linear(3 * 12 * 16, 3)
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.flatten(torch.relu(x) * self.factor))

    def psnr_of(factor: float) -> list[float]:
        halves = split(Net(factor).eval(), "flatten", torch.rand(2, *SHAPE))
        attack = Decoder(width=64, blocks=1, epochs=1, restarts=1)
        found = run([halves], roles, {"decoder": attack}, folder=tmp_path)
        return [row.mean for row in found.rows if row.measure == "psnr"]

    silent, open_ = psnr_of(0.0), psnr_of(1.0)
    assert silent[1] == pytest.approx(silent[0])
    assert open_[1] > silent[1] + 3


def test_a_split_left_in_training_mode_is_audited_as_it_is_used(roles: Roles) -> None:
    """Statistics of a batch would let each picture's features depend on the others, and change while attacked."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 12 * 16, 3))
    nn.init.constant_(net[1].running_mean, 0.4)
    halves = split(net.eval(), "1", torch.rand(2, *SHAPE)).eval()
    chosen = np.random.default_rng(4).permutation(30)[:20]
    with torch.no_grad():
        in_use = halves.edge(torch.from_numpy(roles.test.floats(chosen)))
    before = copy.deepcopy(halves.state_dict())
    attack = recorder()
    run([halves.train()], roles, {"recorder": attack})
    torch.testing.assert_close(torch.cat(attack.log.features), in_use)
    assert halves.training  # the user's own, left as it was
    for name, value in halves.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_mended_labels_are_scored_anew(splits: list[Split], roles: Roles, tmp_path: Path) -> None:
    run(splits[:1], roles, {"recorder": recorder()}, folder=tmp_path)
    labels = {"kind": (roles.test.labels["kind"] + 1) % 3}
    attack = recorder()
    run(splits[:1], replace(roles, test=replace(roles.test, labels=labels)), {"recorder": attack}, folder=tmp_path)
    assert len(attack.log.views) == 1


def test_a_unit_stopped_half_way_is_no_unit(
    splits: list[Split], roles: Roles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from louver import runs

    run(splits[:1], roles, {"recorder": recorder()}, folder=tmp_path)
    real = runs.write_json

    def stop(path: Path, content: object) -> Path:
        if path.name == "unit.json" and path.parent.name == "recorder":
            raise KeyboardInterrupt
        return real(path, content)

    monkeypatch.setattr(runs, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        run(splits[:1], roles, {"recorder": recorder(level=0.2)}, folder=tmp_path)
    monkeypatch.undo()
    attack = recorder()
    run(splits[:1], roles, {"recorder": attack}, folder=tmp_path)
    assert len(attack.log.views) == 1


def test_a_full_disk_keeps_what_was_finished(
    splits: list[Split], roles: Roles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    real, count = os.fsync, [0]

    def full(descriptor: int) -> None:
        count[0] += 1
        if count[0] > 5:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        run(splits, roles, {"recorder": recorder()}, folder=tmp_path)
    monkeypatch.undo()
    assert (unit_folder(tmp_path, "1", FLOOR) / "unit.json").exists()
    assert not (unit_folder(tmp_path, "1", "recorder") / "unit.json").exists()
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()]


def test_an_audit_comes_back_from_its_folder(splits: list[Split], roles: Roles, tmp_path: Path) -> None:
    found = run(
        splits,
        roles,
        {"recorder": recorder()},
        folder=tmp_path,
        rules=[parse_rule("ssim<=0.9")],
        config={"name": "toy", "n": 3},
    )
    loaded = load_audit(tmp_path)
    assert to_json(loaded) == to_json(found)
    assert json.dumps(to_json(found), allow_nan=False)
    assert loaded.rows == found.rows
    assert loaded.cuts == found.cuts
    assert loaded.threat == found.threat


def test_panels_show_the_same_images_in_every_row(splits: list[Split], roles: Roles, tmp_path: Path) -> None:
    settings = replace(FAST, limits={"recorder": 9})
    found = run(splits, roles, {"recorder": recorder()}, folder=tmp_path, settings=settings)
    strips = panels(tmp_path, found)
    assert [strip.cut for strip in strips] == ["1", "1", "3", "3"]
    for strip in strips:
        assert strip.truth.shape == (6, 12, 16, 3)
        assert set(strip.attacks) == {FLOOR, "recorder"}
        for caption, picture in zip(strip.captions, strip.truth, strict=True):
            index = int(caption.split()[2].rstrip(","))
            np.testing.assert_array_equal(picture, roles.test.pixels[index].transpose(1, 2, 0))
    assert float(strips[1].captions[0].split("SSIM ")[1].split()[0]) >= float(
        strips[1].captions[-1].split("SSIM ")[1].split()[0]
    )


@pytest.mark.parametrize("content", [None, "{", '{"name": 3}'])
def test_a_folder_without_whole_findings_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "findings.json").write_text(content)
    with pytest.raises(ConfigError, match="run"):
        load_audit(tmp_path)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("ssim@layer9<=0.5", "no cut 'layer9'"),
        ("decodr.ssim<=0.5", "no attack 'decodr'"),
        ("ms_ssim<=0.5", "no measure"),
    ],
)
def test_a_rule_that_speaks_of_nothing_is_refused_before_any_attack_runs(
    splits: list[Split], roles: Roles, rule: str, message: str
) -> None:
    attack = recorder()
    with pytest.raises(ConfigError, match=message):
        run(splits, roles, {"recorder": attack}, rules=[parse_rule(rule)])
    assert attack.log.views == []


def test_a_rule_may_name_a_cut_by_its_alias(roles: Roles) -> None:
    halves = split(small_net(), "1", torch.rand(2, *SHAPE))
    alias = next(iter(halves.cut.aliases), halves.cut.name)
    found = run([halves], roles, {"recorder": recorder()}, rules=[parse_rule(f"ssim@{alias}<=0.9")])
    assert found.verdict.checks[0].rule == "ssim@1<=0.9"


def test_refusals_say_what_to_do(splits: list[Split], roles: Roles) -> None:
    with pytest.raises(ConfigError, match="at least one cut and one attack"):
        run(splits, roles, {})
    with pytest.raises(ConfigError, match="2 test images or more"):
        Settings(test_images=1)
    with pytest.raises(DataError, match="auxiliary images"):
        run(splits, roles, {"recorder": recorder()}, threat=Threat(n_auxiliary=3))
    with pytest.raises(DataError, match="kind"):
        run(splits, roles, {"recorder": recorder()}, label="king")
