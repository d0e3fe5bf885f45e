"""k-means against brute force: exact assignments, optimal small clusterings, and the same bits however it is run."""

import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mgvq.codebook import lloyd
from mgvq.codebook import nearest as search
from mgvq.codebook.lloyd import exact_sum, kmeans
from mgvq.codebook.nearest import Nearest


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def points(n, d, seed=0):
    """Vectors and weights of very different sizes."""
    draws = stream(seed)
    return torch.randn(n, d, generator=draws), torch.rand(n, d, generator=draws) ** 4


def objective(vectors, centroids, weight=None):
    """The weighted squared error in double precision, not by the code under test."""
    weight = torch.ones_like(vectors) if weight is None else weight
    distances = (weight[:, None].double() * (vectors[:, None].double() - centroids.double()) ** 2).sum(2)
    return distances.amin(1).sum().item()


def bits(clusters):
    return clusters.centroids.numpy().tobytes()


def nearest(vectors, centroids, weight=None, metric=None):
    return Nearest(centroids)(vectors, weight, metric)


def all_distances(vectors, centroids, metric=None, weight=None):
    """(n, k) in double precision, not by the code under test."""
    difference = vectors[:, None].double() - centroids.double()
    if metric is not None:
        return ((difference @ metric.double()) * difference).sum(2)
    return (difference.square() * (1 if weight is None else weight[:, None].double())).sum(2)


@pytest.mark.parametrize("kind", ["plain", "weighted", "metric"])
@pytest.mark.parametrize("seed", range(5))
def test_nearest_is_the_lowest_index_of_the_least_distance(kind, seed):
    # Small whole numbers: every distance is exact, and ties are frequent.
    draws = stream(seed)
    vectors, centroids = (torch.randint(-2, 3, (n, 3), generator=draws).float() for n in (200, 12))
    root = torch.randint(-2, 3, (3, 3), generator=draws).float()
    metric = root.T @ root if kind == "metric" else None
    weight = torch.randint(0, 3, (200, 3), generator=draws).float() if kind == "weighted" else None
    distances = all_distances(vectors, centroids, metric, weight).numpy()
    assert (np.sort(distances, 1)[:, 0] == np.sort(distances, 1)[:, 1]).any()
    codes = nearest(vectors, centroids, weight, metric)
    assert codes.tolist() == np.argmin(distances, 1).tolist()  # numpy: the first of equals


@pytest.mark.parametrize("kind", ["plain", "weighted", "metric"])
@pytest.mark.parametrize(("num_centroids", "d"), [(2, 1), (16, 2), (256, 2), (256, 4), (4096, 4), (4096, 16)])
def test_the_grid_costs_less_than_a_ten_thousandth_of_the_distortion(kind, num_centroids, d):
    """With heavy tails, as weights have, and a metric that is ten times longer one way than the other."""
    draws = stream(d)
    vectors, centroids = (
        torch.randn(n, d, generator=draws) * torch.rand(n, 1, generator=draws) ** -0.2 for n in (400, num_centroids)
    )
    root = torch.diag(10.0 ** torch.linspace(0, -1, d)) @ torch.linalg.qr(torch.randn(d, d, generator=draws))[0]
    metric = root.T @ root if kind == "metric" else None
    weight = torch.rand(400, d, generator=draws) ** 2 if kind == "weighted" else None
    distances = all_distances(vectors, centroids, metric, weight)
    reached = distances.gather(1, nearest(vectors, centroids, weight, metric)[:, None]).sum().item()
    assert reached <= distances.amin(1).sum().item() * (1 + 1e-4)


def test_a_vector_far_out_goes_to_the_outermost_centroid():
    centroids = torch.tensor([[-1.0], [0.5], [1.0]])
    assert nearest(torch.tensor([[1e30], [-1e30], [70.0]]), centroids).tolist() == [2, 0, 2]


def test_centroids_of_zero_are_all_alike():
    assert nearest(torch.randn(5, 2, generator=stream()), torch.zeros(3, 2)).tolist() == [0] * 5


