"""Karlo's networks imported into ours and run: the other side of originals.py, without torch.

python imported.py FOLDER STAGE imports what originals.py has written there and prints, as JSON,
each output's largest error over its scale.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.nets.clip import CLIP
from dalle2_jax.nets.decoder import Decoder
from dalle2_jax.nets.forward import forward
from dalle2_jax.nets.prior import DiffusionPrior
from dalle2_jax.nets.upsampler import Upsampler
from dalle2_jax.pretrained import convert, recognise, sources

NETWORKS = {"clip": CLIP, "prior": DiffusionPrior, "decoder": Decoder}


class Imported(NamedTuple):
    network: Any
    params: dict[str, Any]
    stage: sources.Stage


def load(folder: Path, name: str) -> Imported:
    """The stage of the source, as `import` converts it."""
    stages = recognise.stages(folder)
    stage = next(stage for stage in stages if stage.name.startswith(name))
    params, _ = convert.convert(folder, stage, {stage.name: stage.entry for stage in stages})
    leaves, tree = jax.tree.flatten(params)
    del params
    for i, leaf in enumerate(leaves):  # of no two tensors is there a copy at one time
        leaves[i] = jnp.array(leaf)
    network = NETWORKS.get(name, Upsampler)(**stage.entry["model"])
    return Imported(network, jax.tree.unflatten(tree, leaves), stage)


def run(name: str, network: Any, params: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What originals.run returns, of the same arrays."""
    if name == "clip":
        told = forward(network, params, given["tokens"], method="encode_text")
        found = {"z_txt": told.z_txt, "txt_enc": told.txt_enc * told.txt_mask[..., None]}
        if "images" in given:
            found["z_img"] = forward(network, params, given["images"], method="encode_image")
        return found
    if name == "prior":
        args = (given[key] for key in ("x", "t", "z_txt", "hidden", "mask"))
        return {"out": forward(network, params, *args)}
    if name == "decoder":
        b = len(given["x"])
        cond = {"z_img": given["z_img"], "z_mask": jnp.arange(b) >= b // 2, "z_txt": given["z_txt"]}
        cond |= {"txt_enc": given["hidden"], "txt_mask": given["mask"]}
        return {"out": forward(network, params, given["x"], given["t"], cond, False)}
    return {
        f"super_res_{part}": forward(network, p, given["x"], given["t"], given["low"], False)
        for part, p in params.items()
    }


def jitted(name: str, network: Any) -> Callable[[Any, Any], dict[str, Any]]:
    return jax.jit(lambda params, given: run(name, network, params, given))


def errors(folder: Path, name: str) -> dict[str, float]:
    network, params, _ = load(folder, name)
    given = dict(np.load(folder / "inputs.npz"))
    expected = np.load(folder / "expected.npz")
    forward_pass = jitted(name, network)
    # one network's activations and, later, one network's weights at a time
    parts = [{part: params.pop(part)} for part in list(params)] if name == "upsampler" else [params]
    ours: dict[str, Any] = {}
    while parts:
        ours |= jax.block_until_ready(forward_pass(parts.pop(), given))
    assert set(ours) == set(expected.files)
    return {
        key: float(np.abs(np.asarray(x) - expected[key]).max() / np.abs(expected[key]).max())
        for key, x in ours.items()
    }


if __name__ == "__main__":
    print(json.dumps(errors(Path(sys.argv[1]), sys.argv[2])))
