"""curvlinops: products with its linear operators, Kronecker factors with weights and biases apart.

An operator is made anew for each product, as after each step of a training run. It has no exact diagonal.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import curvlinops
import protocol
import torch
from protocol import BATCH, Case, Quantity
from torch import nn
from torch_network import arrays, batch_gradient, network, peak


def quantities(case: Case) -> dict[str, Quantity]:
    model, loss, data = network(case), nn.CrossEntropyLoss(), [arrays(case)]
    params = list(model.parameters())
    v = [torch.from_numpy(a) for layer in protocol.direction(case) for a in layer]

    def operator(kind: Any, **options: Any) -> Any:
        return kind(model, loss, params, data, check_deterministic=False, num_data=len(case.x), **options)

    def product(kind: Any) -> Quantity:
        return Quantity(lambda: operator(kind) @ v, lambda product: product)

    def kfac(fisher_type: str) -> Callable[[], list[torch.Tensor]]:
        def run() -> list[torch.Tensor]:
            made = operator(curvlinops.KFACLinearOperator, fisher_type=fisher_type, num_per_example_loss_terms=1)
            made.compute_kronecker_factors()
            inputs, gradients = made._input_covariances, made._gradient_covariances
            return [factor for name in inputs for factor in (inputs[name], gradients[name])]

        return run

    return {
        BATCH: Quantity(batch_gradient(case), lambda grads: grads),
        "Hv": product(curvlinops.HessianLinearOperator),
        "Gv": product(curvlinops.GGNLinearOperator),
        "empirical Fv": product(curvlinops.EFLinearOperator),
        "K-FAC empirical": Quantity(kfac("empirical"), lambda factors: factors),
        "K-FAC mc": Quantity(kfac("mc"), lambda factors: []),
        "K-FAC exact": Quantity(kfac("type-2"), lambda factors: factors),
    }


if __name__ == "__main__":
    version = importlib.metadata.version("curvlinops-for-pytorch")
    protocol.main(f"curvlinops {version}, PyTorch {torch.__version__}", quantities, peak)