def test_a_vector_without_weight_gets_the_first_code():
    assert nearest(torch.ones(1, 2), torch.tensor([[5.0, 5.0], [1.0, 1.0]]), torch.zeros(1, 2)).tolist() == [0]


@pytest.mark.parametrize("kind", ["plain", "weighted", "metric"])
def test_one_vector_at_a_time_gets_the_codes_of_all_at_once(kind):
    vectors, weight = points(100, 3)
    weight = weight if kind == "weighted" else None
    metric = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, 0.1], [0.0, 0.1, 0.5]]) if kind == "metric" else None
    find = Nearest(points(20, 3, seed=1)[0])
    alone = [find(vectors[i : i + 1], None if weight is None else weight[i : i + 1], metric).item() for i in range(100)]
    assert alone == find(vectors, weight, metric).tolist()


@pytest.mark.parametrize("kind", ["plain", "weighted", "metric"])
@pytest.mark.parametrize("d", [1, 2, 3, 4])
@pytest.mark.parametrize("num_centroids", [1, 5, 256])
def test_a_compiled_search_and_a_product_find_the_same(kind, d, num_centroids, monkeypatch):
    """On one thread and on several, of vectors of a few sizes and some far out."""
    vectors, weight = points(5000, d)
    vectors[::7] *= 1e3
    weight = weight if kind == "weighted" else None
    root = torch.randn(d, d, generator=stream(1)).double()
    metric = root.T @ root if kind == "metric" else None
    find = Nearest(points(num_centroids, d, seed=1)[0])
    looped = find(vectors, weight, metric)
    monkeypatch.setattr(search, "_SHARED", 1)
    assert torch.equal(find(vectors, weight, metric), looped)
    monkeypatch.setattr(search, "_MOST", 0)
    assert torch.equal(find(vectors, weight, metric), looped)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "d"), [(7, 1), (8, 2), (7, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_seeds_reach_the_optimum_of_all_partitions_and_never_beat_it(weighted, n, d, seed):
    vectors, weight = points(n, d, seed)
    weight = weight if weighted else torch.ones_like(vectors)
    x, w = vectors.double(), weight.double()
    optimum = np.inf
    for members in itertools.product((False, True), repeat=n - 1):
        chosen = torch.tensor([True, *members])
        cost = 0.0
        for part in (chosen, ~chosen):
            mean = (w * x)[part].sum(0) / w[part].sum(0).clamp(min=1e-300)
            cost += (w[part] * (x[part] - mean) ** 2).sum().item()
        optimum = min(optimum, cost)
    costs = [objective(vectors, kmeans(vectors, 2, stream(s), weight).centroids, weight) for s in range(16)]
    assert min(costs) == pytest.approx(optimum, rel=1e-5)
    assert min(costs) >= optimum * (1 - 1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_no_iteration_raises_the_objective(weighted, seed):
    vectors, weight = points(200, 2, seed)
    weight = weight if weighted else None
    runs = [kmeans(vectors, 8, stream(seed), weight, iterations=i) for i in range(1, 9)]
    costs = [objective(vectors, run.centroids, weight) for run in runs]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(costs))
    assert costs[-1] < costs[0]


@pytest.mark.parametrize("weighted", [False, True])
def test_centroids_are_the_weighted_means_of_their_clusters(weighted):
    vectors, weight = points(200, 3)
    weight = weight if weighted else torch.ones_like(vectors)
    centroids = kmeans(vectors, 6, stream(), weight if weighted else None, iterations=200).centroids
    codes = nearest(vectors, centroids, weight)
    for k in range(6):
        x, w = vectors[codes == k].double(), weight[codes == k].double()
        assert torch.allclose(centroids[k].double(), (w * x).sum(0) / w.sum(0), rtol=1e-5, atol=1e-7)


def test_a_heavier_coordinate_decides():
    vectors = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.1, 0.0], [0.1, 1.0]])
    by_first, by_second = (
        nearest(vectors, kmeans(vectors, 2, stream(), torch.tensor(w).repeat(4, 1)).centroids, torch.tensor(w).repeat(4, 1))
        for w in ([1e4, 1.0], [1.0, 1e4])
    )
    assert by_first[0] == by_first[1] != by_first[2]
    assert by_second[0] == by_second[2] != by_second[1]


