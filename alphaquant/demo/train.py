"""Train a small model from a text file: how the demo model was made.

    python -m alphaquant.demo.train --text books.txt --out my-model --minutes 50

A byte-level BPE tokenizer is trained on the text, then an OLMoE, Qwen2-MoE or (dense) Llama model
on random windows of it: AdamW, a constant learning rate for the first part of the run, then a
cosine to a small one, bf16 autocast. No evaluation, no resuming, one process. The model is not
meant to be good, but to be trained and to use its experts unevenly.

Nothing else in the package imports this script.

Letters: B windows per batch, T tokens per window, V vocabulary.
"""

import argparse
import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
)

from alphaquant.errors import AlphaQuantError, DataError, StoreError

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
ENCODE_CHARS = 2**20
"""Characters encoded at once, to bound memory; cuts this rare do not matter."""


@dataclass(frozen=True)
class ModelShape:
    """Architecture and sizes of the model; the defaults are those of the demo model.

    `qwen2_moe` differs from `olmoe` in what a search has to handle: a shared expert with a gate of
    its own beside the routed ones, half as many key and value heads, biases in attention, and
    routing weights that sum to 1. `llama` is dense; its MLPs are twice as wide as the hidden size.
    """

    architecture: str = "olmoe"
    vocab_size: int = 4096
    hidden_size: int = 256
    expert_size: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_experts: int = 16
    experts_per_token: int = 4
    max_tokens: int = 2048

    def config(self) -> PretrainedConfig:
        """The transformers configuration; OLMoE's chosen routing weights sum below 1."""
        common: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "max_position_embeddings": self.max_tokens,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 1,
        }
        return _CONFIGS[self.architecture](self, common)

    @property
    def routing(self) -> dict[str, Any]:
        """What only configurations with experts have."""
        return {
            "num_experts": self.n_experts,
            "num_experts_per_tok": self.experts_per_token,
            "router_aux_loss_coef": 0.003,
        }


def _olmoe(shape: ModelShape, common: dict[str, Any]) -> PretrainedConfig:
    return OlmoeConfig(
        intermediate_size=shape.expert_size,
        num_key_value_heads=shape.n_heads,
        norm_topk_prob=False,
        **shape.routing,
        **common,
    )


def _qwen2_moe(shape: ModelShape, common: dict[str, Any]) -> PretrainedConfig:
    return Qwen2MoeConfig(
        moe_intermediate_size=shape.expert_size,
        shared_expert_intermediate_size=2 * shape.expert_size,
        num_key_value_heads=shape.n_heads // 2,
        norm_topk_prob=True,
        **shape.routing,
        **common,
    )


def _llama(shape: ModelShape, common: dict[str, Any]) -> PretrainedConfig:
    return LlamaConfig(
        intermediate_size=2 * shape.hidden_size,
        num_key_value_heads=shape.n_heads // 2,
        **common,
    )


_CONFIGS: dict[str, Callable[[ModelShape, dict[str, Any]], PretrainedConfig]] = {
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "llama": _llama,
}


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are those of the demo model.

    Attributes:
        minutes: wall-clock length of the run; ignored when `n_steps` is given.
        n_steps: number of batches, for runs that must repeat exactly.
        seed: of the weights and of the windows.
        window_tokens: T.
        batch_windows: B.
        peak_rate: learning rate of the first part.
        constant_share: share of the run at the peak rate.
        final_factor: last learning rate as a share of the peak.
    """

    minutes: float = 50.0
    n_steps: int | None = None
    seed: int = 0
    window_tokens: int = 256
    batch_windows: int = 32
    peak_rate: float = 2.5e-3
    constant_share: float = 0.3
    final_factor: float = 0.02

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is over, from 0; 1 and more when it is time to stop."""
        if self.n_steps is not None:
            return step / self.n_steps
        return seconds / (60 * self.minutes)

    def rate(self, progress: float) -> float:
        """Learning rate at a point of the run.

        With the defaults: 2.5e-3 up to 0.3, 1.275e-3 at 0.65 (half-way down), 5e-5 at 1.

        Args:
            progress: share of the run that is over, 0 to 1.
        """
        decay = max(0.0, progress - self.constant_share) / (1 - self.constant_share)
        cosine = 0.5 * (1 + math.cos(math.pi * min(decay, 1.0)))
        return self.peak_rate * (self.final_factor + (1 - self.final_factor) * cosine)


def train_tokenizer(text: str, shape: ModelShape) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with an end-of-text token (0) and a padding token (1).

    Short texts give fewer tokens than `shape.vocab_size`; the model keeps its size.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(text), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers has no types
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=shape.max_tokens,
    )


