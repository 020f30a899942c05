"""jax-privacy: clipped_grad, which clips with min(1, C/‖gₙ‖); normalize_by makes the sum a mean.

`microbatch_size=1`, one sample after the other, is the fastest setting on a CPU and what is compared; the default, the
whole batch under one vmap, is measured too where its N × parameters numbers are few: it takes many seconds elsewhere.
"""

import importlib.metadata

import jax
import protocol
from jax_network import batch_gradient, compiled, loss
from jax_privacy import clipping
from protocol import BATCH, Case, Quantity

LARGEST = 2**26  # N × parameters


def quantities(case: Case) -> dict[str, Quantity]:
    def clipped(microbatch_size: int | None) -> Quantity:
        program = clipping.clipped_grad(
            loss,
            l2_clip_norm=case.max_norm,
            batch_argnums=(1, 2),
            normalize_by=float(len(case.x)),
            microbatch_size=microbatch_size,
        )
        return compiled(case, program)

    made = {BATCH: batch_gradient(case), "clipped_mean": clipped(1)}
    numbers = len(case.x) * sum(w.size + b.size for w, b in case.layers)
    return made | ({"clipped_mean (whole batch)": clipped(None)} if numbers <= LARGEST else {})


if __name__ == "__main__":
    protocol.main(f"jax-privacy {importlib.metadata.version('jax-privacy')}, jax {jax.__version__}", quantities)
