"""`jaxbp predict`."""

import argparse
from pathlib import Path

from jaxbp.commands import start_jax
from jaxbp.run.errors import UserError

HELP = """\
Writes a row a sample: its index, or the file of an image, then the predicted class, or the numbers in the units of the
targets. With --prompt a network that was trained on a text goes on with it."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The run, the data, where to write."""
    parser.add_argument("folder", metavar="RUN_DIR", help="the folder of a finished run")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data",
        metavar="PATH",
        type=Path,
        help="an .npz with raw inputs x, a table with the columns of the run's, a folder of images or with x.npy",
    )
    source.add_argument("--prompt", metavar="TEXT", help="the beginning of a text")
    parser.add_argument(
        "--length", type=int, default=500, help="with --prompt: how many characters follow; 500 by default"
    )
    parser.add_argument("--seed", type=int, default=0, help="with --prompt: another seed, another text")
    parser.add_argument(
        "--out", metavar="FILE.csv", type=Path, help="where to write the predictions; standard output by default"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--probabilities",
        action="store_const",
        const="probabilities",
        dest="certainty",
        help="with --data: a probability for each class, as the network gives it",
    )
    how.add_argument(
        "--laplace",
        action="store_const",
        const="laplace",
        dest="certainty",
        help="with --data: a probability for each class, or a standard deviation, by Laplace's approximation",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists; refused otherwise")


def run(options: argparse.Namespace) -> None:
    """Applies the network."""
    start_jax()
    from jaxbp.run.predict import goes_on, predict

    if options.prompt is not None:
        if options.out is not None:
            raise UserError("--out: it is for --data, a text goes to standard output")
        if options.certainty is not None:
            raise UserError(f"--{options.certainty}: it is for --data")
        print(goes_on(Path(options.folder), options.prompt, options.length, options.seed))
        return
    predict(Path(options.folder), options.data, options.out, options.overwrite, options.certainty)
