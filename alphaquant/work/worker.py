"""A worker process: opens the model, runs the tasks that it is sent, and shows signs of life.

`python -m alphaquant.work.worker FD` with the descriptor of a socket, over which pickled messages
go: to it the function that opens the model, then tasks, then None; from it `Ready` once, a `Beat`
every few seconds, an `Outcome` for every task. Nothing is written to standard output, which
belongs to the command. The process ends when the other end of the socket is gone.

A sign of life is processor time: a beat says how much was spent by everything but the beating
thread itself, so a process that waits for ever is told from one that computes.
"""

import logging
import os
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from alphaquant.errors import AlphaQuantError
from alphaquant.work.messages import BEAT_SECONDS, Beat, Outcome, Ready, receive, send


class _Line:
    """The socket, for two threads that send."""

    def __init__(self, connection: "Connection[bytes, bytes]") -> None:
        self._connection, self._lock = connection, threading.Lock()

    def send(self, message: Any) -> None:
        """Send a message; end the process where nobody is left to read it."""
        try:
            with self._lock:
                send(self._connection, message)
        except OSError:
            os._exit(1)

    def receive(self) -> Any:
        """The next message; None where nobody is left to send one."""
        try:
            return receive(self._connection)
        except (EOFError, OSError):
            return None


def serve(connection: "Connection[bytes, bytes]") -> None:
    """Open the model and run tasks until there are no more."""
    line = _Line(connection)
    threading.Thread(target=_beat, args=(line,), daemon=True).start()
    try:
        model_map = line.receive()()
    except Exception as error:
        line.send(Ready(_portable(error)))
        return
    line.send(Ready())
    while (task := line.receive()) is not None:
        line.send(outcome_of(task, model_map))


def outcome_of(task: Any, model_map: Any) -> Outcome:
    """Run a task."""
    started = time.process_time()
    try:
        result = task.run(model_map)
        return Outcome("done", result, seconds=time.process_time() - started)
    except Exception as error:
        if is_lack_of_memory(error):
            return Outcome("memory", reason=f"process {os.getpid()} ran out of memory")
        return Outcome("error", _portable(error))


def is_lack_of_memory(error: Exception) -> bool:
    """Whether an exception says that there is too little memory, of the machine or a GPU."""
    if isinstance(error, MemoryError):
        return True
    # torch.OutOfMemoryError of a GPU, and what the allocator of the CPU says.
    is_of_gpu = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, RuntimeError) and (is_of_gpu or "DefaultCPUAllocator" in str(error))


def _portable(error: Exception) -> BaseException:
    """An exception that can be sent; ours as they are, others with their traceback."""
    if isinstance(error, AlphaQuantError | OSError):
        return error
    text = "".join(traceback.format_exception(error))
    last = traceback.format_exception_only(error)[-1].strip()
    return RuntimeError(f"{last} (in a worker)\n{text}")


def _beat(line: _Line) -> None:
    while True:
        line.send(Beat(time.process_time() - time.thread_time()))
        time.sleep(BEAT_SECONDS)


def main() -> None:
    """Serve at the socket of the first argument."""
    os.dup2(2, 1)  # libraries that print do so on standard error
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(message)s")
    for name in ("torchao", "torch.utils._pytree"):  # warn of what the driver would warn of
        logging.getLogger(name).setLevel(logging.ERROR)
    with Connection(int(sys.argv[1])) as connection:
        serve(connection)
    os._exit(0)  # threads of pools would hold the process up


if __name__ == "__main__":
    main()