def fit_large():
    """Large enough that torch would spread the sums over threads."""
    vectors, weight = points(40_000, 2)
    return kmeans(vectors, 4, stream(), weight, iterations=3)


def test_the_number_of_threads_does_not_change_a_bit():
    threads = torch.get_num_threads()
    try:
        results = []
        for num in (1, 2):
            torch.set_num_threads(num)
            results.append(bits(fit_large()))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]


def test_a_fresh_process_does_not_change_a_bit():
    program = "import test_lloyd as t, hashlib; print(hashlib.sha256(t.bits(t.fit_large())).hexdigest())"
    ran = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == hashlib.sha256(bits(fit_large())).hexdigest()


@pytest.mark.parametrize("name", ["_CHUNK", "_BLOCK"])
@pytest.mark.parametrize("size", [1, 7, 450, 451])
def test_the_chunk_size_does_not_change_a_bit(name, size, monkeypatch):
    vectors, weight = points(150, 3)
    expected = bits(kmeans(vectors, 3, stream(), weight, iterations=3))
    monkeypatch.setattr(search, name, size)
    assert bits(kmeans(vectors, 3, stream(), weight, iterations=3)) == expected


def test_the_order_of_the_vectors_does_not_change_a_bit_of_the_means():
    vectors, weight = points(5_000, 2)
    centroids, _ = points(4, 2, seed=1)
    order = torch.randperm(5_000, generator=stream())
    first, second = (
        lloyd._means(x, nearest(x, centroids, w), centroids, w) for x, w in ((vectors, weight), (vectors[order], weight[order]))
    )
    assert torch.equal(first, second)


def test_a_sum_is_exact_to_the_fixed_point_in_any_order():
    values = torch.randn(10_000, generator=stream(), dtype=torch.float64) ** 3
    assert exact_sum(values) == exact_sum(values.flip(0)) == exact_sum(values.view(100, 100).T)
    assert exact_sum(values) == pytest.approx(values.sum().item(), abs=1e-6)
    assert exact_sum(torch.zeros(3)) == 0


def test_another_stream_gives_other_seeds():
    vectors, _ = points(200, 2)
    assert bits(kmeans(vectors, 8, stream(0))) != bits(kmeans(vectors, 8, stream(1)))


@pytest.mark.parametrize("num_centroids", [3, 4, 9, 50])
@pytest.mark.parametrize("copies", [1, 4])
def test_it_is_exact_with_fewer_distinct_vectors_than_centroids(num_centroids, copies):
    distinct = torch.tensor([[0.0, 1.0], [0.5, -2.0], [3.0, 3.0]])
    clusters = kmeans(distinct.repeat(copies, 1), num_centroids, stream())
    assert clusters.centroids.shape == (num_centroids, 2)
    assert objective(distinct, clusters.centroids) == 0
    assert set(map(tuple, clusters.centroids.tolist())) == set(map(tuple, distinct.tolist()))
    assert clusters.num_reseeded == 0


def bad_seeds(monkeypatch, seeds):
    monkeypatch.setattr(lloyd, "_plus_plus", lambda *_: torch.tensor(seeds))


def test_an_empty_cluster_moves_to_the_vector_that_is_served_worst_and_is_reported(monkeypatch):
    bad_seeds(monkeypatch, [[0.0], [100.0], [200.0]])
    vectors = torch.tensor([[0.0], [1.0], [5.0], [9.0]])
    clusters = kmeans(vectors, 3, stream(), iterations=1)
    assert clusters.num_reseeded == 2
    assert clusters.centroids.flatten().tolist() == [3.75, 9.0, 5.0]
    settled = kmeans(vectors, 3, stream(), iterations=20)
    assert settled.num_reseeded == 2
    assert sorted(settled.centroids.flatten().tolist()) == [0.5, 5.0, 9.0]


