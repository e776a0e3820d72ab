"""The end of a command: an exception becomes one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import typer

from fastsiam.device import UnavailableError
from fastsiam.text.files import DataError

WRONG_USE, BAD_DATA, ENVIRONMENT = 2, 3, 4
INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143  # 128 and the signal's number
EXIT_CODES = (
    "Exit codes: 0 done; 2 wrong use (an option, a run folder that is not empty); 3 bad data (a "
    "file that is missing, damaged or out of range); 4 environment (a package, device or backend "
    "that this machine lacks, a disk that cannot be written); 130 interrupted; 141 nobody reads "
    "the output; 143 terminated."
)


class Terminated(BaseException):
    """SIGTERM came. Like Ctrl-C it unwinds the stack, which removes half-written files."""


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn exceptions of the library, and SIGTERM, into one line and an exit code."""
    try:
        with _sigterm_raises():
            yield
        return
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted"
    except Terminated:
        code, message = TERMINATED, "terminated"
    except DataError as error:
        code, message = BAD_DATA, str(error)
    except BrokenPipeError:
        # as `head` leaves it: not worth a word. Python flushes once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        code, message = ENVIRONMENT, f"{named}{error.strerror or error}"
    except (ImportError, UnavailableError, torch.OutOfMemoryError) as error:
        code, message = ENVIRONMENT, str(error)
    except (ValueError, TypeError, NotImplementedError) as error:
        code, message = WRONG_USE, str(error)
    except (MemoryError, RuntimeError) as error:
        # PyTorch has no class of its own for a CPU out of memory
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        code, message = ENVIRONMENT, "out of memory; train with lower --batch-size or --hidden-size"
    lines = filter(None, map(str.strip, message.splitlines()))
    typer.echo(f"fastsiam: {' '.join(lines)}", err=True)
    raise typer.Exit(code)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Raise Terminated where SIGTERM would end the process as it stands; only the first one acts.

    Handlers belong to the main thread, and a caller who ignores the signal goes on doing so.
    """

    def terminate(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # the clean-up must end
        raise Terminated

    before = signal.getsignal(signal.SIGTERM)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or before in (None, signal.SIG_IGN):
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
