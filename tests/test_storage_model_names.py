"""A model's name -> its folder: packaged models, folders and hub ids."""

import sys

import numpy as np
import pytest

from dalle2_jax.errors import UserError
from dalle2_jax.storage import model_names
from dalle2_jax.storage.model_folder import write_stage
from dalle2_jax.storage.model_names import resolve


def test_packaged_models_and_folders(tmp_path, monkeypatch):
    write_stage(tmp_path / "weights" / "toy", "clip", {}, {"scale": np.float32(3.25)})
    monkeypatch.setattr(model_names, "PACKAGED", tmp_path / "weights")
    assert resolve("toy") == tmp_path / "weights" / "toy"
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(UserError, match=r"'toyy'.*'toy'"):
        resolve("toyy")
    for name in ("", "/no/such/folder", "a/b/c", "../toyy"):
        with pytest.raises(UserError, match="no model"):
            resolve(name)
    with pytest.raises(UserError, match="is a file"):
        resolve(tmp_path / "weights" / "toy" / "config.json")


def test_hub_ids(tmp_path, monkeypatch):
    class Hub:
        @staticmethod
        def snapshot_download(hub_id, allow_patterns):
            if hub_id == "someone/there":
                return str(tmp_path)
            raise RuntimeError("cannot reach the hub\nand many more lines")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    with pytest.raises(UserError, match=r"model folder someone/there has no config\.json"):
        resolve("someone/there")
    (tmp_path / "config.json").write_text('{"format": 1, "stages": {}}')
    assert resolve("someone/there") == tmp_path
    with pytest.raises(UserError, match="does not give it") as error:
        resolve("someone/away")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        resolve("someone/there")