def test_clusters_that_move_to_copies_of_one_vector_part_again(monkeypatch):
    bad_seeds(monkeypatch, [[0.0], [100.0], [200.0]])
    vectors = torch.tensor([[0.0], [10.0], [20.0]]).repeat_interleave(3, 0)
    once = kmeans(vectors, 3, stream(), iterations=1)
    assert once.centroids.flatten().tolist() == [10.0, 20.0, 20.0]
    assert sorted(kmeans(vectors, 3, stream(), iterations=20).centroids.flatten().tolist()) == [0.0, 10.0, 20.0]


def test_a_coordinate_without_weight_stays_finite_and_keeps_its_seed():
    vectors, weight = points(60, 2)
    weight[:, 1] = 0
    centroids = kmeans(vectors, 4, stream(), weight).centroids
    assert set(centroids[:, 1].tolist()) <= set(vectors[:, 1].tolist())
    alone = kmeans(vectors[:, :1], 4, stream(), weight[:, :1]).centroids
    assert torch.equal(centroids[:, :1], alone)


def test_without_any_weight_the_centroids_are_some_of_the_vectors():
    vectors, weight = points(20, 2)
    clusters = kmeans(vectors, 4, stream(), torch.zeros_like(weight))
    assert set(map(tuple, clusters.centroids.tolist())) <= set(map(tuple, vectors.tolist()))
    assert clusters.num_reseeded == 0


@pytest.mark.parametrize("n", [4, 5])
def test_fixed_point_of_nothing_is_zero(n):
    """0 x infinity is no number, and what an integer makes of that depends on the processor."""
    assert lloyd._fixed_point(torch.zeros(n), n)[0].tolist() == [0] * n


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_the_size_of_the_numbers_does_not_matter(size):
    size = 2.0 ** round(np.log2(size))  # a power of two scales without rounding
    vectors, _ = points(100, 2)
    assert torch.equal(kmeans(vectors * size, 5, stream()).centroids, kmeans(vectors, 5, stream()).centroids * size)


@pytest.mark.parametrize(
    "vectors",
    [torch.zeros(0, 2), torch.tensor([[0.0, torch.nan]]), torch.tensor([[0.0], [torch.inf]])],
    ids=["none", "nan", "inf"],
)
def test_vectors_without_a_mean_are_refused(vectors):
    with pytest.raises(ValueError, match="finite vectors"):
        kmeans(vectors, 2, stream())


@pytest.mark.parametrize("bad", [-1e-6, torch.nan, torch.inf])
def test_a_weight_that_is_none_is_refused(bad):
    weight = torch.ones(3, 1)
    weight[1] = bad
    with pytest.raises(ValueError, match="weights must be finite"):
        kmeans(torch.arange(3.0)[:, None], 2, stream(), weight)


def test_vectors_and_weights_are_left_as_they_were():
    vectors, weight = points(50, 2)
    before = vectors.clone(), weight.clone()
    kmeans(vectors, 4, stream(), weight)
    assert torch.equal(vectors, before[0])
    assert torch.equal(weight, before[1])


def test_sorted_seeds_are_at_even_places_and_have_the_farthest_vector():
    vectors, _ = points(60, 3)
    vectors[17] = torch.tensor([30.0, 0.0, 0.0])
    centred = vectors.double() - vectors.double().mean(0)
    inverse = torch.linalg.inv(centred.T @ centred / 60)
    order = sorted(range(60), key=lambda n: float(centred[n] @ inverse @ centred[n]))
    places = [round(i * 59 / 7) for i in range(8)]
    assert torch.equal(lloyd._spread(vectors, 8), vectors[[order[p] for p in places]])
    clusters = kmeans(vectors, 8, stream(), seeds="mahalanobis")
    assert (clusters.centroids == vectors[17]).all(1).any(), "the vector that is far from all others keeps a centroid of its own"
