"""The strict setting every test runs in: x64, no implicit promotion, beartype on the library, four CPU devices.

Environment variables come first: XLA reads them once, when JAX is first used.
"""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "agg"

import hypothesis
import jax
from jaxtyping import install_import_hook

install_import_hook("jaxbp", "beartype.beartype")  # type annotations of the library are checked at every call

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes a first example slow, so no deadline; the same examples every time, so that a failure is repeatable.
hypothesis.settings.register_profile("jaxbp", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("jaxbp")
