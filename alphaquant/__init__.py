"""AlphaQuant: mixed-precision quantization of Mixture-of-Experts language models by search.

The public names are loaded on first use, so that `import alphaquant` and `--help` need neither
torch nor optuna:

    search       search formats for a model under a budget: `alphaquant.search("4.25bits")`
    run_search   the same, of a `SearchSpec`
    plan_search  what it will take on this machine, of a `SearchSpec`
    quantize     write the packed checkpoint of a configuration, of a `QuantizeSpec`
    load         load a packed checkpoint
    evaluate     measure a model, usually against its unquantized reference, of an `EvaluateSpec`
    load_mixed_precision  one model from several checkpoints, of a mixed_precision YAML file; with
        `MixedPrecisionConfig`, `TrueMixedPrecisionLoader`, `replace_all_with_mixed_precision`

`alphaquant.search` is also the package of search algorithms. So that neither hides the other, the
package is made callable when it is imported; type checkers do not see that and know
`alphaquant.commands.api.search`, which is what it calls.

`from_pretrained` of transformers loads packed checkpoints once this package is imported, before or
after transformers; see `alphaquant.import_hook`.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any

from alphaquant.import_hook import after_import

__all__ = [
    "EvaluateSpec",
    "MixedPrecisionConfig",
    "QuantizeSpec",
    "SearchSpec",
    "TrueMixedPrecisionLoader",
    "__version__",
    "evaluate",
    "load",
    "load_mixed_precision",
    "plan_search",
    "quantize",
    "replace_all_with_mixed_precision",
    "run_search",
    "search",
]

_TARGETS = {
    "run_search": "alphaquant.commands.search:search",
    "plan_search": "alphaquant.commands.search:plan_search",
    "SearchSpec": "alphaquant.specs.search:SearchSpec",
    "quantize": "alphaquant.commands.quantize:quantize",
    "QuantizeSpec": "alphaquant.specs.quantize:QuantizeSpec",
    "load": "alphaquant.runtime.checkpoint:load",
    "evaluate": "alphaquant.commands.evaluate:evaluate",
    "EvaluateSpec": "alphaquant.specs.evaluate:EvaluateSpec",
    "MixedPrecisionConfig": "alphaquant.runtime.mixed.mapping_file:MixedPrecisionConfig",
    "TrueMixedPrecisionLoader": "alphaquant.runtime.mixed.loader:TrueMixedPrecisionLoader",
    "load_mixed_precision": "alphaquant.runtime.mixed.loader:load_mixed_precision",
    "replace_all_with_mixed_precision": (
        "alphaquant.runtime.mixed.loader:replace_all_with_mixed_precision"
    ),
}


class _SearchPackage(ModuleType):
    """The package of search algorithms, which can also be called."""

    def __call__(self, budget: str | None = None, **settings: Any) -> Any:
        """Search; see `alphaquant.commands.api.search`."""
        return import_module("alphaquant.commands.api").search(budget, **settings)


def make_search_callable() -> None:
    """Let the package `alphaquant.search` be called."""
    sys.modules["alphaquant.search"].__class__ = _SearchPackage


after_import("alphaquant.search", "alphaquant:make_search_callable")
after_import("transformers.quantizers.auto", "alphaquant.runtime.transformers_plugin:register")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("aq-search")
    if name == "search":
        return import_module("alphaquant.search")
    if name not in _TARGETS:
        raise AttributeError(f"module 'alphaquant' has no attribute {name!r}")
    module, _, attribute = _TARGETS[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
