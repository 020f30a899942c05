"""Calls of library rules that take more than arrays, and formulas for those that autodiff cannot differentiate.

experiments/configs/checker_libraries.toml names them. Each imports its library when it is called.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def positive_definite(x: Array) -> Array:
    """x xᵀ + 1, so that any square matrix will do as an argument."""
    return x @ x.T + jnp.eye(x.shape[0], dtype=x.dtype)


# JAX -----------------------------------------------------------------------------------------------------------------


def cubic(x: Array) -> Array:
    """y³ + y, elementwise: it has one inverse, and a formula for that."""
    return x**3 + x


def cubic_root(a: Array) -> Array:
    """The y of y³ + y = a: 2/√3 · sinh(asinh(a·3√3/2)/3)."""
    return 2 / jnp.sqrt(3.0).astype(a.dtype) * jnp.sinh(jnp.arcsinh(a * (3 * 3**0.5 / 2)) / 3)


def jax_custom_root(a: Array) -> Array:
    def newton(f: Any, start: Array) -> Array:
        return jax.lax.fori_loop(0, 60, lambda _, y: y - f(y) / (3 * y**2 + 1), start)

    return jax.lax.custom_root(lambda y: cubic(y) - a, a / 2, newton, lambda g, y: y / g(jnp.ones_like(y)))


def jax_odeint(y: Array, a: Array) -> Array:
    from jax.experimental.ode import odeint

    return odeint(lambda y, t, a: -a * y, y, jnp.asarray([0.0, 1.0], y.dtype), a, rtol=1e-13, atol=1e-13)[-1]


def decay(y: Array, a: Array) -> Array:
    """What y′ = −a y gives after one unit of time."""
    return y * jnp.exp(-a)


def jax_mantissa(x: Array) -> Array:
    return jnp.frexp(x)[0]


def mantissa(x: Array) -> Array:
    """x ÷ 2ᵉ, where e does not depend on x between two powers of 2."""
    return x * jnp.exp2(-jnp.frexp(x)[1].astype(x.dtype))


def jax_expn(x: Array) -> Array:
    return jax.scipy.special.expn(2, x)


def jax_wofz(x: Array, y: Array) -> tuple[Array, Array]:
    from jax._src.scipy.special import _wofz

    w = _wofz(jax.lax.complex(x, y))
    return jnp.real(w), jnp.imag(w)


def jax_mha_reference(q: Array, k: Array, v: Array) -> Array:
    from jax.experimental.pallas.ops.tpu.flash_attention import _mha_reference

    return _mha_reference(q, k, v, None, None, False, -1e9, 1.0, False)


def jax_splash_reference(q: Array, k: Array, v: Array, sink: Array) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import attention_reference_custom

    mask = jnp.tril(jnp.ones((q.shape[0], k.shape[0]), bool))
    return attention_reference_custom(mask, q, k, v, None, sink, attn_logits_soft_cap=2.0)


# Equinox and what is built on it -------------------------------------------------------------------------------------


def equinox_error_if(x: Array) -> Array:
    import equinox as eqx

    return eqx.error_if(x, jnp.any(jnp.isnan(x)), "NaN")


def equinox_while_loop(x: Array) -> Array:
    import equinox.internal as eqxi

    def body(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.sin(carry[0]), carry[1] + 1

    start = (x, jnp.asarray(0))
    return eqxi.while_loop(lambda c: c[1] < 5, body, start, max_steps=5, kind="checkpointed", checkpoints=2)[0]


def sine_five_times(x: Array) -> Array:
    for _ in range(5):
        x = jnp.sin(x)
    return x


def lineax_asarray(x: Array) -> Array:
    from lineax._misc import _asarray

    return _asarray(x.dtype, x)


def optimistix_asarray(x: Array) -> Array:
    from optimistix._misc import _asarray

    return _asarray(x.dtype, x)


def optimistix_root_find(a: Array) -> Array:
    import optimistix

    solver = optimistix.Newton(rtol=1e-12, atol=1e-12)
    return optimistix.root_find(lambda y, a: cubic(y) - a, solver, a / 2, a, throw=False, max_steps=60).value


def diffrax_backsolve(y: Array, a: Array) -> Array:
    import diffrax

    term, solver = diffrax.ODETerm(lambda t, y, a: -a * y), diffrax.Dopri8()
    adjoint = diffrax.BacksolveAdjoint()
    options = {"adjoint": adjoint, "max_steps": 100, "throw": False}
    return diffrax.diffeqsolve(term, solver, 0.0, 1.0, 0.02, y, a, **options).ys[-1]


# Flax, RLax, Distrax, JAXopt -----------------------------------------------------------------------------------------


def flax_dot_general(x: Array, y: Array) -> Array:
    from flax.linen.fp8_ops import dot_general_with_precision

    return dot_general_with_precision(x, y, (((1,), (0,)), ((), ())))


def rlax_clip_gradient(x: Array) -> Array:
    import rlax

    return rlax.clip_gradient(x, -1.0, 1.0)


def distrax_von_mises_cdf(x: Array, concentration: Array) -> Array:
    from distrax._src.distributions.von_mises import _von_mises_cdf

    return _von_mises_cdf(x, concentration, x.dtype)


def jaxopt_sparse_simplex(x: Array) -> Array:
    from jaxopt.projection import projection_sparse_simplex

    return projection_sparse_simplex(x, 2)


# OTT -----------------------------------------------------------------------------------------------------------------


def ott_fixed_point(c: Array, x: Array) -> Array:
    from ott.math.fixed_point_loop import fixpoint_iter_backprop

    return fixpoint_iter_backprop(lambda *_: True, lambda i, c, x, e: jnp.sin(c * x), 2, 4, 2, c, x)


def sine_four_times(c: Array, x: Array) -> Array:
    for _ in range(4):
        x = jnp.sin(c * x)
    return x


def ott_sqrtm(x: Array) -> tuple[Array, Array]:
    from ott.math.matrix_square_root import sqrtm

    return sqrtm(positive_definite(x), threshold=1e-14, max_iterations=100)[:2]


def ott_sqrtm_only(x: Array) -> Array:
    from ott.math.matrix_square_root import sqrtm_only

    return sqrtm_only(positive_definite(x), threshold=1e-14, max_iterations=100)


def ott_inv_sqrtm_only(x: Array) -> Array:
    from ott.math.matrix_square_root import inv_sqrtm_only

    return inv_sqrtm_only(positive_definite(x), threshold=1e-14, max_iterations=100)


def ott_semidiscrete_loss(g: Array) -> Array:
    from ott.geometry.pointcloud import PointCloud
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.semidiscrete import _semidiscrete_loss

    x, y = jnp.linspace(-1, 1, 10, dtype=g.dtype), jnp.linspace(0, 2, g.size, dtype=g.dtype)
    return _semidiscrete_loss(g, LinearProblem(PointCloud(x.reshape(5, 2), y[:, None] * y[:2], epsilon=0.5)))


def square_roots(x: Array) -> tuple[Array, Array]:
    """The square root of x xᵀ + 1 and its inverse, from the eigenvalues."""
    values, vectors = jnp.linalg.eigh(positive_definite(x))
    return (vectors * jnp.sqrt(values)) @ vectors.T, (vectors / jnp.sqrt(values)) @ vectors.T


def square_root(x: Array) -> Array:
    return square_roots(x)[0]


def inverse_square_root(x: Array) -> Array:
    return square_roots(x)[1]


def lambertw(x: Array) -> Array:
    """The w of w eʷ = x > 0, by Newton's iteration."""
    w = jnp.log1p(x)
    for _ in range(8):
        w = w - (w - x * jnp.exp(-w)) / (1 + w)
    return w


