"""What llama.cpp calls an architecture, and what it computes whatever the configuration says.

Its graphs read few fields of a configuration: whether routing weights are normalized, which
function gates an expert and more is fixed by the architecture. A model that asks for something
else would load and compute another thing, so such fields are stated here and refused.

Sources: the conversion rules and graphs of llama.cpp, release b11549; each architecture is run by
llama.cpp in the tests.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from alphaquant.errors import ConfigError

_LITE = (26, 27)
"""Layers of DeepSeek-V2-Lite and of another model without `q_lora_rank`."""

_LAYERS_OF_27B = 62
"""Of the Gemma 3 whose attention llama.cpp scales by hidden / heads, not by the head's width."""

_YARN = {"beta_fast": 32.0, "beta_slow": 1.0}
"""What llama.cpp takes whatever a file says (with 16 and 2 its logits are off by 0.3)."""

_NONE = (None,)
_PLAIN_ROPE = ("default", "linear")


@dataclass(frozen=True)
class Dialect:
    """An architecture as llama.cpp has it.

    Attributes:
        name: what its files call it.
        is_permuted: whether the halves of each head's queries and keys are interleaved, as files
            for rotations of neighbouring numbers have them.
        norm_shift: what is added to norms.
        ropes: kinds of rotary embedding whose scaling is carried over.
        full_every: of so many layers the last attends to everything, the others within a window; 0
            where there is no such rule.
        needs: field of the configuration -> the values for which both compute the same.
    """

    name: str
    is_permuted: bool = False
    norm_shift: float = 0.0
    ropes: tuple[str, ...] = _PLAIN_ROPE
    full_every: int = 0
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_SILU = {"hidden_act": ("silu",)}
_FULL_ATTENTION = {"use_sliding_window": (False, None)}
_LLAMA = {**_SILU, "attention_bias": (False, None), "mlp_bias": (False, None)}

DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        "llama": Dialect("llama", is_permuted=True, ropes=(*_PLAIN_ROPE, "llama3"), needs=_LLAMA),
        "mixtral": Dialect("llama", is_permuted=True, needs={**_SILU, "sliding_window": _NONE}),
        "olmoe": Dialect(
            "olmoe",
            needs={
                **_SILU,
                "norm_topk_prob": (False,),
                "clip_qkv": _NONE,
                "attention_bias": (False,),
            },
        ),
        "qwen2": Dialect("qwen2", needs={**_SILU, **_FULL_ATTENTION}),
        "qwen2_moe": Dialect(
            "qwen2moe",
            needs={
                **_SILU,
                **_FULL_ATTENTION,
                "norm_topk_prob": (False,),
                "decoder_sparse_step": (1,),
                "mlp_only_layers": ([], None),
            },
        ),
        "qwen3": Dialect("qwen3", needs={**_SILU, **_FULL_ATTENTION, "attention_bias": (False,)}),
        "qwen3_moe": Dialect(
            "qwen3moe",
            needs={
                **_SILU,
                **_FULL_ATTENTION,
                "attention_bias": (False,),
                "norm_topk_prob": (True,),
                "decoder_sparse_step": (1,),
                "mlp_only_layers": ([], None),
            },
        ),
        "deepseek_v2": Dialect(
            "deepseek2",
            ropes=(*_PLAIN_ROPE, "yarn"),
            needs={
                **_SILU,
                "attention_bias": (False,),
                "topk_method": ("greedy",),
                # transformers does not normalize, whatever it says; llama.cpp does
                "norm_topk_prob": (False,),
            },
        ),
        "gpt_oss": Dialect(
            "gpt-oss",
            ropes=(*_PLAIN_ROPE, "yarn"),
            full_every=2,
            needs={"attention_bias": (True,), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
        ),
        "gemma3_text": Dialect(
            "gemma3",
            norm_shift=1.0,
            full_every=6,
            needs={
                "hidden_activation": ("gelu_pytorch_tanh",),
                "attention_bias": (False,),
                "attn_logit_softcapping": _NONE,
                "use_bidirectional_attention": (False, None),
            },
        ),
    }
)
"""What is written, by transformers' `model_type`."""


