"""What Triton kernels are compiled to: launches that end after the compiler, and their cubins.

On a claimed GPU the host functions of the kernels run on CPU tensors, and what Triton binds,
specializes and compiles is what a GPU would be given. Nothing is computed: results hold anything.
It needs a process in which kernels are not interpreted. Cubins are read by tools that triton
brings.
"""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

_LEAST_WITH_PTX = 90
_ASKED = ("linear.product_triton", "moe.products_triton")
"""Modules that ask whether a device has the instructions of the PTX bodies."""


@dataclass(frozen=True)
class Launched:
    """A launch that ended after the compiler.

    Attributes:
        kernel: its name.
        binary: what Triton compiled for it.
        is_new: whether no launch before it, on this claimed GPU, had this binary.
    """

    kernel: str
    binary: Any
    is_new: bool


@contextmanager
def claimed_gpu(capability: int = 90) -> Iterator[list[Launched]]:
    """Compile launches for a GPU that need not be there, and end them then.

    Args:
        capability: 90 for sm_90.

    Yields:
        The launches so far, in their order; whoever reads them may clear them.
    """
    jit = importlib.import_module("triton.runtime.jit")
    driver = importlib.import_module("triton.runtime").driver
    run, has_ptx = jit.JITFunction.run, capability >= _LEAST_WITH_PTX
    launched, known = list[Launched](), set[int]()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = run(self, *args, grid=grid, warmup=True, **options)
        launched.append(Launched(self.fn.__name__, made, id(made) not in known))
        known.add(id(made))
        return made

    with ExitStack() as patches:
        # what set_active sets; reset_active would look for a real GPU
        patches.enter_context(mock.patch.object(driver, "_active", _ClaimedDriver(capability)))
        patches.enter_context(mock.patch.object(jit.JITFunction, "run", compile_only))
        for name in _ASKED:
            module = importlib.import_module(f"alphaquant.kernels.{name}")
            patches.enter_context(mock.patch.object(module, "can_use_asm", lambda x: has_ptx))
        yield launched


def registers_of(binary: Any) -> int:
    """Registers per thread.

    Args:
        binary: of a `Launched`.
    """
    return _usage(binary, "REG")


def spilled_bytes_of(binary: Any) -> int:
    """Bytes of stack per thread, which is where registers are spilled to."""
    return _usage(binary, "STACK")


def shared_bytes_of(binary: Any) -> int:
    """Bytes of shared memory per program."""
    return int(binary.metadata.shared)


def instructions_of(binary: Any) -> list[str]:
    """All instructions, without their predicates: `LDG.E.128 R4, desc[UR6][R2.64]`."""
    return [text for _, text in _code(_disassemble(binary, "-sass"))]


def main_loop_of(binary: Any) -> list[str]:
    """Instructions of the longest loop that multiplies, as `main_loop` gives them."""
    return main_loop(_disassemble(binary, "-sass"))


def main_loop(sass: str) -> list[str]:
    """Instructions, without their predicates, of the longest loop that multiplies.

    Args:
        sass: as `cuobjdump -sass` prints it.

    Returns:
        The instructions between a jump backwards and where it goes; empty without such a loop.
    """
    code = _code(sass)
    best: list[str] = []
    for address, text in code:
        jump = re.match(r"BRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            loop = [t for a, t in code if int(jump[1], 16) <= a <= address]
            if any("GMMA" in t for t in loop) and len(loop) > len(best):
                best = loop
    return best


def _code(sass: str) -> list[tuple[int, str]]:
    """Addresses and instructions, without their predicates."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d\s+)?([^;]*?)\s*;", sass)
    return [(int(address, 16), text) for address, text in found]


class _ClaimedDriver:
    """What Triton asks of a GPU before it compiles."""

    binary_ext = "cubin"

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        """What is compiled for."""
        compiler = importlib.import_module("triton.backends.compiler")
        return compiler.GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """A number under which binaries are kept: one per capability."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        return 0


def _usage(binary: Any, name: str) -> int:
    (number,) = re.findall(rf"{name}:(\d+)", _disassemble(binary, "-res-usage"))
    return int(number)


def _disassemble(binary: Any, option: str) -> str:
    """What `cuobjdump` prints: `-sass` instructions, `-res-usage` registers and stack."""
    tool = importlib.import_module("triton").knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, check=True)
    return (done.stdout + done.stderr).decode()