def encode(text: str, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Token ids of a text, int64 [n_tokens], without special tokens."""
    ids = (tokenizer.backend_tokenizer.encode(piece).ids for piece in _pieces(text))
    return torch.tensor(list(itertools.chain.from_iterable(ids)), dtype=torch.int64)


def train_model(tokens: Tensor, shape: ModelShape, recipe: Recipe) -> PreTrainedModel:
    """Train a model from scratch, on a GPU when there is one.

    Args:
        tokens: int64 [n_tokens], at least one window and one token.
        shape: sizes of the model.
        recipe: how to train.

    Returns:
        The model in bf16 on the CPU.

    Raises:
        DataError: there are too few tokens for one window.
    """
    if tokens.numel() <= recipe.window_tokens:
        raise DataError(
            f"{tokens.numel()} tokens of text, but one window takes {recipe.window_tokens} and "
            "one more; give a longer --text"
        )
    torch.manual_seed(recipe.seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu") as device:
        model = AutoModelForCausalLM.from_config(shape.config())  # type: ignore[no-untyped-call]
    model.train()
    optimizer = _optimizer(model)
    windows = _windows(tokens, recipe)
    start = time.monotonic()
    for step in itertools.count():
        seconds = time.monotonic() - start
        progress = recipe.progress(step, seconds)
        if progress >= 1:
            break
        loss = _step(model, optimizer, next(windows).to(device), recipe.rate(progress))
        if step % 100 == 0:
            logger.info("step %d, %.0f s, %.0f %%, loss %.3f", step, seconds, 100 * progress, loss)
    model.train(mode=False)
    trained: PreTrainedModel = model.bfloat16().cpu()
    return trained


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model and tokenizer as one checkpoint folder."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _pieces(text: str) -> Iterator[str]:
    return (text[i : i + ENCODE_CHARS] for i in range(0, len(text), ENCODE_CHARS))


def _windows(tokens: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Endless batches of random windows, int64 [B, T]."""
    generator = torch.Generator().manual_seed(recipe.seed)
    offsets = torch.arange(recipe.window_tokens)
    n_starts = tokens.numel() - recipe.window_tokens
    while True:
        starts = torch.randint(n_starts, (recipe.batch_windows, 1), generator=generator)
        yield tokens[starts + offsets]  # [B, 1] + [T] -> [B, T]


def _optimizer(model: PreTrainedModel) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices (and stacked experts) but not on norms."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def _step(
    model: PreTrainedModel, optimizer: torch.optim.AdamW, batch: Tensor, rate: float
) -> float:
    """One update; the loss includes the router's auxiliary loss, without which experts die."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    routed = {"output_router_logits": True} if hasattr(model.config, "num_experts") else {}
    with torch.autocast(batch.device.type, torch.bfloat16):
        loss = model(input_ids=batch, labels=batch, **routed).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _read(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"no text file at {path}; give --text a UTF-8 file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}); convert it first") from error


def _positive(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _positive_int(text: str) -> int:
    return int(_positive(text))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to train on")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the checkpoint")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=_positive, default=50.0, help="length of the run")
    length.add_argument("--steps", type=_positive_int, help="length in batches instead")
    parser.add_argument("--seed", type=int, default=0, help="of weights and windows")
    parser.add_argument("--window", type=_positive_int, default=256, help="tokens per window")
    parser.add_argument("--batch", type=_positive_int, default=32, help="windows per batch")
    parser.add_argument("--architecture", choices=list(_CONFIGS), default="olmoe", help="model")
    parser.add_argument("--layers", type=_positive_int, default=4, help="decoder layers")
    parser.add_argument("--hidden", type=_positive_int, default=256, help="hidden size")
    parser.add_argument("--experts", type=_positive_int, default=16, help="experts per layer")
    parser.add_argument("--top-k", type=_positive_int, default=4, help="experts per token")
    parser.add_argument(
        "--vocab", type=_positive_int, default=4096, help="tokens in the vocabulary"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Train and save; prints the folder. The result is the exit status.

    Args:
        arguments: command-line arguments, by default those of the process.
    """
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    shape = ModelShape(
        architecture=options.architecture,
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        n_layers=options.layers,
        n_experts=options.experts,
        experts_per_token=options.top_k,
    )
    recipe = Recipe(
        minutes=options.minutes,
        n_steps=options.steps,
        seed=options.seed,
        window_tokens=options.window,
        batch_windows=options.batch,
    )
    try:
        if options.out.exists():
            raise StoreError(f"{options.out} exists; give --out a new folder")
        text = _read(options.text)
        tokenizer = train_tokenizer(text, shape)
        save(train_model(encode(text, tokenizer), shape, recipe), tokenizer, options.out)
    except AlphaQuantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
