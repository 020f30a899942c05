"""`jaxbp launch`."""

import argparse

from jaxbp.commands import Parser
from jaxbp.commands import run as single
from jaxbp.run.errors import UserError

HELP = """\
Starts N processes that train one network together, to try what a cluster will do:

  jaxbp launch -n 2 -- run configs/digits.toml --mesh.data 2

They find each other by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which are set for them; on a
machine with several GPUs each takes one. On Slurm, Open MPI or Kubernetes start `jaxbp run` itself in each process.
Ctrl-C and SIGTERM reach all of them. The exit status is that of the first process that ends badly."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """How many processes, and what each does."""
    parser.add_argument("-n", dest="processes", metavar="N", type=int, required=True, help="how many processes")
    parser.add_argument("command_line", metavar="-- run CONFIG …", nargs=argparse.REMAINDER, help="as for `jaxbp run`")


def run(options: argparse.Namespace) -> int:
    """Starts them; what is wrong with the config is said once, before."""
    from jaxbp.run.host import launch

    words = [word for i, word in enumerate(options.command_line) if (i, word) != (0, "--")]
    if words[:1] != ["run"]:
        raise UserError("launch: only a run can be several processes: jaxbp launch -n 2 -- run CONFIG …")
    parser = Parser(prog="jaxbp run", allow_abbrev=False, add_help=False)
    single.arguments(parser)
    one, overrides = parser.parse_known_args(words[1:])
    one.overrides = overrides
    single.configured(one)
    return launch.launch(options.processes, words)
