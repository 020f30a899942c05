"""A gradient checker for hand-written backward passes, ours and anyone's: `jaxbp.check`.

You give it a `jax.custom_vjp` or `jax.custom_jvp` function, a function and its gradient (JAX or NumPy code), a
forward/backward pair, or a network, activation or loss of jaxbp. It gives a `Report`. In pytest it is one line:

>>> import jax, jaxbp
>>> cube = jax.custom_vjp(lambda x: x**3)
>>> cube.defvjp(lambda x: (x**3, x), lambda x, u: (3 * x**2 * u,))
>>> jaxbp.check(cube, "f32[8]").raise_if_failed()

From the command line, 0 is the exit status if all passed, 1 if not, 2 for bad usage::

    jaxbp check configs/digits.toml
    jaxbp check package.module:function --inputs 'f32[8,128] i32[8]{0..9}' --json report.json
    jaxbp check package --arguments arguments.toml      # every custom_vjp and custom_jvp that a name leads to
    jaxbp check --watch rules.py                        # the same of a file, again whenever it changes

**The nine checks.** J is the Jacobian of the function, u the cotangent that a backward pass gets (∂ℓ/∂output), Jᵀu what
it has to return. The reference is the function that autodiff differentiates, by default the function itself. One of
another value declares a gradient (straight-through, reversal): the report says so. One that is off by the same number
everywhere fails.

===================== ============================================== ===================================================
check                 what it does                                   what it catches
===================== ============================================== ===================================================
contract              compares tree, shapes and dtypes of the        an axis that was not summed, None for an argument
                      cotangents with the arguments                  that has a gradient, a forward with another value
provenance            looks whether the custom rule really runs      a rule that was never attached
cotangent algebra     calls twice; u = 0; 2u + v; 2^±20 u            hidden state, a lost u, a rule not linear in u
float64 oracle        compares with autodiff, element by element     wrong signs, factors, transposes, terms, elements
adjoint identity      ⟨J v, u⟩ = ⟨v, Jᵀu⟩ for random v               the same by forward mode, in another way
independent numerics  finite differences with an error bar           a reference that autodiff itself gets wrong
production dtype      the oracle again, in the dtypes you use        overflow, underflow, cancellation
transformations       eager, jit, vmap, scan, remat, sharding        a rule that breaks below a transformation
edges and vacuity     asks whether any gradient was not 0            a check that proved nothing
===================== ============================================== ===================================================

**Points.** They are searched, not only drawn: every magnitude, exact zeros and ones, whole numbers, halves, ties,
equal, constant and zero rows, empty and full masks, the ends of the ranges of integers, and both sides of every number
that function or rule compares with, which are read from their jaxprs (`jaxbp.checker.search`). Other batch sizes,
lengths and ranks are tried where the function takes them, and bfloat16 and float16 where the rule does. ``domain=``
says where the function is defined: two ends, a name such as "positive", "simplex" or "spd", or a function that draws.

**Words.** *Provenance*: where the numbers come from. If no custom rule ran, autodiff would be compared with itself.
*Vacuity*: a check passes in vain if the true gradient is 0 at all points. *Edges*: the points where rules break: exact
zeros, numbers 200 times as large, and at level "full" tiny ones and all magnitudes.

**Verdicts.** Only PASS passes. FAIL: a number is off by more than its bound. UNEXERCISED: nothing was tried, for the
gradient was 0 everywhere or no rule ran; ``allow_zero=`` says that 0 is meant. INCONCLUSIVE: the error bar of the
differences is too wide to decide, or a check could not be completed, which may be a fault of the checker and is then
named as one. Nothing that a rule raises leaves `check`.

**What autodiff cannot differentiate.** For a function with a while_loop, a callback or a Pallas kernel, and for NumPy
code, differences are the truth; ``reference=`` gives the checker more. ``accuracy=`` says how well a solver solves.

**Bounds.** They come from the rounding of the reference itself, element by element (`jaxbp.checker.rounding`), not from
a tolerance for all: a rule may lose in float32 what the reference loses there.

**Kinks.** At a kink the rule must give what autodiff of the reference gives, or any value between the two sides where
max, min or abs split a tie. ``kinks=`` asks for the left or the right side, or allows any subgradient.

**Reading a failure.** The first line is the first cause: check, leaf and index, both numbers, and below it what was
found to explain the difference. The last lines reproduce it. With ``2 * x**2 * u`` in the rule above::

    jaxbp.check <lambda>: FAIL (4 FAIL, 7 PASS; fast, seed 0, 0.4 s)
      FAIL float64 oracle [0][3] (float64, ordinary): got -0.01249551, want -0.01874327, error ÷ bound 1.4e+13
           matches after × 1.5

**Whole packages.** The arguments of a rule are those of the TOML (`jaxbp.checker.arguments.read` shows its form), or of
its docstring, hints and defaults, or the first shapes with which it runs. A rule that has none is named as "not
exercised", which is no pass. ``--format github`` prints annotations of the lines where the rules are written.

**In pytest and Hypothesis.** The fixture ``check_gradient`` is `jaxbp.check` as an assertion (`jaxbp.pytest_plugin`).
`jaxbp.checker.strategies` draws points and cotangents with ties, zeros, huge and tiny numbers for tests of your own.

**How good it is.** Level "fast" catches 195 of 195 wrong rules of 24 kinds (`tests/wrong_rules.py`), where 75 of 183
were caught before points, shapes and dtypes were searched. It accuses none of 288 right ones: their right twins, and 93
in awkward styles (`tests/right_rules.py`). Of 87 wrong rules and 48 right ones by an author who had not read it, it
caught 76 and accused 6 of 28 at first, now all but two and one of 48. A check takes a median of 1.7 processor seconds
with compilation, 9 of 10 less than 3.4; networks about 10, hundreds of operations up to 69. The 540 planted bugs, the
1,200 generated subjects and the rules of libraries were measured in full before points were searched, in samples since
(`experiments/results`). Not seen: a psum too many on a mesh of one device, where it changes nothing; and what a rule
that computes in float32 does in float64, unless the example is in float64.
"""

from jaxbp.checker.check import check
from jaxbp.checker.data import inputs
from jaxbp.checker.report import CheckFailed, Report, Row

__all__ = ["CheckFailed", "Report", "Row", "check", "inputs"]
