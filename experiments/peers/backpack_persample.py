"""BackPACK: BatchGrad, BatchL2Grad, SumGradSquared and Variance.

With the mean as loss its quantities are of hₙ = gₙ/N: BatchL2Grad is ‖hₙ‖² of each parameter, SumGradSquared is Σₙ hₙ²,
and Variance is Σₙ hₙ²/N − (Σₙ hₙ/N)², biased. Of a GPT's layer norms it gives none, and warns: "Extension saving to
batch_l2 does not have an extension for Module <class 'torch.nn.modules.normalization.LayerNorm'> although the module
has parameters".
"""

import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any

import protocol
import torch
from backpack import backpack, extend, extensions
from protocol import BATCH, Case, Quantity
from torch import nn
from torch_network import arrays, batch_gradient, network, peak

warnings.filterwarnings("ignore", message="Full backward hook is firing")


def quantities(case: Case) -> dict[str, Quantity]:
    batch = {BATCH: Quantity(batch_gradient(case), lambda grads: grads)}
    if case.tokens:
        return batch
    model, loss, samples = extend(network(case)), extend(nn.CrossEntropyLoss()), len(case.x)
    x, y = arrays(case)

    def extended(extension: Any, field: str) -> Callable[[], list[torch.Tensor]]:
        def run() -> list[torch.Tensor]:
            model.zero_grad()
            with backpack(extension()):
                loss(model(x), y).backward()
            return [p.__dict__.pop(field) for p in model.parameters()]  # so that no field lives on into the next round

        return run

    unbiased = samples**2 * samples / (samples - 1)
    norms, squares = (
        extended(extensions.BatchL2Grad, "batch_l2"),
        extended(extensions.SumGradSquared, "sum_grad_squared"),
    )
    return batch | {
        "squared_norms": Quantity(norms, lambda fields: [samples**2 * sum(fields)]),
        "second_moment": Quantity(squares, lambda fields: [samples * a for a in fields]),
        "variance": Quantity(extended(extensions.Variance, "variance"), lambda fields: [unbiased * a for a in fields]),
        "gradients": Quantity(
            extended(extensions.BatchGrad, "grad_batch"), lambda fields: [samples * a[:4] for a in fields]
        ),
    }


if __name__ == "__main__":
    version = importlib.metadata.version("backpack-for-pytorch")
    protocol.main(f"BackPACK {version}, PyTorch {torch.__version__}", quantities, peak)
