"""slerp: on the sphere, at an even pace, from end to end."""

import numpy as np
import pytest

from dalle2_jax.pipelines.embeddings import normalise, slerp

RNG = np.random.default_rng(0)
A, B = normalise(RNG.standard_normal((2, 5, 16)))


@pytest.mark.parametrize("theta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_unit_vectors_stay_unit_and_the_angle_grows_evenly(theta):
    z = slerp(A, B, theta)
    np.testing.assert_allclose(np.linalg.norm(z, axis=-1), 1, atol=1e-6)
    angle = np.arccos((A * B).sum(-1))
    np.testing.assert_allclose(np.arccos(np.clip((A * z).sum(-1), -1, 1)), theta * angle, atol=1e-3)


def test_in_the_plane_it_is_a_rotation():
    turned = slerp([[1.0, 0.0]], [[0.0, 1.0]], np.linspace(0, 1, 7))
    angles = np.linspace(0, np.pi / 2, 7)
    np.testing.assert_allclose(turned, np.stack([np.cos(angles), np.sin(angles)], -1), atol=1e-7)


def test_the_length_goes_evenly_from_one_to_the_other():
    z = slerp(2 * A[:1], 6 * B[:1], np.array([0.0, 0.25, 1.0]))
    np.testing.assert_allclose(np.linalg.norm(z, axis=-1), [2, 3, 6], rtol=1e-6)
    np.testing.assert_allclose(z[[0, 2]], [2 * A[0], 6 * B[0]], rtol=1e-5, atol=1e-6)


def test_between_almost_equal_vectors_it_is_a_straight_line():
    near = normalise(A + 1e-7 * B)
    z = slerp(A, near, 0.5)
    assert np.isfinite(z).all()
    np.testing.assert_allclose(z, (A + near) / 2, atol=1e-6)
    np.testing.assert_allclose(slerp(A, A, 0.3), A, atol=1e-7)


@pytest.mark.parametrize(("b", "message"), [(-A, "opposite"), (0 * A, "length 0")])
def test_where_there_is_no_shortest_way_it_raises(b, message):
    with pytest.raises(ValueError, match=message):
        slerp(A, b, 0.5)
