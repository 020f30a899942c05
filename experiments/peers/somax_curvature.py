"""somax: products with its curvature operators, each linearised and multiplied in one compiled program."""

import importlib.metadata
from typing import Any

import jax
import protocol
from jax_network import batch_gradient, compiled, loss, outputs
from protocol import BATCH, Case, Quantity
from somax.curvature import ggn_ce, hessian


def quantities(case: Case) -> dict[str, Quantity]:
    direction = jax.tree.map(jax.numpy.asarray, protocol.direction(case))

    def mean_loss(params: Any, batch: Any) -> Any:
        return loss(params, batch["x"], batch["y"], case.hidden)

    def product(operator: Any) -> Quantity:
        def program(params: Any, x: Any, y: Any, v: Any) -> Any:
            state, _ = operator.init(params, {"x": x, "y": y})
            return operator.matvec(params, state, v)

        return compiled(case, program, direction)

    return {
        BATCH: batch_gradient(case),
        "Hv": product(hessian.ExactHessian(loss_fn=mean_loss)),
        "Gv": product(ggn_ce.GGNCE(predict_fn=lambda params, x: outputs(params, x, case.hidden))),
    }


if __name__ == "__main__":
    protocol.main(f"somax {importlib.metadata.version('python-somax')}, jax {jax.__version__}", quantities)
