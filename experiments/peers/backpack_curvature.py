"""BackPACK: products by its two passes of autodiff, diagonals, Kronecker factors of the weights.

The factors of a bias, B alone, are those of its weights again; A is without the 1 of the bias.
"""

import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any

import protocol
import torch
from backpack import backpack, extend, extensions
from backpack.hessianfree.ggnvp import ggn_vector_product
from backpack.hessianfree.hvp import hessian_vector_product
from protocol import BATCH, Case, Quantity
from torch import nn
from torch_network import arrays, batch_gradient, network, peak

warnings.filterwarnings("ignore", message="Full backward hook is firing")


def quantities(case: Case) -> dict[str, Quantity]:
    x, y = arrays(case)
    plain, model, loss = network(case), extend(network(case)), extend(nn.CrossEntropyLoss())
    v = [torch.from_numpy(a) for layer in protocol.direction(case) for a in layer]

    def extended(extension: Any, field: str) -> Callable[[], list[Any]]:
        def run() -> list[Any]:
            model.zero_grad()
            with backpack(extension()):
                loss(model(x), y).backward()
            return [p.__dict__.pop(field) for p in model.parameters()]  # so that no field lives on into the next round

        return run

    def ggn_vp() -> Any:
        output = plain(x)
        return ggn_vector_product(nn.functional.cross_entropy(output, y), output, plain, v)

    def hvp() -> Any:
        return hessian_vector_product(nn.functional.cross_entropy(plain(x), y), list(plain.parameters()), v)

    def factors(fields: list[Any]) -> list[torch.Tensor]:
        return [a for b_factor, a_factor in fields[::2] for a in (a_factor, b_factor)]

    return {
        BATCH: Quantity(batch_gradient(case), lambda grads: grads),
        "Hv": Quantity(hvp, lambda product: product),
        "Gv": Quantity(ggn_vp, lambda product: product),
        "diag G": Quantity(extended(extensions.DiagGGNExact, "diag_ggn_exact"), lambda fields: fields),
        "diag G, mc": Quantity(extended(extensions.DiagGGNMC, "diag_ggn_mc"), lambda fields: []),
        "K-FAC mc": Quantity(extended(extensions.KFAC, "kfac"), lambda fields: []),
        "K-FAC exact": Quantity(extended(extensions.KFLR, "kflr"), factors),
    }


if __name__ == "__main__":
    version = importlib.metadata.version("backpack-for-pytorch")
    protocol.main(f"BackPACK {version}, PyTorch {torch.__version__}", quantities, peak)
