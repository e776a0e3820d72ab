"""Run the programs of an interpreted kernel in turns, so that one may wait for another."""

import inspect
import math
import random
import threading
from typing import Any

from triton.runtime import interpreter


class Together:
    """A kernel's function that changes to another program at every atomic operation.

    Triton's interpreter calls a kernel program by program, each to its end. This one takes the
    calls down, and runs all of them when the last one comes: one at a time, in random order.
    """

    def __init__(self, fn: Any, seed: int = 0) -> None:
        self.fn, self.turns = fn, random.Random(seed)
        self.__name__, self.__globals__ = fn.__name__, fn.__globals__
        self.__signature__, self.__annotations__ = inspect.signature(fn), fn.__annotations__
        self.programs: list[_Program] = []
        self.changes = 0

    def __call__(self, **arguments: Any) -> None:
        builder = interpreter.interpreter_builder
        self.programs.append(_Program(self.fn, builder.grid_idx, arguments))
        if len(self.programs) < math.prod(builder.grid_dim):
            return
        while self.programs:
            program = self.turns.choice(self.programs)
            builder.set_grid_idx(*program.index)
            if program.goes_on():
                self.changes += 1
            else:
                self.programs.remove(program)


class _Program(threading.Thread):
    current: "_Program | None" = None

    def __init__(self, fn: Any, index: tuple[int, ...], arguments: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.fn, self.index, self.arguments = fn, index, arguments
        self.turn, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.waits = False

    def run(self) -> None:
        self.turn.acquire()
        try:
            self.fn(**self.arguments)
        except BaseException as error:  # handed on to the thread that runs the test
            self.error = error
        self.back.release()

    def goes_on(self) -> bool:
        """Run until the next atomic operation; return whether there is one."""
        if self.ident is None:
            self.start()
        _Program.current, self.waits = self, False
        self.turn.release()
        self.back.acquire()
        _Program.current = None
        if self.error is not None:
            raise self.error
        return self.waits

    def wait(self) -> None:
        self.waits = True
        self.back.release()
        self.turn.acquire()


def patch(monkeypatch: Any, *kernels: Any) -> list[Together]:
    """Let these kernels' programs run in turns until the test's end."""
    builder = type(interpreter.interpreter_builder)
    atomic = builder.create_atomic_rmw

    def create_atomic_rmw(self: Any, *arguments: Any) -> Any:
        if _Program.current is not None:
            _Program.current.wait()
        return atomic(self, *arguments)

    monkeypatch.setattr(builder, "create_atomic_rmw", create_atomic_rmw)
    found = [Together(kernel.rewrite()) for kernel in kernels]
    for kernel, together in zip(kernels, found, strict=True):
        monkeypatch.setattr(kernel, "rewrite", lambda together=together: together)
    return found
