"""Load a model in a process whose memory another one watches; for `test_peak_memory.py`.

    python peak_memory.py mixed SMALL.yaml FILE.yaml
    python peak_memory.py quantized SMALL FOLDER

The small one is loaded first, so that everything is imported when the other one is. Prints `warm`
between the two, and the bytes of anonymous memory at the end, while the model is there.
"""

import sys
from pathlib import Path
from typing import Any

from alphaquant.models.loading import load_model
from alphaquant.runtime.mixed.loader import load_mixed_precision


def load(kind: str, place: str) -> Any:
    """The model, in bfloat16."""
    if kind == "mixed":
        return load_mixed_precision(place, dtype="bfloat16").model
    return load_model(place, dtype="bfloat16", quantized=True)


def main() -> None:
    """Load both."""
    kind, small, large = sys.argv[1:]
    load(kind, small)
    print("warm", flush=True)
    model = load(kind, large)
    lines = Path("/proc/self/status").read_text().splitlines()
    print(sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")))
    del model


if __name__ == "__main__":
    main()
