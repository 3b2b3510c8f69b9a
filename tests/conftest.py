"""The environment of every test: no network, quiet libraries, one thread unless told otherwise.

Test tensors are tiny: a second thread gains nothing, and on shared cores it made tests 15 times
slower.

Set before any test module is imported, because torch and transformers read it at import.
"""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "NO_COLOR": "1",
}
