"""SIGTERM and Ctrl-C while a run trains: the first is noted, so that the epoch can end; a second acts at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """`signal` is the first that came; None before."""

    signal: int | None = None


@contextlib.contextmanager
def deferred(speaks: bool = True) -> Iterator[Stop]:
    """Takes both signals over, where they are not ignored; outside the main thread none can be."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, _: FrameType | None) -> None:
        stop.signal = number
        _restore(before)
        with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
            if speaks:
                os.write(sys.stdout.fileno(), b"\nstopping after this epoch, to save it; once more stops at once\n")

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield stop
    finally:
        _restore(before)


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