def find_dialect(config: Any) -> Dialect:
    """The dialect of a model.

    Args:
        config: the model's configuration, of transformers.

    Raises:
        ConfigError: the architecture is not written, or llama.cpp would compute something else.
    """
    kind = str(getattr(config, "model_type", ""))
    if kind not in DIALECTS:
        raise ConfigError(
            f"--export gguf: the architecture {kind} is not written; {', '.join(DIALECTS)} are: "
            "leave --export out for our own checkpoint"
        )
    dialect = DIALECTS[kind]
    for name, possible in dialect.needs.items():
        value = getattr(config, name, possible[0])
        if value not in possible:
            raise ConfigError(
                f"--export gguf: {name} is {value!r} in this {kind} model, and llama.cpp computes "
                f"with {' or '.join(map(repr, possible))}; leave --export out for our own "
                "checkpoint"
            )
    _check_shapes(dialect, config)
    for rope in ropes_of(config).values():
        _check_rope(dialect, kind, rope)
    return dialect


def inexact_of(config: Any) -> list[str]:
    """What llama.cpp computes a little differently, a sentence each, for the report."""
    is_exact = all(
        rope.get("truncate", True) for rope in ropes_of(config).values() if rope.get("factor")
    )
    if is_exact:
        return []
    return ["llama.cpp rounds the range of dimensions that yarn corrects; the model does not"]


def _check_shapes(dialect: Dialect, config: Any) -> None:
    """Refuse what llama.cpp's loader expects in another shape."""
    problem = ""
    if dialect.name == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        problem = (
            "fewer heads of keys than of queries, whose norms llama.cpp takes as equally wide"
        )
    n_layers = config.num_hidden_layers
    if dialect.name == "deepseek2" and config.q_lora_rank is None and n_layers not in _LITE:
        problem = (
            f"{n_layers} layers and no q_lora_rank; llama.cpp takes a model for one without where "
            f"it has {' or '.join(map(str, _LITE))} layers"
        )
    problem = problem or _attention_problem(dialect, config)
    if problem:
        raise ConfigError(
            f"--export gguf: this {config.model_type} model has {problem}; leave --export out for "
            "our own checkpoint"
        )


def _attention_problem(dialect: Dialect, config: Any) -> str:
    """Which layers have windows, and Gemma's scale of attention, are fixed in llama.cpp."""
    every, n_layers = dialect.full_every, config.num_hidden_layers
    if every:
        fixed = ["full" if i % every == every - 1 else "sliding" for i in range(n_layers)]
        if list(config.layer_types) != [f"{kind}_attention" for kind in fixed]:
            return (
                f"layer_types {', '.join(config.layer_types)}; llama.cpp has sliding_attention in "
                f"all but the last of every {every} layers"
            )
    if dialect.name == "gemma3":
        is_27b = n_layers == _LAYERS_OF_27B
        width = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
        if config.query_pre_attn_scalar != width:
            return (
                f"query_pre_attn_scalar {config.query_pre_attn_scalar}, and llama.cpp computes "
                f"with {width}"
            )
    return ""


def _check_rope(dialect: Dialect, kind: str, rope: Mapping[str, Any]) -> None:
    """Refuse a scaling of rotations that llama.cpp would not do the same way."""
    if rope.get("rope_type", "default") not in dialect.ropes:
        raise ConfigError(
            f"--export gguf: rope_type {rope.get('rope_type')!r} of this {kind} model is not "
            f"carried over; {', '.join(dialect.ropes)} are: leave --export out for our own "
            "checkpoint"
        )
    for name, value in _YARN.items():
        if (rope.get(name) or value) != value:
            raise ConfigError(
                f"--export gguf: {name} is {rope[name]} in the rotations of this {kind} model, "
                f"and llama.cpp computes with {value}; leave --export out for our own checkpoint"
            )


def ropes_of(config: Any) -> dict[str, dict[str, Any]]:
    """The parameters of rotary embeddings by kind of layer; of all layers under ""."""
    found = dict(getattr(config, "rope_parameters", None) or {})
    if found and all(isinstance(value, dict) for value in found.values()):
        return found
    return {"": found}
