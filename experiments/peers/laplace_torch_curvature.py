"""laplace-torch: the logarithm of the evidence, and the covariance of outputs.

Its posterior is that of the summed loss, N G. A bias has a block of its own, B, and A is without the 1 of the bias. The
prior's precision is added to the products of eigenvalues, as jaxbp adds it. Without Kronecker factors it forms G, of P²
numbers, and for a covariance the Jacobian, of outputs × P numbers an input.
"""

import importlib.metadata
from typing import Any

import protocol
import torch
from laplace import Laplace
from protocol import BATCH, INPUTS, PRIOR, Case, Quantity
from torch.utils.data import DataLoader, TensorDataset
from torch_network import arrays, batch_gradient, network, peak

LARGEST = 5_000  # parameters


def quantities(case: Case) -> dict[str, Quantity]:
    model, (x, y) = network(case), arrays(case)
    data = DataLoader(TensorDataset(x, y), batch_size=len(x))

    def fitted(structure: str) -> Any:
        """A posterior, made anew for each evidence, as after each step of a training run."""
        found = Laplace(model, "classification", "all", structure, prior_precision=PRIOR)
        found.fit(data)
        return found

    kept = fitted("kron")

    def evidence(structure: str) -> Quantity:
        return Quantity(lambda: fitted(structure).log_marginal_likelihood().detach(), lambda evidence: [evidence])

    def covariance() -> torch.Tensor:
        jacobian, _ = kept.backend.jacobians(x[:INPUTS])
        return kept.functional_variance(jacobian)

    made = {
        BATCH: Quantity(batch_gradient(case), lambda grads: grads),
        "log evidence, K-FAC": evidence("kron"),
        "output covariance, K-FAC": Quantity(covariance, lambda covariance: [covariance.detach()]),
    }
    small = sum(p.numel() for p in model.parameters()) <= LARGEST
    return made | ({"log evidence": evidence("full")} if small else {})


if __name__ == "__main__":
    version = importlib.metadata.version("laplace-torch")
    protocol.main(f"laplace-torch {version}, PyTorch {torch.__version__}", quantities, peak)
