"""Tasks without a model, for workers that start in a moment: no heavy import."""

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alphaquant.errors import StoreError


def open_nothing() -> Any:
    """In the place of a model."""
    return "model"


def open_badly() -> Any:
    raise StoreError("the model is damaged; mend it")


@dataclass(frozen=True)
class FakeTask:
    """Notes that it ran, does as its name says, and gives its number.

    Attributes:
        number: its result.
        folder: where it notes each time that it begins.
        deed: what it does; with `once` before it, when it is run first only.
        seconds: how long it works, asleep.
        is_small: whether it was made smaller.
    """

    number: int
    folder: Path
    deed: str = ""
    seconds: float = 0.0
    is_small: bool = False

    @property
    def name(self) -> str:
        return f"task {self.number}"

    def run(self, model_map: Any) -> Any:
        assert model_map == "model"
        n_before = len(list(self.folder.glob(f"{self.number}-*")))
        (self.folder / f"{self.number}-{n_before}-{os.getpid()}").touch()
        time.sleep(self.seconds)
        deed = self.deed.removeprefix("once ")
        if deed and (deed == self.deed or not n_before):
            getattr(self, deed)()
        return (self.number, self.is_small)

    def smaller(self) -> "FakeTask":
        return replace(self, is_small=True)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(self) -> None:
        time.sleep(600)

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def run_out(self) -> None:
        if not self.is_small:
            raise MemoryError

    def fail(self) -> None:
        raise StoreError(f"file {self.number} is damaged; delete it")

    def err(self) -> None:
        raise KeyError("no such thing")

    def speak(self) -> None:
        print("a library prints", flush=True)
        os.system("echo and so does a program")

    def begun(self) -> int:
        """How often it was begun."""
        return len(list(self.folder.glob(f"{self.number}-*")))
