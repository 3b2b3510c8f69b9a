"""AlphaQuant: mixed-precision quantization of Mixture-of-Experts language models by search.

The public names are loaded on first use, so that `import alphaquant` and `--help` need neither
torch nor optuna:

    run_search   search formats for a model under a budget
    quantize     write the packed checkpoint of a configuration
    load         load a packed checkpoint
    evaluate     measure a model, usually against its unquantized reference

`run_search` is not called `search`, because `alphaquant.search` is the package of search
algorithms: importing it would replace the function.

`from_pretrained` of transformers loads packed checkpoints once this package is imported, before or
after transformers; see `alphaquant.import_hook`.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from alphaquant.import_hook import after_import

__all__ = ["__version__", "evaluate", "load", "quantize", "run_search"]

_TARGETS = {
    "run_search": "alphaquant.studies.runner:search",
    "quantize": "alphaquant.studies.quantize:quantize",
    "load": "alphaquant.quant.checkpoint:load",
    "evaluate": "alphaquant.studies.evaluate:evaluate",
}

after_import("transformers.quantizers.auto", "alphaquant.quant.transformers_plugin:register")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("aq-search")
    if name not in _TARGETS:
        raise AttributeError(f"module 'alphaquant' has no attribute {name!r}")
    module, _, attribute = _TARGETS[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
