"""Settings for every test; they must be made before jax or TensorFlow is first imported."""

import importlib.metadata
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # with libtpu and no TPU, start-up stalls without it
# Eight devices. A test runs each program once or twice, so what counts is the time to compile it:
# no optimisation by LLVM, one module of LLVM in place of 32 small ones, and XLA's older emitters of
# fusions, which take a third of the time. Later versions of jaxlib no longer know that last flag,
# and stop at it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10.")
).strip()
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it warns when a test forks
os.environ["HF_HUB_OFFLINE"] = "1"

import shutil
import tempfile
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


def pytest_configure(config):
    """Gives all processes of this run one compilation cache, which begins empty and is deleted.

    Many tests compile the same program. Workers and the processes that tests start inherit the
    environment; a worker therefore finds the variable set.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = tempfile.mkdtemp(prefix="dalle2_jax_tests_")
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A model folder of a whole cascade, very small and random."""
    import small_cascade  # late: most tests need none of it

    return small_cascade.write(tmp_path_factory.mktemp("cascade") / "model")


@pytest.fixture(scope="module")
def karlo(tmp_path_factory) -> Path:
    """A model folder of ours and, beside it, what diffusers would have saved."""
    import small_karlo  # late: most tests need none of it

    from dalle2_jax.pretrained.export import export_model

    folder = small_karlo.write(tmp_path_factory.mktemp("karlo") / "ours")
    export_model(folder, folder.with_name("theirs"))
    return folder


@pytest.fixture
def theirs(karlo, tmp_path) -> Path:
    """A copy of what diffusers would have saved, to be harmed."""
    return Path(shutil.copytree(karlo.with_name("theirs"), tmp_path / "theirs"))


@pytest.fixture
def one_device(monkeypatch):
    """Eight simulated devices are only slow where one shows the same."""
    from dalle2_jax.parallel import sharding

    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes: make({}, jax.devices()[:1]))
