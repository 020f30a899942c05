"""The command `jaxbp`."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxbp import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from jaxbp.run.config import Config

RUN_HELP = """\
CONFIG is a TOML file; any of its keys can be overridden: --train.epochs 3. `jaxbp run CONFIG --help` lists them.

A run that was stopped goes on when the same command is given again, from its newest checkpoint: the newest folder of
runs/CONFIG, runs/CONFIG-2 … is taken if it is unfinished, or else the next one begun. --resume refuses to begin a new
run, --new to go on with one.

Exit status: 0 done, 2 bad input, 3 the loss became NaN or infinite, 4 another process of the run is gone,
130 Ctrl-C, 143 SIGTERM.
"""
LAUNCH_HELP = """\
Starts N processes that train one network together, to try what a cluster will do:

  jaxbp launch -n 2 -- run configs/digits.toml --mesh.data 2

They find each other by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which are set for them; on a
machine with several GPUs each takes one. On Slurm, Open MPI or Kubernetes start `jaxbp run` itself in each process.
Ctrl-C and SIGTERM reach all of them. The exit status is that of the first process that ends badly.
"""
CHECK_HELP = (
    "Proves the network of a config, or a function with a hand-written backward pass, against autodiff. Importing the "
    "named module is the only code it executes. Exit status: 0 all passed, 1 something failed or was not exercised, "
    "2 usage."
)
CHECK_RULES = {
    "gradient": "the function's hand-written gradient, if it has no custom rule",
    "value-and-grad": "the same, returning (value, gradient)",
    "reference": "the function that autodiff differentiates instead",
}

STUDY_HELP = """\
Per-sample gradients over a whole data set: a table with a row a sample, a summary by class, and
pictures beside the table.

RUN_DIR is studied with the parameters it trained; a CONFIG with those it would begin with. The loss is that of the
config without label smoothing. A row has the index in the split, label, prediction and loss, and for each quantity:

  squared_norms  the squared norm of the sample's gradient, over all parameters and by layer
  grand          the norm, GraNd; pictures: its histogram by class, the hardest and the easiest images
  el2n           the norm of the error, softmax − label; only for softmax_cross_entropy
  cosine         the cosine of the gradient with the mean gradient; picture: the mean cosine class by class
or, of the split as a whole, in the summary:
  noise_scale    tr Σ / |G|², in samples; picture: over training, if the run recorded it
  diversity      Σ ‖g‖² / ‖Σ g‖²
  coherence      ‖mean g‖² / mean ‖g‖²
  gram           picture: the eigenvalues of the Gram matrix of at most 1,000 samples, drawn at random
