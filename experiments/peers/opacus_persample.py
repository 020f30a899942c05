"""Opacus: norms and clipped gradients by ghost clipping, and by fast gradient clipping.

Opacus clips with min(1, C/(‖gₙ‖ + 1e-6)) and leaves the sum of the clipped gradients in `p.grad`; the division by N
happens in its optimizer's step, which is not timed.
"""

import importlib.metadata
import warnings
from collections.abc import Callable, Sequence

import protocol
import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from protocol import BATCH, Case, Quantity
from torch import nn
from torch_network import arrays, batch_gradient, network, peak

warnings.filterwarnings("ignore", message="Full backward hook is firing")


class Private:
    """A network under Opacus, with the loss that runs both backward passes."""

    def __init__(self, case: Case, ghost: bool) -> None:
        bound = case.max_norm
        self.model = GradSampleModuleFastGradientClipping(
            network(case), max_grad_norm=bound, use_ghost_clipping=ghost, loss_reduction="mean"
        )
        self.optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(self.model.parameters(), lr=0.0),
            noise_multiplier=0.0,
            max_grad_norm=bound,
            expected_batch_size=len(case.x),
        )
        self.loss = DPLossFastGradientClipping(self.model, self.optimizer, nn.CrossEntropyLoss())
        self.x, self.y = arrays(case)
        self.shape = len(case.x), len(self.y) // len(case.x)  # a sample is a sequence, its loss the mean over positions

    def norms(self) -> torch.Tensor:
        """The first backward pass alone: it leaves the norms."""
        self.optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(self.model(self.x), self.y).backward()
        return self.model.get_norm_sample()

    def clipped_sum(self) -> list[torch.Tensor]:
        """Both backward passes."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.model(self.x), self.y, shape=self.shape).backward()
        return [p.grad for p in self.model.parameters()]


def quantities(case: Case) -> dict[str, Quantity]:
    ghost, fast = Private(case, ghost=True), Private(case, ghost=False)
    mean: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]] = lambda grads: [g / len(case.x) for g in grads]  # noqa: E731
    return {
        BATCH: Quantity(batch_gradient(case), lambda grads: grads),
        "squared_norms": Quantity(ghost.norms, lambda norms: [norms**2]),
        "clipped_mean": Quantity(ghost.clipped_sum, mean),
        "clipped_mean (fast gradient clipping)": Quantity(fast.clipped_sum, mean),
    }


if __name__ == "__main__":
    protocol.main(f"Opacus {importlib.metadata.version('opacus')}, PyTorch {torch.__version__}", quantities, peak)
