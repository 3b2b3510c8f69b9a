"""A peer's uniform quantization for `real.py`, in a process of its own: prints a row as JSON.

python benchmarks/real_peer.py MODEL CALIBRATION HELDOUT FORMAT N N LENGTH PYTHON CACHE METHOD
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from quantizer import Peers, prepare

from alphaquant.specs.texts import TextSpec


def main() -> None:
    """Run the peer on the windows that the product reads, and measure its weights."""
    model, calibration, heldout, format_name, n_calibration, n_heldout, length = sys.argv[1:8]
    python, cache, method = sys.argv[8:]
    data = TextSpec(
        calibration=calibration,
        heldout=heldout,
        calibration_samples=int(n_calibration),
        heldout_samples=int(n_heldout),
        seq_len=int(length),
    )
    with tempfile.TemporaryDirectory(prefix="alphaquant-real-") as scratch:
        prepare(model, Path(scratch), data)
        row = Peers(python, Path(cache), model, Path(scratch)).measure(method, format_name)
    print(json.dumps(asdict(row)))


if __name__ == "__main__":
    main()