"""

BENCH_HELP = """\
Measures jaxbp against what one would use instead, in interleaved rounds of one run: a table for each kind of row with
ratio, quartiles and target, then the rows beyond their target. It needs a clone of the project.

  value_and_grad  time, bytes and compile seconds, beside jax.value_and_grad
  epoch           epochs of MNIST, beside Equinox and scikit-learn; with --peers PyTorch and torch.compile
  matmul          the share of the machine's own matmul peak
  persample       per-sample quantities, beside vmap(jax.grad); with --peers BackPACK, Opacus, jax-privacy and optax
  startup         the import, the first step, a whole run
  growth          time, bytes and compile seconds against batch, width, depth and parameters
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    0 done · 1 a check did not pass · 2 bad input, said in one line · 3 the loss became NaN or infinite · 4 another
    process of the run is gone · 130 Ctrl-C · 143 SIGTERM.
    """
    if importlib.util.find_spec("tyro") is None:
        return _fail("the command needs more packages than the library: pip install 'jaxbp[run]'", 2)
    from jaxbp.run.errors import UserError

    try:
        options, overrides = _parser().parse_known_args(arguments)
        if overrides and options.command is not _run:
            raise UserError(f"command line: unknown argument {overrides[0]!r}, see --help")
        return options.command(options, overrides) or 0
    except (Exception, KeyboardInterrupt) as error:
        status, line = _outcome(error)
        return _fail(line, status)


def _outcome(error: BaseException) -> tuple[int, str]:
    """The exit status and the line for an exception; one that nobody expected is raised again."""
    from jaxbp.run.errors import Diverged, Lost, Stopped, UserError

    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, Diverged):
        return 3, f"diverged: {error}; a smaller learning rate may help"
    if isinstance(error, Lost):
        return 4, f"{error}; the same command goes on from the newest checkpoint"
    if isinstance(error, Stopped):
        return 128 + error.signal, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; what was measured is in the run folder"
    if "RESOURCE_EXHAUSTED" in str(error):  # XLA's word for it
        reason = str(error).partition("\n")[0]
        return 2, f"out of memory: {reason}; smaller model.sizes or train.batch_size (study: --chunk) need less"
    raise error


class _Parser(argparse.ArgumentParser):
    """argparse prints its usage before an error; here an error is one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        from jaxbp.run.errors import UserError

        raise UserError(f"command line: {message}, see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxbp", description="Back-propagation by hand, in JAX.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"jaxbp {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = commands.add_parser(
        "run", help="train the network of a config", description=RUN_HELP, add_help=False, allow_abbrev=False
    )
    run.add_argument("config", metavar="CONFIG", nargs="?", help="a TOML file, such as configs/digits.toml")
    which = run.add_mutually_exclusive_group()
    which.add_argument("--resume", action="store_const", dest="how", const="resume", help="refuse to begin a new run")
    which.add_argument("--new", action="store_const", dest="how", const="new", help="begin a new run")
    run.set_defaults(command=_run, how="auto")

    launch = commands.add_parser(
        "launch",
        help="a run in several processes of this machine",
        description=LAUNCH_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    launch.add_argument("-n", dest="processes", metavar="N", type=int, required=True, help="how many processes")
    launch.add_argument("command_line", metavar="-- run CONFIG …", nargs=argparse.REMAINDER, help="as for `jaxbp run`")
    launch.set_defaults(command=_launch)

    predict = commands.add_parser("predict", help="apply a trained network to new data")
    predict.add_argument("run", metavar="RUN_DIR", help="the folder of a finished run")
    predict.add_argument(
        "--data", metavar="FILE.npz", required=True, help="its array x, (N, inputs), is read; raw inputs"
    )
    predict.add_argument("--out", metavar="FILE.csv", help="where to write the predictions; standard output by default")
    predict.set_defaults(command=_predict)

    check = commands.add_parser("check", help="prove a backward pass against autodiff", description=CHECK_HELP)
    check.add_argument("target", metavar="CONFIG|MODULE:FUNCTION", help="a TOML file, or package.module:function")
    check.add_argument("--inputs", metavar="SPEC", help="what the function takes: 'f32[8,128] i32[8]{0..9}'")
    check.add_argument("--wrt", metavar="I,J", help="arguments that the rule differentiates, from 0; by default all")
    for rule, text in CHECK_RULES.items():
        check.add_argument(f"--{rule}", metavar="MODULE:FUNCTION", help=text)
    check.add_argument("--level", choices=("fast", "full"), default="fast", help="how many points and probes")
    check.add_argument("--seed", type=int, default=0, help="of everything drawn")
    check.add_argument("--json", metavar="FILE", help="write the report as JSON too")
    check.set_defaults(command=_check)

    study = commands.add_parser(
        "study",
        help="per-sample gradients over a whole data set",
        description=STUDY_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    study.add_argument("source", metavar="RUN_DIR|CONFIG", help="the folder of a finished run, or a TOML file")
    study.add_argument("--quantities", metavar="NAME", nargs="+", help="which ones, see above; by default all that fit")
    study.add_argument("--split", metavar="train|test", default="train", help="train by default")
    study.add_argument(
        "--out",
        metavar="FILE",
        help="the table, .csv or .parquet; by default RUN_DIR/study_SPLIT.csv, or CONFIG_study_SPLIT.csv here",
    )
    study.add_argument(
        "--chunk", metavar="N", type=int, default=1000, help="samples at a time, bounds the memory; 1000 by default"
    )
    study.add_argument("--overwrite", action="store_true", help="replace files that exist; refused otherwise")
    study.set_defaults(command=_study)

    trace = commands.add_parser("trace", help="one sample through a trained network and back: a table and a figure")
    trace.add_argument("run", metavar="RUN_DIR", help="the folder of a finished run")
    trace.add_argument("--sample", metavar="N", type=int, required=True, help="its index in the split, from 0")
    trace.add_argument("--split", metavar="train|test", default="test", help="test by default")
    trace.add_argument("--out", metavar="FILE.png", help="the figure; by default RUN_DIR/trace_SPLIT_N.png")
    trace.add_argument("--overwrite", action="store_true", help="replace a figure that exists; refused otherwise")
    trace.set_defaults(command=_trace)

    bench = commands.add_parser(
        "bench",
        help="measure it against what one would use instead",
        description=BENCH_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("--only", metavar="NAME", nargs="+", default=[], help="which kinds of rows, see above")
    bench.add_argument("--quick", action="store_true", help="3 rounds, and not the slowest rows")
    bench.add_argument(
        "--peers", action="store_true", help="other libraries too, in environments made in .venv/peers (4 GB)"
    )
    bench.add_argument("--json", metavar="FILE.json", help="write the rows, and their picture beside it as .png")
    bench.set_defaults(command=_bench)

    data = commands.add_parser("data", help="list the data sets, import one from files at hand")
    actions = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = actions.add_parser("list", help="the data sets, their sizes and where they are")
    listing.set_defaults(command=_data_list)
    importing = actions.add_parser("import", help="take a data set from files instead of downloading it")
    importing.add_argument("name", metavar="NAME", help="mnist or fashion_mnist")
    importing.add_argument("path", metavar="PATH", help="a folder or archive with the four IDX files, gzipped or not")
    importing.set_defaults(command=_data_import)
    return parser


def _run(options: argparse.Namespace, overrides: list[str]) -> None:
    from jaxbp.run import loop
    from jaxbp.run.errors import UserError
    from jaxbp.run.host import processes
    from jaxbp.run.sweep import sweep

    config, path = _config(options, overrides), Path(options.config)
    with processes.joined(_outcome):
        try:
            (sweep if config.sweep.asked else loop).run(config, path.stem, _console(processes.leads()), options.how)
        except UserError as error:
            raise UserError(f"{path}{' and command line' if overrides else ''}: {error}") from None


def _config(options: argparse.Namespace, overrides: list[str]) -> "Config":
    """What is asked of `jaxbp run`."""
    from jaxbp.run import config as configs
    from jaxbp.run.errors import UserError

    if options.config is None:
        if set(overrides) & {"-h", "--help"}:
            configs.parse(configs.Config(), ["--help"], "jaxbp run CONFIG", RUN_HELP)
        raise UserError("command line: which config? For example: jaxbp run configs/digits.toml")
    path = Path(options.config)
    if overrides and path.suffix != ".toml" and not path.exists():
        raise UserError(f"command line: {path} is no config; it comes first: jaxbp run CONFIG {overrides[0]} …")
    return configs.read(path, overrides, RUN_HELP)


def _launch(options: argparse.Namespace, _: list[str]) -> int:
    from jaxbp.run.errors import UserError
    from jaxbp.run.host import launch

    arguments = [word for i, word in enumerate(options.command_line) if (i, word) != (0, "--")]
    run, overrides = _parser().parse_known_args(arguments)
    if run.command is not _run:
        raise UserError("launch: only a run can be several processes: jaxbp launch -n 2 -- run CONFIG …")
    _config(run, overrides)  # what is wrong with it is said once, here
    return launch.launch(options.processes, arguments)


def _predict(options: argparse.Namespace, _: list[str]) -> None:
    from jaxbp.run.predict import predict

    predict(Path(options.run), Path(options.data), Path(options.out) if options.out else None)


def _check(options: argparse.Namespace, _: list[str]) -> int:
    from jaxbp.checker.command import run

    return 0 if run(options, _console()) else 1


def _study(options: argparse.Namespace, _: list[str]) -> None:
    from jaxbp.run.study import study

    request = study.Request(
        Path(options.source),
        options.split,
        options.quantities,
        Path(options.out) if options.out else None,
        options.chunk,
        options.overwrite,
    )
    study.study(request, _console())


def _trace(options: argparse.Namespace, _: list[str]) -> None:
    from jaxbp.run.study import trace

    out = Path(options.out) if options.out else None
    trace.trace(trace.Request(Path(options.run), options.sample, options.split, out, options.overwrite), _console())


def _bench(options: argparse.Namespace, _: list[str]) -> None:
    from jaxbp.run.errors import UserError

    clone = Path(__file__).parents[1]
    if not (clone / "experiments" / "bench").is_dir():
        raise UserError("bench: needs a clone of the project: its benchmarks are no part of the installed package")
    sys.path.insert(0, str(clone))
    command = importlib.import_module("experiments.bench.command")
    command.run(options.only, options.quick, options.peers, Path(options.json) if options.json else None)


def _data_list(options: argparse.Namespace, _: list[str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from jaxbp.run import data

    table = Table()
    for column in data.DataRow._fields:
        table.add_column(column, justify="right" if column in ("samples", "inputs", "classes") else "left")
    for row in data.describe():
        table.add_row(
            *("" if value is None else f"{value:,}" if isinstance(value, int) else escape(value) for value in row)
        )
    _console().print(table)


def _data_import(options: argparse.Namespace, _: list[str]) -> None:
    from jaxbp.run import data

    print(f"{options.name} is in {data.import_files(options.name, Path(options.path))}")


def _console(speaks: bool = True) -> "Console":
    from rich.console import Console

    return Console(quiet=not speaks)


def _fail(message: str, status: int) -> int:
    print(f"jaxbp: {message}", file=sys.stderr)
    return status
