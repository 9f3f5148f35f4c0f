import numpy as np
import pytest
import scipy.linalg

from dalle2_jax.evals.frechet import frechet_distance, kernel_distance


def gaussian(n, mean, cov, seed):
    """n rows with exactly this mean and (sample) covariance."""
    x = np.random.default_rng(seed).standard_normal((n, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(cov).T + mean


def random_covariance(d, seed):
    a = np.random.default_rng(seed).standard_normal((d, d))
    return a @ a.T + 0.1 * np.eye(d)


@pytest.mark.parametrize("n", [5, 200])  # fewer rows than columns: covariances without full rank
def test_identical_sets_are_at_distance_zero(n):
    x = np.random.default_rng(0).standard_normal((n, 16)).astype(np.float32)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(x, x[::-1]) == pytest.approx(0.0, abs=1e-9)
    assert kernel_distance(x, x) == pytest.approx(0.0, abs=1e-9)


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    mean_a, mean_b = np.array([0.0, 1.0, 2.0]), np.array([1.0, -1.0, 2.0])
    var_a, var_b = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.25])
    a, b = gaussian(50, mean_a, np.diag(var_a), 0), gaussian(70, mean_b, np.diag(var_b), 1)
    want = np.sum((mean_a - mean_b) ** 2) + np.sum((np.sqrt(var_a) - np.sqrt(var_b)) ** 2)
    assert frechet_distance(a, b) == pytest.approx(want)


def test_frechet_against_scipys_matrix_root():
    d = 12
    cov_a, cov_b = random_covariance(d, 0), random_covariance(d, 1)
    a, b = gaussian(40, np.zeros(d), cov_a, 2), gaussian(60, np.full(d, 0.5), cov_b, 3)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    want = d * 0.25 + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(want, rel=1e-6)


def test_frechet_is_unchanged_by_a_rotation():
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((30, 8)), 2 * rng.standard_normal((30, 8)) + 1
    turn = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b))


def test_frechet_of_one_shift_is_its_square():
    x = np.random.default_rng(5).standard_normal((9, 20))
    assert frechet_distance(x, x + 2.0) == pytest.approx(20 * 4.0)


def test_kernel_distance_is_its_definition():
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((7, 3)), rng.standard_normal((7, 3)) + 0.3

    def k(x, y):
        return (np.dot(x, y) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    terms = [k(a[i], a[j]) + k(b[i], b[j]) - k(a[i], b[j]) - k(a[j], b[i]) for i, j in pairs]
    assert kernel_distance(a, b) == pytest.approx(np.mean(terms))


def test_kernel_distance_has_no_bias():
    rng = np.random.default_rng(7)
    same = [kernel_distance(*rng.standard_normal((2, 10, 4))) for _ in range(400)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 20
    # Rows that depend on each other, as a generated and a true image of one caption do.
    paired = []
    for _ in range(400):
        x, noise = rng.standard_normal((2, 10, 4))
        paired.append(kernel_distance(x, 0.8 * x + 0.6 * noise))
    assert abs(np.mean(paired)) < 4 * np.std(paired) / 20
    shifted = [kernel_distance(x, y + 1.0) for x, y in rng.standard_normal((50, 2, 10, 4))]
    assert np.mean(shifted) > 5 * np.std(shifted) / 50**0.5


def test_wrong_shapes_raise():
    x = np.zeros((3, 4))
    for a, b in ((x, np.zeros((3, 5))), (x[:1], x), (x[0], x)):
        with pytest.raises(ValueError, match="features must be"):
            frechet_distance(a, b)
    with pytest.raises(ValueError, match="3 and 2 rows"):
        kernel_distance(x, x[:2])
