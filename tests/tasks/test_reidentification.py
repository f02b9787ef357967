import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from louver.errors import ConfigError, DataError
from louver.tasks import Criterion, ReIdentification, Task, retrieval
from louver.types import Images

TASK = ReIdentification()
PLAIN = ReIdentification(camera=None)


def images(identity, camera=None, seed=0):
    """Pictures that differ by identity in their mean color, under noise."""
    rng = np.random.default_rng(seed)
    identity = np.array(identity, np.int64)
    color = np.random.default_rng(99).uniform(40, 210, (1000, 3))[identity % 1000]
    pixels = (
        color[:, :, None, None]
        + rng.normal(0, 12, (len(identity), 3, 8, 10))
        + rng.normal(0, 9, (len(identity), 3, 1, 1))
    )
    labels = {"identity": identity}
    if camera is not None:
        labels["camera"] = np.array(camera, np.int64)
    return Images(pixels=pixels.clip(0, 255).astype(np.uint8), labels=labels, name="cars")


class MeanColor(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) - 0.5


# Evaluation


def test_figures_are_those_of_the_ranking_with_counts_of_what_was_left_out():
    # 70 is alone; 50 is seen by one camera only; 30 has two images by camera 1, which are no answer to each other.
    identity = [30, 30, 30, 40, 40, 50, 50, 60, 60, 60, 70]
    camera = [1, 1, 2, 1, 2, 3, 3, 1, 2, 3, 2]
    cars = images(identity, camera)
    figures = TASK.evaluate(MeanColor(), cars, batch_size=4)
    found = retrieval(MeanColor()(torch.from_numpy(cars.floats())), torch.tensor(identity), torch.tensor(camera))
    assert figures["mAP"] == pytest.approx(found.average_precision.mean(), abs=1e-9)
    assert (figures["n"], figures["n_queries"], figures["n_unmatched"], figures["n_lone"]) == (11, 8, 3, 1)
    assert PLAIN.evaluate(MeanColor(), cars)["n_unmatched"] == 1
    assert TASK.score in figures


def test_rank1_and_rank5_are_shares_of_queries():
    # Colors that have nothing to do with the identities, so that first matches come at all ranks.
    cars = Images(pixels=images(range(40)).pixels, labels={"identity": np.arange(40) % 6})
    figures = PLAIN.evaluate(MeanColor(), cars)
    first_hit = retrieval(MeanColor()(torch.from_numpy(cars.floats())), PLAIN.targets(cars)).first_hit.tolist()
    assert {1, 2, 5, 6} <= set(first_hit)
    assert figures["rank1"] == pytest.approx(sum(rank == 1 for rank in first_hit) / 40)
    assert figures["rank5"] == pytest.approx(sum(rank in (1, 2, 3, 4, 5) for rank in first_hit) / 40)


def test_distractors_are_wrong_answers_and_never_queries():
    cars = images([0, 0, 0, 8, 8, 9, 9])
    plain = PLAIN.evaluate(MeanColor(), cars)
    figures = ReIdentification(camera=None, distractor=0).evaluate(MeanColor(), cars)
    assert plain["n_queries"] == 7
    assert figures["n_queries"] == 4
    found = retrieval(
        MeanColor()(torch.from_numpy(cars.floats())),
        torch.tensor([0, 0, 0, 8, 8, 9, 9]),
        is_query=torch.tensor([False] * 3 + [True] * 4),
    )
    assert figures["mAP"] == pytest.approx(found.average_precision.mean(), abs=1e-9)