# TensorFlow Probability on JAX ---------------------------------------------------------------------------------------


def tfp_logdet(x: Array) -> Array:
    from tensorflow_probability.substrates.jax.math import hpsd_logdet

    return hpsd_logdet(positive_definite(x))


def tfp_quadratic_form_solve(x: Array, b: Array) -> Array:
    from tensorflow_probability.substrates.jax.math import hpsd_quadratic_form_solve

    return hpsd_quadratic_form_solve(positive_definite(x), b)


def tfp_quadratic_form_solvevec(x: Array, b: Array) -> Array:
    from tensorflow_probability.substrates.jax.math import hpsd_quadratic_form_solvevec

    return hpsd_quadratic_form_solvevec(positive_definite(x), b)


def tfp_solve(x: Array, b: Array) -> Array:
    from tensorflow_probability.substrates.jax.math import hpsd_solve

    return hpsd_solve(positive_definite(x), b)


def tfp_kahan_sum(x: Array) -> Array:
    from tensorflow_probability.substrates.jax.math import reduce_kahan_sum

    return reduce_kahan_sum(x).total


def tfp_retrying_cholesky(x: Array) -> Array:
    from tensorflow_probability.substrates.jax.experimental.distributions.marginal_fns import retrying_cholesky

    return retrying_cholesky(positive_definite(x))[0]
