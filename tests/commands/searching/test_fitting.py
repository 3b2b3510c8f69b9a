"""`--fit`: from the memory of a GPU to a budget in bytes."""

from typing import Any

import pytest

from alphaquant.commands.search import plan_search
from alphaquant.commands.searching.fitting import fit_lines, fit_to, fitted
from alphaquant.errors import ConfigError
from alphaquant.progress import no_progress
from alphaquant.specs.search import SearchSpec
from alphaquant.testing.models import tiny_model

MIB = 2**20


def spec(**settings: Any) -> SearchSpec:
    return SearchSpec.of(**{"model": "demo", "fit": "24MiB", "context": 256, **settings})


def test_what_the_rest_leaves_is_the_budget() -> None:
    asked = spec(sequences=4)
    found, lines = fitted(asked, no_progress)
    budget = found.limits.budget
    assert budget.endswith("bytes") and 0 < int(budget.removesuffix("bytes")) < 24 * MIB
    for row in ("in 24MiB", "engine and reserve", "activations", "weights"):
        assert any(line.startswith(row) for line in lines), row
    # 4 layers, 2 * 256 numbers of 2 bytes, 4 sequences of 256 tokens: 4 MiB.
    (cache,) = (line for line in lines if line.startswith("cache, full attention"))
    assert " 4.0 " in cache and "4 layers x 4 x 256 tokens, bf16" in cache
    assert found.facts()["fit"] == "24MiB" and found.facts()["include"] == "head,embeddings"


def test_parts_add_up_to_the_memory() -> None:
    config = tiny_model("deepseek_v3").config
    limits = spec(profile="vllm", kv="fp8", reserve=0.1, context=100).limits
    found = fit_to(limits, config)
    parts = sum(part.n_bytes for part in found.cache)
    assert found.reserve + parts + found.activations + found.weights == found.total == 24 * MIB
    assert found.reserve == round(2.4 * MIB)
    (latents,) = found.cache
    assert latents.n_bytes == 2 * 100 * (16 + 8) * 1
    assert any("latent attention" in line and "fp8" in line for line in fit_lines(found, limits))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fit": "100kB"}, r"leaves nothing for weights \(engine and reserve .* MiB; cache"),
        ({"budget": "4bits"}, "--budget 4bits and --fit 24MiB: the second finds a budget"),
        ({"kv": "fp8"}, "--kv fp8 with --profile any: caches in fp8 are counted for vllm"),
        ({"fit": None, "context": None}, "no budget; give one such as 4.25bits"),
        ({"context": None}, "fit and context go together"),
        ({"context": 10**6}, "the model takes"),
    ],
)
def test_other_requests_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_search(spec(**settings))
