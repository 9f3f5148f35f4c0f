"""Gradients of Karlo's networks, imported, against the originals' at small size.

Of one scalar, by every parameter (theirs brought to ours by the tables of names, as the weights
are) and by every input that is no whole number.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parent))

import imported  # noqa: E402
import originals  # noqa: E402
import small_unclip  # noqa: E402

from dalle2_jax.pretrained import names  # noqa: E402

pytestmark = pytest.mark.parity
TOLERANCE = 2e-4  # of each tensor's scale
# Some gradients are zero, and rounding is all there is of them: a bias of all keys changes no
# softmax, one before a norm of one channel a group no output (32 channels in 32 groups: these
# small networks' first level alone). They are 4e-8 of the largest here, true ones from 1e-3 on.
ZERO = 1e-6
PIPELINES = {
    "clip": small_unclip.image_variations,  # it has both towers
    "prior": small_unclip.text_to_image,
    "decoder": small_unclip.text_to_image,
    "upsampler": small_unclip.text_to_image,
}


@pytest.mark.parametrize("stage", PIPELINES)
def test_gradients(stage, tmp_path):
    pipeline = PIPELINES[stage](tmp_path / "theirs")
    parts = {part: getattr(pipeline, part) for part in originals.STAGES[stage]}
    given = originals.inputs(stage, {part: module.config for part, module in parts.items()})
    floating = {name for name, x in given.items() if x.dtype == np.float32}
    ours = imported.load(tmp_path / "theirs", stage)

    tensors = {name: torch.tensor(x, requires_grad=name in floating) for name, x in given.items()}
    outputs = originals.run(stage, parts, tensors)
    rng = np.random.default_rng(1)
    weights = {name: rng.standard_normal(x.shape).astype(np.float32) for name, x in outputs.items()}
    sum((x * torch.tensor(weights[name])).sum() for name, x in outputs.items()).backward()
    theirs = {
        f"{part}/{name}": (torch.zeros_like(x) if x.grad is None else x.grad).numpy()
        for part, module in parts.items()
        for name, x in module.named_parameters()
    }
    converted = names.to_ours(ours.stage.rules, theirs, theirs.__getitem__)
    assert not converted.unknown

    def loss(params, arrays):
        found = imported.run(stage, ours.network, params, given | arrays)
        return sum((x * weights[name]).sum() for name, x in found.items())

    arrays = {name: given[name] for name in floating}
    by_params, by_inputs = jax.jit(jax.grad(loss, argnums=(0, 1)))(ours.params, arrays)
    by_params = traverse_util.flatten_dict(by_params, sep=".")
    assert set(by_params) == set(converted.names)
    assert_close(by_params, {name: converted.tensor(name) for name in converted.names})
    assert_close(by_inputs, {name: tensors[name].grad.numpy() for name in floating})


def assert_close(ours, theirs):
    scales = {name: np.abs(x).max() for name, x in theirs.items()}
    zero = ZERO * max(scales.values())
    assert zero > 0 and sum(scale > zero for scale in scales.values()) > len(scales) / 2
    for name, x in theirs.items():
        bound = TOLERANCE * scales[name] if scales[name] > zero else zero
        error = np.abs(np.asarray(ours[name]) - x).max()
        assert error <= bound, (name, error, scales[name])
