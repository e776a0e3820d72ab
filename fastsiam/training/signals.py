"""Ctrl-C and SIGTERM as a question that is asked between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Collect SIGINT and SIGTERM instead of acting on them; the second SIGINT acts.

    One that nobody has asked for by the end acts then, as it would have without this.

    Handlers belong to the main thread: in another one nothing is collected.

    Yields:
        A function that returns the number of the first signal that came, or 0.
    """
    came: list[int] = []
    told = False

    def note(number: int, _frame: FrameType | None) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)

    def first() -> int:
        nonlocal told
        told = told or bool(came)
        return came[0] if came else 0

    in_main = threading.current_thread() is threading.main_thread()
    numbers = [signal.SIGINT, signal.SIGTERM] if in_main else []
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield first
    finally:
        for number, handler in before.items():
            # None: a handler that was not set from Python, which cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if came and not told:
        signal.raise_signal(came[0])
