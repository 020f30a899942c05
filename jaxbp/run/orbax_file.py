"""What Orbax's checkpoints hold: one file, written by the thread that saves. Importing this imports Orbax.

Orbax's handler of arrays writes each one in a task of its own. When the disk fills, the first one to fail ends the
event loop that the others still report to, and their tracebacks are printed by threads that nobody can wait for.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from jaxbp.run.checkpoint import FILE


class Handler(ocp.CheckpointHandler):  # type: ignore[misc]
    """Orbax makes a folder with a temporary name, this writes the file in it, and Orbax gives the folder its name."""

    def save(self, directory: os.PathLike[str], args: "Save") -> None:
        """Writes the file and has it on disk; OSError where it can't be."""
        with open(Path(directory) / FILE, "wb", buffering=0) as file:
            data = memoryview(safetensors.numpy.save(dict(args.arrays)))
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())

    def restore(self, directory: os.PathLike[str], args: object) -> None:
        """Not used: `safetensors` reads the file without Orbax."""
        raise NotImplementedError


@ocp.args.register_with_handler(Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class Save(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """The arrays by their names."""

    arrays: Mapping[str, np.ndarray]


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A new folder with the arrays: all of it or, when the process is killed, nothing of this name.

    In a run of several processes the first one calls this, alone.
    """
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    with ocp.Checkpointer(Handler(), multiprocessing_options=alone) as checkpointer:
        checkpointer.save(path.absolute(), args=Save(arrays))
