"""Tracing within a mesh, as the trainer does (train/step.py)."""

import functools

import jax


def within(mesh, function):
    """`function`, traced where `jax.sharding.get_abstract_mesh` finds `mesh`."""

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced
