"""`jaxbp launch`: a run in several processes of this machine."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from jaxbp.run.errors import UserError

GRACE = 50  # seconds that the other processes have to notice that one is gone
MOST = 64  # processes


def launch(count: int, arguments: Sequence[str]) -> int:
    """Runs `jaxbp ARGUMENTS` in 2 to MOST processes; the exit status of the first one that ends badly, or 0."""
    if not 1 < count <= MOST:
        raise UserError(f"launch: -n {count}; allowed: 2 to {MOST}")
    with _started(count, arguments) as children:
        first = _first_to_fail(children)
        if first is None:
            return 0
        status = children[first].returncode
        if status < 0:
            name = signal.Signals(-status).name
            print(f"jaxbp: process {first} of {count} was killed by {name}; the others end", file=sys.stderr)
        return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _started(count: int, arguments: Sequence[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes, each in a group of its own: Ctrl-C comes here alone and is passed on, as SIGTERM and SIGHUP are.

    The first signal lets them save, the second stops them, the third kills them.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    children: list[subprocess.Popen[bytes]] = []
    came: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        came.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number if len(came) < 3 else signal.SIGKILL)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for received, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(received, pass_on)
    try:
        for number in range(count):
            about = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number)}
            about |= {"JAX_COORDINATOR_BIND_ADDRESS": address}  # JAX would listen on every network
            environment = {"JAX_LOCAL_DEVICE_IDS": str(number)} | os.environ | about
            command = [sys.executable, "-m", "jaxbp", *arguments]
            children.append(subprocess.Popen(command, env=environment, process_group=0))
        yield children
        end = time.monotonic() + GRACE
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(end - time.monotonic(), 0))
    finally:
        for child in children:
            child.kill()  # nothing is left behind, whatever happened here
            child.wait()
        for received, handler in before.items():
            signal.signal(received, handler)


def _first_to_fail(children: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits until one has ended badly, or all have ended well."""
    while True:
        statuses = [child.poll() for child in children]
        for number, status in enumerate(statuses):
            if status:
                return number
        if None not in statuses:
            return None
        time.sleep(0.05)
