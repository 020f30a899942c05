"""Is curvature what theory says, where theory has a closed form?

Softmax regression at w = 0, on 5,000 images: p = 1/C and H = (1/N) Σ (diag p − ppᵀ) ⊗ x̃x̃ᵀ, whose eigenvalues are those
of X̃ᵀX̃/N over C, each C − 1 times, and 0. The vectors of λ/C are e ⊗ a, X̃ᵀX̃ a/N = λ a and e ⟂ 1.

Rank: the Gauss-Newton matrix of N samples has rank N (C − 1) at most under softmax.

Deep linear networks: with ½‖x − y‖² the blocks of the Gauss-Newton matrix are B ⊗ A of K-FAC, and the tangent kernel is
Θ = Σ_l W_{L:l+1} W_{L:l+1}ᵀ (1 + x⁽ˡ⁻¹⁾·x′⁽ˡ⁻¹⁾), W_{L:l+1} the product of the weights behind layer l.

The tangent kernel over training has no closed form: full-batch gradient descent on 300 of the images, 784-128-10 tanh,
η = 0.1. Its alignment with the matrix of equal labels is the cosine of the two, both centred (C. Cortes et al.,
*Algorithms for learning kernels based on centered alignment*, 2012).

Command: python -m experiments.closed_forms [--config configs/mnist.toml] [--out FOLDER]
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

import jaxbp
from experiments import lds, report
from jaxbp import MLP, Affine, curvature, kronecker
from jaxbp.tangent_kernel import ntk

LARGEST = 10  # eigenvalues, of which each has C − 1 vectors
KERNEL, SAMPLES, RATE, STEPS = (784, 128, 10), 300, 0.1, (0, 10, 100, 1000)


def softmax_regression(x: jax.Array, y: jax.Array, classes: int) -> dict[str, Any]:
    """H at w = 0 times the vectors of its largest eigenvalues: uᵀHu, the largest ‖Hu − λu‖/λ, (C − 1) rank X̃."""
    net = MLP((x.shape[1], classes))
    params = jax.tree.map(jnp.zeros_like, jaxbp.init(net, jax.random.key(0), dtype=x.dtype))
    with_one = kronecker.with_one(x)
    values, vectors = jnp.linalg.eigh(with_one.T @ with_one / (len(x) * classes))
    e = jnp.linalg.svd(jnp.ones((1, classes), x.dtype))[2][1:]
    values, u = values[: -LARGEST - 1 : -1], jnp.einsum("eo,ia->aeoi", e, vectors[:, : -LARGEST - 1 : -1])
    flat = lambda v: jnp.concatenate([v.w, v.b[:, None]], axis=1)  # noqa: E731

    @jax.jit
    def products(params: Any, x: jax.Array, y: jax.Array, u: jax.Array) -> jax.Array:
        hessian = curvature.linearized(net, params, x, y)
        product = lambda u: flat(hessian((Affine(u[:, :-1], u[:, -1]),))[0])  # noqa: E731
        return jax.lax.map(product, u.reshape(-1, *u.shape[2:])).reshape(u.shape)

    hu = products(params, x, y, u)
    apart = jnp.linalg.norm((hu - values[:, None, None, None] * u).reshape(LARGEST, classes - 1, -1), axis=2)
    return {
        "closed_form": values.tolist(),
        "by_products": jnp.sum(u * hu, axis=(2, 3)).tolist(),
        "difference": float(jnp.max(apart / values[:, None])),
        "rank": (classes - 1) * int(jnp.linalg.matrix_rank(with_one)),
        "parameters": classes * with_one.shape[1],
    }


def dense_ggn(net: MLP, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """G by its products with the unit vectors, (P, P)."""
    operator = curvature.linearized(net, params, x, y, "ggn")
    flat, unflatten = ravel_pytree(params)
    return jax.vmap(lambda v: ravel_pytree(operator(unflatten(v)))[0])(jnp.eye(flat.size, dtype=flat.dtype))


def rank(sizes: tuple[int, ...] = (6, 8, 4), samples: int = 5) -> dict[str, int]:
    """The rank of G beside its bound."""
    net = MLP(sizes, hidden="tanh")
    params = jaxbp.init(net, jax.random.key(0), dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(1), (samples, sizes[0]), jnp.float64)
    g = dense_ggn(net, params, x, jnp.arange(samples) % sizes[-1])
    return {"rank": int(jnp.linalg.matrix_rank(g)), "bound": samples * (sizes[-1] - 1), "parameters": len(g)}


def deep_linear(sizes: tuple[int, ...] = (7, 6, 5, 4), samples: int = 9) -> dict[str, float]:
    """The largest differences of the blocks and of the kernel, relative to their largest entries."""
    net = MLP(sizes, hidden="identity", loss="squared_error")
    params = jaxbp.init(net, jax.random.key(0), dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(1), (samples, sizes[0]), jnp.float64)
    g, start, blocks = dense_ggn(net, params, x, jnp.zeros((samples, sizes[-1]))), 0, []
    for (a, b), (w, _) in zip(kronecker.kfac(net, params, x, jnp.zeros((samples, sizes[-1]))), params, strict=True):
        blocks.append(_apart(g[start:, start:][: w.size, : w.size], jnp.kron(b, a[:-1, :-1])))
        start += w.size + len(w)
    theta, behind, inputs = jnp.zeros(()), jnp.eye(sizes[-1]), jax.vmap(lambda x: jaxbp.forward(net, params, x))(x).x
    for (w, _), before in reversed(list(zip(params, inputs, strict=False))):
        theta = theta + jnp.einsum("cd,nm->nmcd", behind @ behind.T, 1 + before @ before.T)
        behind = behind @ w
    return {"blocks": max(blocks), "kernel": _apart(ntk(net, params, x), theta)}


def _apart(found: jax.Array, expected: jax.Array) -> float:
    return float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))


def kernel_over_training(sizes: tuple[int, ...], x: jax.Array, y: jax.Array, steps: Sequence[int]) -> dict[str, Any]:
    """Of the trace kernel at these steps: its eigenvalues, the largest first, and its alignment; the mean loss."""
    net = MLP(sizes, hidden="tanh")
    params: tuple[Affine, ...] = jaxbp.init(net, jax.random.key(0), dtype=x.dtype)
    same = _centred((y[:, None] == y[None, :]).astype(x.dtype))

    @jax.jit
    def trained(params: Any, x: jax.Array, y: jax.Array, more: int) -> Any:
        step = lambda _, p: jaxbp.update(p, jaxbp.value_and_grad(net, p, x, y)[1], RATE)  # noqa: E731
        return jax.lax.fori_loop(0, more, step, params)

    @jax.jit
    def measured(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        theta = ntk(net, params, x, kind="trace")
        centred = _centred(theta)
        cosine = jnp.vdot(centred, same) / (jnp.linalg.norm(centred) * jnp.linalg.norm(same))
        return jnp.linalg.eigvalsh(theta)[::-1], cosine, jaxbp.value_and_grad(net, params, x, y)[0]

    found: dict[str, Any] = {"steps": list(steps), "eigenvalues": [], "alignment": [], "loss": []}
    for before, step in zip((0, *steps), steps, strict=False):
        params = trained(params, x, y, step - before)
        values, cosine, loss = measured(params, x, y)
        found["eigenvalues"].append(np.asarray(values).tolist())
        found["alignment"].append(float(cosine))
        found["loss"].append(float(loss))
    return found


def _centred(kernel: jax.Array) -> jax.Array:
    rows = kernel - jnp.mean(kernel, axis=0, keepdims=True)
    return rows - jnp.mean(rows, axis=1, keepdims=True)


def draw(regression: dict[str, Any], kernel: dict[str, Any]) -> Figure:
    """The eigenvalues of the Hessian beside the closed form; those of the kernel over training."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    order = np.arange(1, LARGEST + 1)
    left.plot(order, regression["closed_form"], "o", fillstyle="none", label="closed form; crosses: uᵀHu")
    left.plot(order, regression["by_products"], "x", color="tab:orange")
    left.set(yscale="log", xlabel="eigenvalue, largest first", title="Hessian of softmax regression at w = 0")
    for step, values in zip(kernel["steps"], kernel["eigenvalues"], strict=True):
        right.plot(np.arange(1, len(values) + 1), values, label=f"step {step:,}")
    right.set(xscale="log", yscale="log", xlabel="eigenvalue, largest first", title="tangent kernel over training")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints two tables, writes closed_forms.json and closed_forms.png."""
    parser = report.parser(__doc__, lds.CONFIG, "the data: images of 28 × 28 with labels")
    with report.study("closed_forms", parser, arguments) as study, jax.enable_x64(True):
        x, y = lds.problem(study.options.config)[0]
        x = x.astype(jnp.float64)
        regression, linear, ranks = softmax_regression(x, y, int(y.max()) + 1), deep_linear(), rank()
        kernel = kernel_over_training(KERNEL, x[:SAMPLES], y[:SAMPLES], STEPS)
        rows = [
            (f"{LARGEST} eigenvalues of H and their vectors, softmax regression", f"{regression['difference']:.0e}"),
            ("blocks of G, deep linear network", f"{linear['blocks']:.0e}"),
            ("tangent kernel, deep linear network", f"{linear['kernel']:.0e}"),
            ("rank of H, softmax regression", f"{regression['rank']} of {regression['parameters']}"),
            ("rank of G, 5 samples, 4 classes", f"{ranks['rank']} of {ranks['parameters']}, bound {ranks['bound']}"),
        ]
        report.table("closed forms", ("what", "difference, or rank"), rows)
        columns = ("step", "loss", "largest eigenvalue", "share of the trace", "alignment")
        steps = [
            (step, f"{loss:.3f}", f"{values[0]:.0f}", f"{values[0] / sum(values):.2f}", f"{cosine:.2f}")
            for step, loss, values, cosine in zip(
                *(kernel[k] for k in ("steps", "loss", "eigenvalues", "alignment")), strict=True
            )
        ]
        report.table("tangent kernel over training", columns, steps)
        found = {"softmax_regression": regression, "rank": ranks, "deep_linear": linear, "kernel": kernel}
        study.save(found, draw(regression, kernel))


if __name__ == "__main__":
    main()
