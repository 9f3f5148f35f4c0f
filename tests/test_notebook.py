"""The Colab notebook: valid, without outputs, and every cell runs, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_karlo

from dalle2_jax.pretrained.export import export_model

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "dalle2_jax_tpu.ipynb"
SHORT = dict(IMAGES=1, SAMPLE_STEPS=2, EXAMPLES=24, BATCH_SIZE=8, TRAIN_STEPS=3, MORE_STEPS=2)
CELL = {
    "code": {"cell_type", "execution_count", "id", "metadata", "outputs", "source"},
    "markdown": {"cell_type", "id", "metadata", "source"},
}


def cells(kind):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_valid_and_holds_no_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert set(cell) == CELL[cell["cell_type"]]
        assert all(isinstance(line, str) for line in cell["source"])
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_every_cell_compiles_and_is_plain_python():
    for number, source in enumerate(cells("code")):
        assert not [line for line in source.splitlines() if line.startswith(("%", "!"))]
        compile(source, f"cell {number}", "exec")


def test_generating_comes_before_anything_that_loads_tensorflow():
    before_training = "\n".join(cells("code")[:5])
    assert "generate" in before_training and "dalle2_jax.train" not in before_training


def test_settings_of_the_test_are_settings_of_the_notebook():
    assert all(f'setting("{name}", ' in cells("code")[0] for name in SHORT)


# Each cell as a kernel runs it: one namespace, and the value of its last expression is shown.
RUN = """
import ast, json, sys
names = {"__name__": "__main__"}
for number, source in enumerate(json.load(open(sys.argv[1]))):
    tree = ast.parse(source, f"cell {number}")
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {number}", "exec"), names)
    shown = last and eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
    print(f"cell {number}:", getattr(shown, "size", shown), "tensorflow" in sys.modules, flush=True)
"""


@pytest.mark.slow
def test_every_cell_runs(tmp_path):
    (tmp_path / "cells.json").write_text(json.dumps(cells("code")))
    export_model(small_karlo.write(tmp_path / "ours"), tmp_path / "karlo")
    environment = {name: str(value) for name, value in SHORT.items()}
    environment |= {"KARLO": str(tmp_path / "karlo")}
    environment |= {"WORK": str(tmp_path / "work"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # one device: quick to compile
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "cells.json")],
        cwd=ROOT,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stdout.splitlines() if line.startswith("cell ")]
    assert len(shown) == len(cells("code"))
    text = "\n".join(shown)
    assert "at step 3, stopped by the end" in text and "at step 5, stopped by the end" in text
    for cell in ("cell 3:", "cell 4:"):  # tiny's and Karlo's images
        line = next(line for line in shown if line.startswith(cell))
        assert "(" in line and line.endswith("False")  # an image's size, without TensorFlow
    assert (tmp_path / "work" / "model" / "decoder.safetensors").exists()
