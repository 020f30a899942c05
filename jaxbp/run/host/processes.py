"""Several processes of one run: all of them compute, the first one reads and writes the run folder and speaks.

On Slurm, Open MPI and Kubernetes JAX finds out who the others are. Whoever starts the processes in another way, as
`jaxbp launch` does, says it to each by JAX_COORDINATOR_ADDRESS (host:port of the first one), JAX_NUM_PROCESSES and
JAX_PROCESS_ID. A thread of each process meets those of the others every PERIOD seconds; one that does not come is lost,
and all of them end.
"""

import contextlib
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

from jaxbp.run.errors import Diverged, Lost, Stopped, UserError

NUMBERS = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # processes of a cluster's job
PERIOD, TIMEOUT = 5, 30  # seconds between two meetings of the watching threads, and for which they wait: longer than
# any other thread keeps them from running
PIECE = 2**26  # bytes that are handed round at a time: every device holds them
HEARTBEAT = 90  # seconds after which XLA itself gives a process up; the watching threads are to notice it first
MEETING = 300  # seconds for which the first meeting waits
HINT = "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say which, JAX_NUM_PROCESSES=1 says that none is"
LINGER = 2  # seconds for which the first process outlives the others: XLA aborts them when it is gone
SAID_ONCE = (UserError, Diverged, Stopped, KeyboardInterrupt)  # the same in all processes, or of the first one

T = TypeVar("T")


@contextlib.contextmanager
def joined(outcome: Callable[[BaseException], tuple[int, str]]) -> Iterator[None]:
    """This process as one of several, if it is one; `outcome` gives the exit status and the line for an exception.

    A process that ends badly does not return: it would wait for the others, which wait for it.

    Raises:
      UserError: the environment does not say who the others are, or they can't be reached.
    """
    if not _join():
        yield
        return
    stop = threading.Event()
    watch = threading.Thread(target=_watch, args=(stop, outcome), daemon=True)
    watch.start()
    try:
        with _without_gloo():
            _gather(0)  # the first exchange waits 30 s at most, the later ones for as long as it takes
            yield
        _gather(0)
    except BaseException as error:
        try:
            if isinstance(error, (Diverged, Stopped)):  # all raise it, and the first is the last to have written
                _gather(0)
            if isinstance(error, (ValueError, RuntimeError)) and re.search("gloo|nccl", str(error), re.IGNORECASE):
                time.sleep(PERIOD + 2 * TIMEOUT)  # another process did not come: the watching thread is to name it
            status, line = outcome(error)
        except BaseException:  # nobody expected it
            status, line = 1, traceback.format_exc()
        _end(status, line if leads() or not isinstance(error, SAID_ONCE) else "")
    stop.set()
    jax.distributed.shutdown()
    watch.join(TIMEOUT)


@contextlib.contextmanager
def _without_gloo() -> Iterator[None]:
    """Gloo, in C++, prints a line a group of devices to descriptor 1. It goes nowhere; Python has another one."""
    python = sys.stdout
    python.flush()
    with open(os.dup(1), "w", encoding=python.encoding, errors=python.errors) as own, open(os.devnull, "wb") as nowhere:
        own.reconfigure(line_buffering=own.isatty())
        os.dup2(nowhere.fileno(), 1)
        sys.stdout = own
        try:
            yield
        finally:
            own.flush()
            os.dup2(own.fileno(), 1)
            sys.stdout = python


def leads() -> bool:
    """Whether this is the first process, or the only one."""
    return jax.process_index() == 0


def on_all(work: Callable[[], T]) -> T:
    """What `work` returns, in each process; a UserError in any of them is raised in all."""
    if jax.process_count() == 1:
        return work()
    try:
        result, fault = work(), ""
    except UserError as error:
        fault = str(error)
    faults = _gather(fault)
    for number, text in enumerate(faults):
        if text:
            raise UserError(text if number == 0 else f"process {number} of {len(faults)}: {text}")
    return result


