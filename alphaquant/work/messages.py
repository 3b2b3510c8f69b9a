"""What workers and driver say to each other, and how it goes over a socket.

Messages are pickled plainly: that of `Connection.send` would pass tensors as open files, which
only processes of one family can take.
"""

import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

BEAT_SECONDS = 2.0
"""Between two signs of life."""


@dataclass(frozen=True)
class Ready:
    """The model is open.

    Attributes:
        error: why it is not; None where it is.
    """

    error: BaseException | None = None


@dataclass(frozen=True)
class Beat:
    """A sign of life.

    Attributes:
        seconds: of processor time so far, without the beats.
    """

    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        kind: `done`; `error` of the task itself; `memory` ran out; `lost` with its worker.
        value: the result, or the exception of an `error`.
        reason: of the other two, a clause: `process 12 ended with signal 9`.
        seconds: processor time that it took.
    """

    kind: Literal["done", "error", "memory", "lost"]
    value: Any = None
    reason: str = ""
    seconds: float = 0.0


def send(line: "Connection[bytes, bytes]", message: Any) -> None:
    """Send a message.

    Raises:
        OSError: the other end is gone.
    """
    line.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def receive(line: "Connection[bytes, bytes]") -> Any:
    """The next message.

    Raises:
        EOFError: the other end is gone.
        OSError: likewise.
    """
    return pickle.loads(line.recv_bytes())
