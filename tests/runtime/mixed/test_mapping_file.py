"""`mixed_precision` files: round trips, and every mistake told before a model is looked at."""

from pathlib import Path

import pytest
import yaml

from alphaquant.errors import ConfigError
from alphaquant.runtime.mixed.mapping_file import PRECISIONS, MixedPrecisionConfig

DOCUMENTED = """
mixed_precision:
  fp16_path: "{root}/fp16"
  fp8_path: "{root}/fp8"
  gptq_int4_path: "{root}/gptq"
  awq_int4_path: "{root}/awq"
  weight_mapping:
    # linears
    "model.layers.0.self_attn.q_proj.weight": "fp8"
    "model.layers.0.self_attn.k_proj.weight": "gptq_int4"
    "model.layers.0.self_attn.v_proj.weight": "awq_int4"

    # experts
    "model.layers.0.mlp.experts.0.w13_weight": "fp8"
    "model.layers.0.mlp.experts.0.w2_weight": "gptq_int4"
  base_model_path: "{root}/base"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for name in ("fp16", "fp8", "gptq", "awq", "base"):
        (tmp_path / name).mkdir()
    path = tmp_path / "mix.yaml"
    path.write_text(DOCUMENTED.format(root=tmp_path))
    return path


def test_the_documented_file_is_read_and_written_back(file: Path, tmp_path: Path) -> None:
    """Capability 77."""
    config = MixedPrecisionConfig.from_yaml(file)
    assert config.base_model_path == tmp_path / "base"
    assert config.sources == {
        "fp16": tmp_path / "fp16",
        "fp8": tmp_path / "fp8",
        "gptq_int4": tmp_path / "gptq",
        "awq_int4": tmp_path / "awq",
    }
    assert config.weight_mapping["model.layers.0.mlp.experts.0.w2_weight"] == "gptq_int4"
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert MixedPrecisionConfig.from_yaml(again) == config


def test_relative_paths_start_at_the_file(file: Path, tmp_path: Path) -> None:
    file.write_text(DOCUMENTED.replace("{root}/", ""))
    assert MixedPrecisionConfig.from_yaml(file).sources["fp8"] == tmp_path / "fp8"


def test_every_documented_precision_has_a_path(file: Path, tmp_path: Path) -> None:
    paths = dict.fromkeys(PRECISIONS, tmp_path)
    mapping = {f"m.{name}.weight": name for name in PRECISIONS}
    assert MixedPrecisionConfig(tmp_path, paths, mapping).sources.keys() == set(PRECISIONS)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"fp8"\n    "model.layers.0.self_attn.k', '"fp9"\n    "model.layers.0.self_attn.k',
         "q_proj.weight is 'fp9', and there is no fp9_path; precisions with a path: fp16, fp8"),
        ('  gptq_int4_path: "{root}/gptq"\n', "", "there is no gptq_int4_path"),
        ("{root}/gptq", "{root}/gone", "gptq_int4_path is .*gone, which is no directory"),
        ("{root}/base", "{root}/gone", "base_model_path is .*gone, which is no directory"),
        ("fp8_path:", "fp8_paht:", "fp8_paht.*may have fp16_path"),
        ("base_model_path", "base_path", "it must have base_model_path and weight_mapping"),
        ("mixed_precision:", "mixed:", "the one key mixed_precision"),
        ('"gptq_int4"\n    "model.layers.0.self_attn.v', '4\n    "model.layers.0.self_attn.v',
         "paths are texts, and weight_mapping is an object"),
        ("  fp8_path:", "  fp8_path: {root}/fp8\n  fp8_path:", "'fp8_path' is there twice"),
        ("self_attn.k_proj", "self_attn.q_proj", "q_proj.weight' is there twice"),
        ("  weight_mapping:", "  weight_mapping: [", "cannot be read as YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_by_name(
    file: Path, tmp_path: Path, old: str, new: str, said: str
) -> None:
    """Capability 77: before any tensor is read."""
    assert old in DOCUMENTED
    file.write_text(DOCUMENTED.replace(old, new).format(root=tmp_path))
    with pytest.raises(ConfigError, match=said) as caught:
        MixedPrecisionConfig.from_yaml(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "mixed_precision: []", "1", "\x00"])
def test_what_is_no_such_file_is_told(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError):
        MixedPrecisionConfig.from_yaml(file)


def test_a_mapping_of_nothing_is_told(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no weight"):
        MixedPrecisionConfig(tmp_path, {}, {})


def test_yaml_that_would_run_code_is_refused(file: Path) -> None:
    file.write_text("mixed_precision: !!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        MixedPrecisionConfig.from_yaml(file)
    assert yaml.safe_load("a: 1") == {"a": 1}