def from_first(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, which alone does it, in each; so is a UserError of it. Plain JSON."""
    found = on_first(work)
    return _gather(found)[0] if jax.process_count() > 1 else found  # type: ignore[return-value]


def broadcast(tree: Any, like: Any) -> Any:
    """The arrays of the first process in each of them, bit for bit; `like` has their shapes, others may give None."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental.multihost_utils import broadcast_one_to_all

    def one(like: Any, leaf: Any) -> np.ndarray:
        dtype = np.dtype(like.dtype)
        empty = np.zeros(like.size * dtype.itemsize, np.uint8)
        source = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) if leads() else empty
        pieces = [np.asarray(broadcast_one_to_all(source[i : i + PIECE])) for i in range(0, len(source), PIECE)]
        return np.concatenate([empty[:0], *pieces]).view(dtype).reshape(like.shape)

    leaves, structure = jax.tree.flatten(like)
    given = jax.tree.leaves(tree) if leads() else [None] * len(leaves)
    return jax.tree.unflatten(structure, [one(*pair) for pair in zip(leaves, given, strict=True)])


def on_first(work: Callable[[], T]) -> T | None:
    """What `work` returns in the first process, which alone does it; a UserError of it is raised in all."""
    return on_all(lambda: work() if leads() else None)


def first_then_others(work: Callable[[], T]) -> T:
    """What `work` returns in each process, in the first one before the others: what it downloads, they find."""
    first = on_first(work)
    rest = on_all(lambda: None if leads() else work())
    return first if leads() else rest  # type: ignore[return-value]


def largest(*values: int) -> tuple[int, ...]:
    """The largest of each value over the processes."""
    return values if jax.process_count() == 1 else tuple(max(column) for column in zip(*_gather(values), strict=True))


def _join() -> bool:
    """Whether there are several processes; then this one has met the others."""
    count, number = (os.environ.get(name) for name in NUMBERS)
    in_job = any(os.environ.get(name, "1") != "1" for name in COUNTS) or "JOB_COMPLETION_INDEX" in os.environ
    if count == "1" or (count is None and not in_job):
        return False
    if count is not None and not (count.isdecimal() and (number or "").isdecimal()):
        raise UserError(f"JAX_NUM_PROCESSES is {count!r} and JAX_PROCESS_ID is {number!r}; both have to be numbers")
    given = {} if count is None else {"num_processes": int(count), "process_id": int(number or "")}
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM and tells nobody here
    try:
        jax.distributed.initialize(
            cluster_detection_method="deactivate" if given else None,
            initialization_timeout=MEETING,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=TIMEOUT,
            **given,  # type: ignore[arg-type]
        )
        return jax.process_count() > 1
    except Exception as error:  # of JAX, and of the clients of clusters that it asks
        reason = " ".join(str(error).split())
        raise UserError(f"the other processes: {reason}; {HINT}") from error


def _watch(stop: threading.Event, outcome: Callable[[BaseException], tuple[int, str]]) -> None:
    """Meets the watching threads of the other processes until `stop`; ends this process when one does not come."""
    from jax._src import distributed  # JAX has no public meeting that ends after a time

    client, count = distributed.global_state.client, 0
    assert client is not None  # `_join` has met the others
    while not stop.wait(PERIOD):
        count += 1
        try:
            client.wait_at_barrier(f"jaxbp {count}", 1000 * TIMEOUT)
        except Exception as error:
            if not stop.is_set():
                _end(*outcome(Lost(_missing(str(error)))))


def _missing(message: str) -> str:
    """Who is named, a line each, by the error of a meeting."""
    names = re.findall(r"^(?:.*task:)?(\d+)$", message.partition("task names:")[2], re.MULTILINE)
    count = jax.process_count()
    if not names:
        return f"the other processes can't be reached: {message.partition(chr(10))[0]}"
    which = f"process {names[0]}" if len(names) == 1 else f"processes {', '.join(sorted(names, key=int))}"
    return f"{which} of {count} {'is' if len(names) == 1 else 'are'} gone"


def _end(status: int, line: str) -> None:
    if line:
        print(f"jaxbp: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(LINGER if leads() else 0)
    os._exit(status)


def _gather(value: T) -> list[T]:
    """The value of each process, in all of them: what JSON can hold."""
    from jax.experimental.multihost_utils import process_allgather

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.asarray(process_allgather(np.array([len(data)], np.int32))).ravel()
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(process_allgather(padded)).reshape(len(lengths), -1)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]
