"""Tracing with a current mesh, as the trainer does (train/step.py)."""

import functools

import jax


def within(mesh, function):
    """Returns `function`, traced where `jax.sharding.get_abstract_mesh` returns `mesh`."""

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced
