"""What a compiled Triton kernel is made of, read from its cubin by tools that triton brings."""

import importlib
import re
import subprocess
import tempfile


def disassemble(cubin: bytes, option: str) -> str:
    """What `cuobjdump` prints of a cubin.

    Args:
        cubin: as in `compiled.asm["cubin"]`.
        option: `-sass` for the instructions, `-res-usage` for registers and stack.
    """
    tool = importlib.import_module("triton").knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, check=True)
    return (done.stdout + done.stderr).decode()


def main_loop(sass: str) -> list[str]:
    """Instructions, without their predicates, of the longest loop that multiplies.

    Args:
        sass: as `disassemble` gives it.

    Returns:
        The instructions between a jump backwards and where it goes; empty without such a loop.
    """
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d\s+)?([^;]*?)\s*;", sass)
    code = [(int(address, 16), text) for address, text in found]
    best: list[str] = []
    for address, text in code:
        jump = re.match(r"BRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            loop = [t for a, t in code if int(jump[1], 16) <= a <= address]
            if any("GMMA" in t for t in loop) and len(loop) > len(best):
                best = loop
    return best
