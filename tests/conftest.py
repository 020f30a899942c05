"""The strict setting every test runs in: x64, no implicit promotion, four CPU devices, and beartype on the library.

Environment variables come first: XLA reads them once, when JAX is first used. What XLA compiles is kept for the session
in a temporary folder: many tests, both workers of pytest-xdist and the processes that tests start compile the same.

`make test` leaves out two kinds of tests, which `make test-all` adds. `slow`: it takes long. `production`: it is about
what XLA makes of a program as users compile it, its bits, its bytes, its last digits. A session that leaves these out
(`-m "not production"`) compiles in half the time, with fewer optimisations; every other session compiles as users do.
The type annotations of the library are checked at every call, but not in a session that only has what is slow or about
production: there the checks take a fifth of the time, and the quick tests have called every public function with them.
"""

import atexit
import gc
import os
import shutil
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a worker has its parent's
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxbp-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # a program need not name the lines that it comes from
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "agg"

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

gc.set_threshold(200_000, 20, 100)  # tracing makes many small objects and few cycles: 700, Python's own, costs a tenth

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes a first example slow, so no deadline; the same examples every time, so that a failure is repeatable.
hypothesis.settings.register_profile("jaxbp", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("jaxbp")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """JAX_PLATFORMS=cuda,cpu, say, has the devices of the machine, and not the four of the CPU."""
    if item.get_closest_marker("devices") and jax.device_count() < 4:
        pytest.skip("it needs four devices")


def pytest_configure(config: pytest.Config) -> None:
    """Checked annotations, and XLA's options: they cannot be changed once the session has compiled something."""
    if not config.option.markexpr.startswith(("slow", "production")):
        install_import_hook("jaxbp", "beartype.beartype")
    if "not production" in config.option.markexpr:
        from jaxbp.checker.trial import QUICK

        options = QUICK["compiler_options"].items()
        os.environ["XLA_FLAGS"] += "".join(f" --{name}={str(value).lower()}" for name, value in options)
        os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"  # small programs, compiled by one thread
