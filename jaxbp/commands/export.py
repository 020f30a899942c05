"""`jaxbp export`."""

import argparse
from pathlib import Path

from jaxbp.commands import start_jax

HELP = """\
Writes the trained network for other programs, and prints how they read it. Give it raw inputs: they are scaled inside.

.safetensors  the parameters of PyTorch's nn.Sequential; of a multi-layer perceptron
.onnx         for onnxruntime and others; of a multi-layer perceptron; needs the package onnx
.stablehlo    a compiled function for jax.export, of any network"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The run, where to write."""
    parser.add_argument("folder", metavar="RUN_DIR", type=Path, help="the folder of a finished run")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="its suffix, one of those above, names the format"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists; refused otherwise")


def run(options: argparse.Namespace) -> None:
    """Writes the file."""
    start_jax()
    from jaxbp.run.export import export

    export(options.folder, options.out, options.overwrite)
