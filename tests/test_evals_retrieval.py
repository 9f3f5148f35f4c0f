import numpy as np
import pytest

from dalle2_jax.evals.retrieval import candidates, clip_score, ranks, share

POOL = [f"concept {i}" for i in range(300)]


def test_candidates_start_with_the_target_and_hold_each_name_once():
    names = candidates(POOL, "concept 7", 100, "0", "noto")
    assert names[0] == "concept 7" and len(set(names)) == 100 and set(names) <= set(POOL)


def test_candidates_depend_on_the_seed_and_the_target_alone():
    first = candidates(POOL, "concept 7", 100, "0", "noto")
    assert candidates(POOL[::-1] + POOL, "concept 7", 100, "0", "noto") == first
    assert candidates(POOL, "concept 7", 20, "0", "noto") == first[:20]
    assert set(candidates(POOL, "concept 7", 100, "1", "noto")) != set(first)
    assert set(candidates(POOL, "concept 7", 100, "0", "twemoji")) != set(first)


def test_a_small_pool_gives_all_of_it():
    assert sorted(candidates(POOL[:5], "concept 7", 100)) == sorted([*POOL[:5], "concept 7"])


def test_others_are_chosen_uniformly():
    counts = dict.fromkeys(POOL, 0)
    for name in POOL:
        for other in candidates(POOL, name, 100, "0")[1:]:
            counts[other] += 1
    # Binomial, 299 trials of probability 99 / 299: standard deviation 8.1
    assert np.mean(list(counts.values())) == pytest.approx(99.0)
    assert np.std(list(counts.values())) < 10.0


def test_ranks_count_the_candidates_that_are_nearer_or_as_near():
    z_img = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    near, half, far = [1.0, 0.0], [0.6, 0.8], [0.0, 1.0]
    z_txt = np.array([[near, half, far], [half, near, far], [half, far, near], [near, near, near]])
    assert ranks(z_img, z_txt).tolist() == [0, 1, 1, 2]


def test_a_random_judge_is_at_chance():
    rng = np.random.default_rng(0)
    hits = ranks(rng.standard_normal((4000, 8)), rng.standard_normal((4000, 10, 8))) == 0
    percent, error = share(hits)
    assert error == pytest.approx(100 * (0.1 * 0.9 / 4000) ** 0.5, rel=0.1)
    assert abs(percent - 10.0) < 4 * error


def test_clip_score_is_a_hundred_mean_cosines():
    x = np.eye(3)
    assert clip_score(x, x) == pytest.approx(100.0)
    assert clip_score(x, -x) == pytest.approx(-100.0)
    assert clip_score(x[:2], x[1:]) == pytest.approx(0.0)
    assert clip_score(np.array([[1.0, 0.0]]), np.array([[0.6, 0.8]])) == pytest.approx(60.0)


def test_share_of_hits():
    assert share(np.array([True, False, False, True])) == (50.0, 25.0)
    assert share(np.ones(5, bool)) == (100.0, 0.0)
