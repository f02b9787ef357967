import math

import numpy as np
import pytest
import torch

from louver.errors import DataError
from louver.tasks import ranking, retrieval


def naive(embeddings, identities, cameras=None, is_query=None):
    """Query by query, image by image: {row: (average precision, rank of the first match)} and the number left out."""
    rows = embeddings.tolist()
    n, found, left_out = len(rows), {}, 0

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    for query in range(n):
        if is_query is not None and not is_query[query]:
            continue
        order = []
        for other in range(n):
            is_same = identities[other] == identities[query]
            if other == query or (cameras is not None and is_same and cameras[other] == cameras[query]):
                continue
            order.append((cosine(rows[query], rows[other]), bool(is_same)))
        order.sort(key=lambda pair: -pair[0])
        ranks = [rank for rank, (_, is_same) in enumerate(order, 1) if is_same]
        if not ranks:
            left_out += 1
            continue
        found[query] = (sum((i + 1) / rank for i, rank in enumerate(ranks)) / len(ranks), ranks[0])
    return found, left_out


def made(n=61, n_identities=9, n_cameras=3, d=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    identities = torch.randint(0, n_identities, (n,), generator=rng) * 17 - 4
    centers = torch.randn(n_identities, d, generator=rng)
    embeddings = centers[(identities + 4) // 17] + 1.2 * torch.randn(n, d, generator=rng)
    identities[0] = 999
    return embeddings * 3, identities, torch.randint(0, n_cameras, (n,), generator=rng)


@pytest.mark.parametrize("chunk_elements", [61 * 7, 4_000_000])
@pytest.mark.parametrize("has_cameras", [True, False])
@pytest.mark.parametrize("has_queries", [True, False])
def test_it_is_the_naive_ranking(monkeypatch, chunk_elements, has_cameras, has_queries):
    monkeypatch.setattr(ranking, "_CHUNK_ELEMENTS", chunk_elements)
    embeddings, identities, cameras = made()
    cameras = cameras if has_cameras else None
    is_query = torch.arange(61) % 3 == 0 if has_queries else None
    expected, left_out = naive(embeddings, identities, cameras, is_query)
    found = retrieval(embeddings, identities, cameras, is_query=is_query)
    assert found.rows.tolist() == sorted(expected)
    np.testing.assert_allclose(found.average_precision, [expected[row][0] for row in found.rows], atol=1e-12)
    assert found.first_hit.tolist() == [expected[row][1] for row in found.rows]
    assert found.n_unmatched == left_out >= 1
    assert len(set(found.first_hit.tolist())) > 3


def test_same_identity_by_the_same_camera_is_neither_right_nor_wrong():
    # On a line of angles: the query, its twin by the same camera, a stranger by the same camera, its true match.
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3])
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
    identities, cameras = torch.tensor([5, 5, 8, 5]), torch.tensor([1, 1, 1, 2])
    first = torch.tensor([True, False, False, False])
    with_cameras = retrieval(embeddings, identities, cameras, is_query=first)
    assert with_cameras.first_hit.tolist() == [2]
    assert with_cameras.average_precision.tolist() == [1 / 2]
    without = retrieval(embeddings, identities, is_query=first)
    assert without.first_hit.tolist() == [1]
    assert without.average_precision.tolist() == pytest.approx([(1 + 2 / 3) / 2])


def test_constant_embeddings_of_a_sorted_set_score_as_chance_does():
    identities = torch.arange(40).repeat_interleave(5)
    tied = retrieval(torch.ones(200, 6), identities)
    by_chance = retrieval(torch.randn(200, 6, generator=torch.Generator().manual_seed(1)), identities)
    assert tied.average_precision.mean() == pytest.approx(by_chance.average_precision.mean(), abs=0.03)
    assert tied.average_precision.mean() < 0.1
    # The first of the set only: in the order of the set their true matches would come first.
    first = retrieval(torch.ones(200, 6), identities, is_query=torch.arange(200) < 10)
    assert first.average_precision.mean() < 0.3
    again = retrieval(torch.ones(200, 6), identities)
    assert (again.average_precision == tied.average_precision).all()


def test_distances_are_ordered_as_a_stable_sort_does():
    rng = np.random.default_rng(0)
    distances = rng.normal(size=(7, 50)).round(1).astype(np.float32)
    distances[:, ::9] = -0.0
    distances[:, 4::9] = 0.0
    distances[:, 5] = np.inf
    np.testing.assert_array_equal(ranking._order(distances), distances.argsort(axis=1, kind="stable"))


def test_lengths_of_embeddings_do_not_matter_even_huge_ones():
    embeddings, identities, _ = made()
    scale = torch.logspace(-12, 25, 61)[:, None]
    plain, scaled = retrieval(embeddings, identities), retrieval(embeddings * scale, identities)
    np.testing.assert_array_equal(plain.first_hit, scaled.first_hit)


def test_what_cannot_be_ranked_is_refused():
    embeddings, identities, cameras = made()
    with pytest.raises(DataError, match=r"shape \(n, d\), got torch.float32 \(61, 5, 1\)"):
        retrieval(embeddings[:, :, None], identities)
    with pytest.raises(DataError, match="expected 61 cameras"):
        retrieval(embeddings, identities, cameras[1:])
    with pytest.raises(DataError, match="NaN"):
        retrieval(embeddings * math.nan, identities)
    with pytest.raises(DataError, match="one query or more"):
        retrieval(embeddings[:0], identities[:0])
    with pytest.raises(DataError, match="one query or more"):
        retrieval(embeddings, identities, is_query=torch.zeros(61, dtype=torch.bool))
    with pytest.raises(DataError, match=r"none in 61.*from another camera; add such images, or leave"):
        retrieval(embeddings, identities, torch.zeros(61))
    with pytest.raises(DataError, match=r"be there, another; add such images$"):
        retrieval(embeddings, torch.arange(61))