def test_a_model_is_left_as_it_was():
    model = nn.Sequential(MeanColor(), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    before = copy.deepcopy(model.state_dict())
    cars = images([1, 1, 2, 2, 3, 3, 3])
    assert PLAIN.evaluate(model, cars) == PLAIN.evaluate(model, cars)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Criterion


def slow_loss(embeddings, targets, weights, *, temperature, margin, smoothing):
    """Identity term and triplet term, in plain Python. `weights` (d, k): a column a class, identities ascending."""

    def unit(row):
        return [value / math.hypot(*row) for value in row]

    rows, known = [unit(row) for row in embeddings.tolist()], sorted(set(targets))
    classes = [unit(column) for column in weights.T.tolist()]
    identity_terms, triplets = [], []
    for a, row in enumerate(rows):
        scores = [sum(x * y for x, y in zip(row, center, strict=True)) / temperature for center in classes]
        total = math.log(sum(math.exp(score) for score in scores))
        right = known.index(targets[a])
        smooth = sum(total - score for score in scores) / len(scores)
        identity_terms.append((1 - smoothing) * (total - scores[right]) + smoothing * smooth)
        apart = [math.dist(row, other) for other in rows]
        positive = [apart[b] for b in range(len(rows)) if b != a and targets[b] == targets[a]]
        negative = [apart[b] for b in range(len(rows)) if targets[b] != targets[a]]
        triplets.append(max(0.0, max(positive) - min(negative) + margin))
    active = [term for term in triplets if term > 0]
    return sum(identity_terms) / len(rows), sum(active) / len(active)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_identity_plus_hardest_triplets(smoothing):
    targets = [12, 7, 12, 7, 90, 90, 90]
    rng = torch.Generator().manual_seed(4)
    embeddings = 3 * torch.randn(7, 5, generator=rng)
    task = ReIdentification(identity_weight=0.7, triplet_weight=1.9, temperature=0.3, margin=0.4)
    criterion = task.criterion(embeddings, torch.tensor(targets), seed=0)
    identity, triplet = slow_loss(
        embeddings, targets, criterion.classes.W.detach(), temperature=0.3, margin=0.4, smoothing=smoothing
    )
    loss = criterion(embeddings, torch.tensor(targets), label_smoothing=smoothing)
    assert loss.item() == pytest.approx(0.7 * identity + 1.9 * triplet, rel=1e-4)
    assert isinstance(task, Task)
    assert isinstance(criterion, Criterion)
    for weight, value in (({"identity_weight": 0.0}, triplet), ({"triplet_weight": 0.0}, identity)):
        alone = ReIdentification(**{"temperature": 0.3, "margin": 0.4} | weight)
        half = alone.criterion(embeddings, torch.tensor(targets), seed=0)
        assert half(embeddings, torch.tensor(targets), label_smoothing=smoothing).item() == pytest.approx(
            value, rel=1e-4
        )


def test_a_step_down_the_triplet_loss_brings_the_same_identity_together_and_others_apart():
    embeddings = torch.tensor([[1.0, 0.2], [0.2, 1.0], [-1.0, 0.1], [-0.9, -0.2]], requires_grad=True)
    targets = torch.tensor([3, 3, 5, 5])
    criterion = ReIdentification(identity_weight=0.0, margin=1.2).criterion(embeddings, targets, seed=0)
    (slope,) = torch.autograd.grad(criterion(embeddings, targets), embeddings)
    moved = embeddings - 1e-2 * slope

    def similarity(rows, a, b):
        return torch.nn.functional.cosine_similarity(rows[a], rows[b], dim=0)

    assert similarity(moved, 0, 1) > similarity(embeddings, 0, 1) + 1e-4
    assert similarity(moved, 1, 2) < similarity(embeddings, 1, 2) - 1e-4


def test_class_weights_are_trained_along_and_follow_from_the_seed():
    targets = torch.tensor([4, 4, 6, 6, 9, 9, 9])
    embeddings = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = TASK.criterion(embeddings, targets, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first.classes.W, TASK.criterion(embeddings, targets, seed=3).classes.W)
    assert not torch.equal(first.classes.W, TASK.criterion(embeddings, targets, seed=4).classes.W)
    assert [tuple(value.shape) for value in first.parameters()] == [(5, 3)]
    first(embeddings, targets).backward()
    assert first.classes.W.grad.abs().sum() > 0
    # A checkpoint holds all of it.
    other = TASK.criterion(embeddings, targets, seed=8)
    other.load_state_dict(copy.deepcopy(first).state_dict())
    assert torch.equal(other(embeddings, targets), first(embeddings, targets))


def test_a_batch_without_pairs_still_has_a_loss_with_gradients():
    targets = torch.tensor([4, 4, 6, 6])
    embeddings = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    criterion = ReIdentification(identity_weight=0.0).criterion(embeddings, targets, seed=0)
    for rows in ([0, 2], [0, 1], [3]):
        loss = criterion(embeddings[rows], targets[rows])
        assert loss.item() == 0
        loss.backward()


def test_it_learns_to_tell_apart_what_it_never_saw():
    train = images(np.repeat(np.arange(12), 9), seed=1)
    fresh = images(np.repeat(np.arange(500, 512), 4), seed=2)
    task = ReIdentification(camera=None, temperature=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(240, 8))
        before = task.evaluate(model, fresh)["mAP"]
        pixels, targets = torch.from_numpy(train.floats()), task.targets(train)
        criterion = task.criterion(model(pixels[:2]), targets, seed=0)
        optimizer = torch.optim.Adam([*model.parameters(), *criterion.parameters()], lr=3e-3)
        rng = torch.Generator().manual_seed(0)
        for _ in range(15):
            for batch in task.batches(targets, 32, rng):
                loss = criterion(model(pixels[batch]), targets[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert task.evaluate(model, fresh)["mAP"] > before + 0.1


# Batches


@pytest.mark.parametrize(
    ("counts", "batch_size", "per_identity"),
    [
        ([9] * 12, 32, 4),
        ([2] * 7, 8, 4),
        ([2, 3, 5, 7, 11, 13], 12, 3),
        ([40, 2, 2, 2, 2], 16, 4),
        ([5, 5, 5], 4, 2),
        ([3, 3], 64, 4),
        ([3, 3, 3], 4, 4),
        ([200, 2, 2, 2], 8, 4),
        (list(range(2, 60)), 64, 4),
    ],
)
def test_batches_are_balanced(counts, batch_size, per_identity):
    identities = torch.repeat_interleave(3 * torch.arange(len(counts)) + 5, torch.tensor(counts))
    identities = identities[torch.randperm(len(identities), generator=torch.Generator().manual_seed(5))]
    task = ReIdentification(per_identity=per_identity)
    lengths = set()
    for seed in range(4):
        batches = task.batches(identities, batch_size, torch.Generator().manual_seed(seed))
        lengths.add(len(batches))
        rows = torch.cat(batches)
        assert len(rows) == len(rows.unique())
        assert set(identities[rows].tolist()) == set(identities.tolist())
        for batch in batches:
            found = identities[batch].unique(return_counts=True)[1]
            assert len(found) >= 2
            assert found.min() >= 2
            # One more only where an odd number of rows leaves no other way to keep pairs.
            assert found.max() <= max(per_identity, 3)
            assert len(batch) <= max(1.5 * batch_size, 2 * max(per_identity, 3)) + per_identity
    assert len(lengths) == 1
    different = task.batches(identities, batch_size, torch.Generator().manual_seed(9))
    assert torch.cat(different).tolist() != rows.tolist()


def test_alike_identities_give_batches_of_p_times_k_and_leave_no_image_out():
    identities = torch.arange(12).repeat_interleave(8)
    batches = TASK.batches(identities, 32, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(batches).tolist()) == list(range(96))
    for batch in batches:
        assert sorted(identities[batch].unique(return_counts=True)[1].tolist()) == [4] * 8


def test_of_a_flood_of_one_identity_other_images_come_each_epoch():
    identities = torch.tensor([0] * 40 + [1] * 2 + [2] * 2 + [3] * 2)
    rng = torch.Generator().manual_seed(0)
    seen = [set(torch.cat(TASK.batches(identities, 16, rng)).tolist()) for _ in range(90)]
    assert all(len(rows) < 20 for rows in seen)
    assert set.union(*seen) == set(range(46))


# Refusals


def test_what_cannot_be_trained_on_names_the_identity():
    lone = torch.tensor([3, 3, 17, 5, 5, 21])
    message = r"2 images or more of each identity to train on, got 1 of identity 17 \(and 1 more identities\); drop it"
    with pytest.raises(DataError, match=message):
        TASK.batches(lone, 4, torch.Generator())
    with pytest.raises(DataError, match="got 1 of identity 17; drop it"):
        TASK.criterion(torch.zeros(2, 5), lone[:5], seed=0)
    with pytest.raises(DataError, match=r"2 identities or more to train on, got \[3\]"):
        TASK.batches(torch.tensor([3, 3, 3]), 4, torch.Generator())
    with pytest.raises(DataError, match=r"no distractors \(identity 0\)"):
        ReIdentification(distractor=0).batches(torch.tensor([0, 0, 3, 3]), 4, torch.Generator())
    criterion = TASK.criterion(torch.zeros(2, 5), torch.tensor([3, 3, 8, 8]), seed=0)
    for stranger in (1, 5, 9):
        with pytest.raises(DataError, match=f"identity {stranger} is none of the 2"):
            criterion(torch.randn(2, 5), torch.tensor([3, stranger]))


def test_what_cannot_be_evaluated_is_refused():
    cars = images([1, 1, 2, 2, 3, 3, 3])
    with pytest.raises(DataError, match=r"no label column 'camera'.*set camera to none"):
        TASK.evaluate(MeanColor(), cars)
    with pytest.raises(DataError, match="no label column 'plate'"):
        ReIdentification(column="plate").targets(cars)
    with pytest.raises(DataError, match="got none"):
        TASK.targets(images([]))
    with pytest.raises(ConfigError, match=r"expected embeddings of shape \(n, d\), got \(7, 3, 8, 10\)"):
        PLAIN.evaluate(nn.Identity(), cars)
    with pytest.raises(DataError, match="query with a true match"):
        PLAIN.evaluate(MeanColor(), images([1, 2, 3]))


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("per_identity", 1),
        ("identity_weight", -1.0),
        ("triplet_weight", math.nan),
        ("temperature", 0.0),
        ("margin", 2.0),
    ],
)
def test_knobs_out_of_range_are_refused(knob, value):
    with pytest.raises(ConfigError, match=f"expected {knob} of "):
        ReIdentification(**{knob: value})


def test_a_task_without_a_loss_is_refused():
    with pytest.raises(ConfigError, match="got 0 for both"):
        ReIdentification(identity_weight=0.0, triplet_weight=0.0)
