"""Plans against what engines load: the mixes that they load wrong are refused by unit's name."""

import pytest

from alphaquant.errors import ConfigError
from alphaquant.exports.checker import check_plan, plan_problem, served_by
from alphaquant.models.mapping import map_model
from alphaquant.spaces.profiles import PROFILES
from alphaquant.spaces.units import Matrix
from alphaquant.testing.packed import Choice, plan_of, served_model

MODEL = served_model("qwen2_moe")
INVENTORY = map_model(MODEL).inventory
ENGINES = ("vllm", "sglang", "transformers")


def experts(choose: Choice) -> Choice:
    """Something for experts, int4 for all else."""
    return lambda m: choose(m) if m.kind == "expert" else "int4-g128"


def attention(choose: Choice) -> Choice:
    """Something for attention, int4 for all else."""
    return lambda m: choose(m) if m.kind == "attention" else "int4-g128"


def is_k(matrix: Matrix) -> bool:
    return matrix.projection == "k_proj"


MIXES: dict[str, tuple[Choice, str, str]] = {
    # what: the plan, the engines that load it, what the others say
    "one format": (lambda m: "int4-g128", "vllm sglang transformers", ""),
    "by layer": (
        experts(lambda m: "int8-g128" if m.layer else "int4-g128"),
        "vllm sglang",
        "model.layers.experts has int4-g128, int8-g128",
    ),
    "an fp8 expert among int8": (
        experts(lambda m: "fp8-e4m3-row" if m.expert == 2 else "int8-row"),
        "",
        "experts has fp8-e4m3-row, int8-row",
    ),
    "by projection": (
        experts(lambda m: "int8-g128" if m.projection == "down_proj" else "int4-g128"),
        "",
        "experts has int4-g128, int8-g128",
    ),
    "an expert with zero points": (
        experts(lambda m: "int4-g128-asym" if m.expert == 1 else "int4-g128"),
        "",
        "experts has int4-g128, int4-g128-asym",
    ),
    "experts with zero points": (experts(lambda m: "int4-g128-asym"), "vllm", "int4-g128-asym"),
    "experts in nvfp4": (experts(lambda m: "nvfp4"), "", "experts is nvfp4"),
    "experts in fp8 rows": (experts(lambda m: "fp8-e4m3-row"), "transformers", "is fp8-e4m3-row"),
    "experts as they are": (experts(lambda m: "bf16"), "vllm sglang", "experts is bf16"),
    "k in fp8 rows, q and v in int8 rows": (
        attention(lambda m: "fp8-e4m3-row" if is_k(m) else "int8-row"),
        "transformers",
        "qkv has fp8-e4m3-row, int8-row",
    ),
    "q, k, v in nvfp4": (attention(lambda m: "nvfp4"), "transformers", "qkv is nvfp4"),
    "linears with zero points": (attention(lambda m: "int3-g64-asym"), "vllm", "int3-g64-asym"),
    "shared gate and up that differ": (
        lambda m: "int8-g128" if m.kind == "shared" and m.projection == "up_proj" else "int4-g128",
        "transformers",
        "shared_expert.w13 has int4-g128, int8-g128",
    ),
}


@pytest.mark.parametrize("mix", MIXES)
def test_engines_load_a_mix_or_name_the_unit_that_they_do_not(mix: str) -> None:
    choose, loading, text = MIXES[mix]
    plan = plan_of(MODEL, choose)
    problems = {name: plan_problem(plan, INVENTORY, PROFILES[name]) for name in ENGINES}
    assert [name for name, problem in problems.items() if problem is None] == loading.split()
    for name, problem in problems.items():
        if problem is not None:
            assert text in problem
            with pytest.raises(ConfigError, match=f"--export x: .*search with --profile {name}"):
                check_plan(plan, INVENTORY, PROFILES[name], "x")
        else:
            check_plan(plan, INVENTORY, PROFILES[name], "x")


def test_what_each_engine_does_is_told_with_its_version_and_the_reason() -> None:
    plan = plan_of(MODEL, MIXES["by layer"][0])
    found = served_by(plan, INVENTORY, [PROFILES[name] for name in ENGINES], "x")
    assert found["vllm"].loads and "CPU engine" in found["vllm"].reason
    assert found["sglang"].loads and "not run" in found["sglang"].reason
    assert not found["transformers"].loads and "one format" in found["transformers"].reason
    assert found["transformers"].engine.startswith("transformers 5.23.0")
