"""The package as others meet it: found from any folder, and lowered for devices that are not here."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import export

import jaxbp
from jaxbp import MLP, curvature, losses, memory, persample, private
from jaxbp.activations import ACTIVATIONS

NET = MLP((5, 4, 4, 3), hidden=("tanh", "gelu"))
DEEP = MLP((5, *[4] * 6, 3))
PLATFORMS = ["cpu", "cuda", "tpu"]


def test_it_is_found_from_a_folder_that_holds_a_clone_of_its_name(tmp_path):
    """An editable install by a finder comes after sys.path, where a folder named jaxbp is a namespace package."""
    (tmp_path / "jaxbp").mkdir()
    code = "import importlib.util; print(importlib.util.find_spec('jaxbp').origin)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(Path(jaxbp.__file__))


def quantities(f, weights):
    p, params = persample, persample.mean_gradient(f)
    return {
        "gradients": p.gradients(f),
        "mean_gradient": p.mean_gradient(f, weights),
        "squared_norms": (p.squared_norms(f), p.squared_norms(f, per_layer=True)),
        "dot": p.dot(f, params),
        "gram": p.gram(f, f),
        "cosine": p.cosine(f),
        "second_moment": p.second_moment(f, weights),
        "variance": p.variance(f, weights),
        "signal_to_noise": p.signal_to_noise(f, weights),
        "clipped_mean": tuple(p.clipped_mean(f, 1.0, weights)),
        "noise_scale": p.noise_scale(f, weights),
        "noise_scale_from_norms": p.noise_scale_from_norms(2.0, 1.0, 1, 7),
        "diversity": p.diversity(f, weights),
        "diversity_from_norms": p.diversity_from_norms(2.0, 1.0, 7),
        "coherence": p.coherence(f, weights),
        "coherence_from_norms": p.coherence_from_norms(2.0, 1.0),
        "stiffness": p.stiffness(f, weights=weights),
        "grand": p.grand(f),
        "el2n": p.el2n(f),
        "influence": p.influence([f], [f], [0.1]),
        "noisy_clipped_mean": private.noisy_clipped_mean(f, 1.0, 1.0, jax.random.key(0), 4.0, weights),
        "poisson_batch": private.poisson_batch(jax.random.key(0), 9, 0.5, 9),
    }


def data_set(params, x, y):
    return {
        "map_chunks": persample.map_chunks(lambda losses, f: persample.grand(f), NET, params, x, y, 4),
        "gram_matrix": persample.gram_matrix(NET, params, x, y, 4),
    }


def of_memory(params, x, y):
    norms = lambda f: persample.squared_norms(f, per_layer=True)  # noqa: E731
    return {
        "value_and_grad": memory.value_and_grad(DEEP, params, x, y, memory.segments(7)),
        "each_layer": memory.each_layer(norms, DEEP, params, x, y, memory.revolve(7, slots=2)),
    }


def of_activations(s):
    return {
        name: (sigma.dsigma(s, sigma.sigma(s)), sigma.d2sigma(s, sigma.sigma(s))) for name, sigma in ACTIVATIONS.items()
    }


def of_losses(x, y, label):
    def both(loss):
        target = y if "array" in loss.target else label
        return loss.ell(x, target), loss.dl_dx(x, target), loss.hvp(x, target, x), loss.root(x, target)

    return {name: both(loss) for name, loss in losses.LOSSES.items()}


def core(params, x, y):
    tape = jaxbp.forward(NET, params, x[0])
    loss, grads = jaxbp.value_and_grad(NET, params, x, y, jnp.ones(len(x)), 3)
    f = jaxbp.factors(NET, params, x, y)[1]
    return {
        "apply": jax.grad(lambda params: jnp.sum(jaxbp.apply(NET, params, x)))(params),
        "backward": jaxbp.backward(NET, params, tape, tape.x[-1]),
        "factors": f,
        "forward": tape,
        "gradient": jaxbp.gradient(f),
        "update": jaxbp.update(params, grads, 0.1),
        "value_and_grad": loss,
    }


def second_order(params, x, y):
    tape = jaxbp.forward(NET, params, x[0])
    rtape = jaxbp.r_forward(NET, params, tape, params)
    dl_dx = curvature.backward_x(NET, params, tape, tape.x[-1])
    products = [f(NET, params, x, y, params, jnp.ones(len(x))) for f in (curvature.hvp, curvature.ggn_vp)]
    return {
        "r_forward": rtape,
        "r_backward": jaxbp.r_backward(NET, params, tape, dl_dx, params, rtape, rtape.x[-1]),
        "products": (
            products,
            curvature.quadratic(NET, params, x, y, params),
            curvature.diag_hessian(NET, params, x, y),
        ),
    }


def init(key):
    return {"init": [jaxbp.init(DEEP, key, scheme, "normal") for scheme in ("he", "glorot_uniform", "orthogonal")]}


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def params_of(net):
    return jax.eval_shape(functools.partial(jaxbp.init, net), jax.random.key(0))


X, Y = shaped(7, 5), shaped(7, dtype=jnp.int32)
WIDTHS = zip(NET.sizes, NET.sizes[1:], strict=False)
FACTORS = jaxbp.Factors(*(tuple(shaped(7, n) for n in widths) for widths in zip(*WIDTHS, strict=True)))
PROGRAMS = {
    init: (shaped(dtype=jax.random.key(0).dtype),),
    core: (params_of(NET), X, Y),
    quantities: (FACTORS, shaped(7)),
    data_set: (params_of(NET), X, Y),
    of_memory: (params_of(DEEP), X, Y),
    second_order: (params_of(NET), X, Y),
    of_activations: (shaped(9),),
    of_losses: (shaped(4), shaped(4), shaped(dtype=jnp.int32)),
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_it_lowers_for_every_platform(program):
    exported = export.export(jax.jit(program), platforms=PLATFORMS)(*PROGRAMS[program])
    assert list(exported.platforms) == PLATFORMS


def test_no_public_function_is_left_out():
    """Types, modules and the checker aside, which looks at values and runs programs of its own."""
    lowered = {name for program in PROGRAMS for name in jax.eval_shape(program, *PROGRAMS[program])}
    modules = {"activations", "checker", "factor", "initializers", "layers", "losses", "memory", "models", "persample"}
    modules |= {"curvature", "influence", "kronecker", "private", "second_order", "spectrum", "tangent_kernel"}
    types = {"MLP", "Network", "Activation", "Affine", "Factors", "Loss", "Params", "Tape"}
    types |= {"Clipped", "NoiseScale", "Stiffness"}
    assert lowered >= (set(jaxbp.__all__) | set(persample.__all__)) - modules - types - {"check"}
    assert lowered >= set(ACTIVATIONS) | set(losses.LOSSES)
