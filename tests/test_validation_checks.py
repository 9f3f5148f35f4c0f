"""Checks of single values: what each accepts, and the one form of its message."""

import math

import numpy as np
import pytest

from dalle2_jax.errors import UserError
from dalle2_jax.validation import checks
from dalle2_jax.validation.sections import check_numbers, check_whole_numbers


@pytest.mark.parametrize("value", [1, np.int64(3), np.array(2)])
def test_whole_numbers_of_python_and_numpy(value):
    result = checks.whole_number("n", value, 1, 3)
    assert type(result) is int and result == value


@pytest.mark.parametrize("value", [0, 4, 2.0, "2", True, None, math.nan, np.ones(2, int), [2]])
def test_anything_else_is_no_whole_number(value):
    assert not checks.is_whole_number(value, 1, 3)
    with pytest.raises(UserError, match=r"^n must be a whole number from 1 to 3, not .+$"):
        checks.whole_number("n", value, 1, 3)


def test_numbers_become_floats():
    for value in (0, 0.5, np.float32(0.25), np.int32(1)):
        result = checks.number("theta", value, 0, 1)
        assert type(result) is float and result == value


@pytest.mark.parametrize("value", [-1, 1.5, math.nan, math.inf, True, "0.5", None, 1j, 10**400])
def test_anything_else_is_no_number(value):
    with pytest.raises(UserError, match=r"^theta must be a number from 0 to 1, not .+$"):
        checks.number("theta", value, 0, 1)


@pytest.mark.parametrize(
    ("bounds", "requirement"),
    [
        ((), "a finite number"),
        ((0,), "a finite number from 0"),
        ((-math.inf, 1), "a number to 1"),
        ((0, 1), "a number from 0 to 1"),
    ],
)
def test_bounds_of_a_number_in_words(bounds, requirement):
    with pytest.raises(UserError) as error:
        checks.number("eta", math.inf, *bounds)
    assert str(error.value) == f"eta must be {requirement}, not inf"


def test_infinity_is_a_number_where_it_is_a_bound():
    assert checks.number("config.data.ram_gb", math.inf, 0, math.inf) == math.inf
    with pytest.raises(UserError, match="ram_gb must be a number from 0, not nan"):
        checks.number("ram_gb", math.nan, 0, math.inf)


def test_an_unknown_name_comes_with_the_nearest_choice():
    assert checks.one_of("prior", "ar", ["ar", "diffusion"]) == "ar"
    with pytest.raises(UserError) as error:
        checks.one_of("prior", "difusion", ["ar", "diffusion"])
    assert str(error.value) == (
        "prior must be one of 'ar', 'diffusion', not 'difusion'; did you mean 'diffusion'?"
    )
    with pytest.raises(UserError, match=r"one of 'ar', 'diffusion', not \['ar'\]$"):
        checks.one_of("prior", ["ar"], ["ar", "diffusion"])


def test_settings_of_a_section_are_named_by_their_path():
    check_numbers("config.task", 0, 1, noise=0, drop=1.0)
    with pytest.raises(UserError, match=r"^config\.task\.drop must be a number from 0 to 1, not 2"):
        check_numbers("config.task", 0, 1, noise=0, drop=2)
    with pytest.raises(UserError, match=r"^config\.task\.dim must be a whole number from 1, not 0"):
        check_whole_numbers("config.task", 1, dim=0)


def test_python_values_are_hashable():
    value = checks.to_python_values(np.array([[1, 2], [3, 4]]))
    assert value == ((1, 2), (3, 4)) and isinstance(hash(value), int)
    assert type(checks.to_python_values(np.float64(0.5))) is float
    assert checks.to_python_values("ddim") == "ddim"
