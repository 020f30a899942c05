"""jax-privacy: clipped_grad, which clips with min(1, C/‖gₙ‖); normalize_by makes the sum a mean."""

import importlib.metadata

import jax
import protocol
from jax_network import batch_gradient, compiled, loss
from jax_privacy import clipping
from protocol import BATCH, Case, Quantity


def quantities(case: Case) -> dict[str, Quantity]:
    clipped = clipping.clipped_grad(
        loss, l2_clip_norm=case.max_norm, batch_argnums=(1, 2), normalize_by=float(len(case.x))
    )
    return {BATCH: batch_gradient(case), "clipped_mean": compiled(case, clipped)}


if __name__ == "__main__":
    protocol.main(f"jax-privacy {importlib.metadata.version('jax-privacy')}, jax {jax.__version__}", quantities)
