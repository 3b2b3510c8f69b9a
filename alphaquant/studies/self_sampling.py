"""Calibration text that the model writes itself, kept in the cache.

    CACHE/written/KEY.safetensors    tokens int64 [N, T], and what they were made with

The rule is `alphaquant.texts.balanced`. Here are the model with its cache of keys and values, how
its routing is seen, and the first tokens: drawn with a seed among those that are not special.
Prefixes of several texts go through the model together, `BATCH` texts at a time, so that a step
costs one pass over a batch of single tokens. Of the first texts the sum of log P is computed again
without a cache; where they differ the model's cache cannot be trusted, and the text is refused.

Letters: N texts, T tokens of each, w beams, R prefixes, E experts, P tokens in front.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from alphaquant.errors import ConfigError, ModelError
from alphaquant.evaluators.routes import RoutedSite, find_routed
from alphaquant.files import whole_file, writing
from alphaquant.models.mapping import device_of
from alphaquant.progress import Progress, Stage, no_progress
from alphaquant.provenance import versions
from alphaquant.texts.balanced import TEMPERATURE, WIDTH, Written, write_balanced

BATCH = 32
"""Texts that are written together; its prefixes' keys and values are in memory."""

_VERSION = 1
"""Raised when this file's own work changes."""

_TOLERANCE = 1e-2
"""Relative difference of a sum of log P with and without a cache; float32 leaves below 1e-4, and
bfloat16 below this."""


@dataclass(frozen=True)
class WriterModel:
    """A model that writes, and what its text depends on.

    Attributes:
        model: a causal language model with routed experts.
        tokenizer: of transformers.
        digest: of its weights.
        runs_as: dtype and device.
    """

    model: nn.Module
    tokenizer: Any
    digest: str
    runs_as: str


@dataclass(frozen=True)
class Asked:
    """Which text is to be written.

    Attributes:
        n_texts: N.
        n_tokens: T.
        start: ids in front of every text, P of them.
        seed: of the first tokens.
    """

    n_texts: int
    n_tokens: int
    start: tuple[int, ...]
    seed: int


def written_text(
    by: WriterModel, asked: Asked, cache: Path, progress: Progress = no_progress
) -> Tensor:
    """The text of a model, from the cache or written now, int64 [N, T].

    Args:
        by: the model.
        asked: how much of it.
        cache: the folder of all caches.
        progress: told how far it is, in steps of a token, as the stage `write`.

    Raises:
        ConfigError: the model has no routed experts.
        ModelError: it cannot go on with a text token by token.
        StoreError: the text cannot be kept.
    """
    facts = {
        **{"version": _VERSION, "model": by.digest, "runs_as": by.runs_as},
        **{"n_texts": asked.n_texts, "n_tokens": asked.n_tokens, "start": asked.start},
        **{"seed": asked.seed, "width": WIDTH, "temperature": TEMPERATURE, "batch": BATCH},
        **{name: versions()[name] for name in ("torch", "transformers")},
    }
    text = json.dumps(facts, sort_keys=True)
    file = cache / "written" / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor("tokens")  # type: ignore[no-any-return]
    except (OSError, SafetensorError):
        pass  # not there, or cut short: it is written again
    tokens = _write(by, asked, progress)
    with writing(file, tokens.nbytes), whole_file(file) as part:
        save_file({"tokens": tokens}, part, {"facts": text})
    return tokens


@torch.no_grad()
def _write(by: WriterModel, asked: Asked, progress: Progress) -> Tensor:
    starts = _starts(by, asked)
    n_batches = -(-asked.n_texts // BATCH)
    found: list[Tensor] = []
    for number, some in enumerate(torch.split(starts, BATCH)):
        done = number * asked.n_tokens

        def tell(n_tokens: int, done: int = done) -> None:
            progress(Stage.WRITE, done + n_tokens, n_batches * asked.n_tokens)

        with _ModelWriter.of(by) as writer:
            sampled = write_balanced(writer, some, asked.n_tokens, tell=tell)
        if not found:
            _check_sums(by.model, sampled.tokens[:4], sampled.log_probs[:4], starts.shape[1])
        found.append(sampled.tokens)
    return torch.cat(found)


def _starts(by: WriterModel, asked: Asked) -> Tensor:
    """What texts begin with: `start` and a drawn token, int64 [N, P + 1]."""
    special = {*by.tokenizer.all_special_ids, *asked.start}
    ids = torch.tensor([i for i in range(len(by.tokenizer)) if i not in special])
    generator = torch.Generator().manual_seed(asked.seed)
    drawn = ids[torch.randint(0, len(ids), (asked.n_texts, 1), generator=generator)]
    fronts = torch.tensor(asked.start, dtype=torch.int64).expand(asked.n_texts, -1)
    return torch.cat([fronts, drawn], 1)


def _check_sums(model: nn.Module, tokens: Tensor, sums: Tensor, n_given: int) -> None:
    """Compare sums of log P with those of an ordinary pass.

    Raises:
        ModelError: they differ.
    """
    logits = model(tokens.to(device_of(model)), use_cache=False).logits[:, n_given - 1 : -1]
    log_probs = torch.log_softmax(logits.float(), -1).cpu()
    expected = log_probs.gather(-1, tokens[:, n_given:, None]).sum((1, 2))
    worst = float(((sums.cpu() - expected).abs() / expected.abs().clamp(min=1.0)).max())
    if not worst <= _TOLERANCE:
        raise ModelError(
            f"--calibration ebss: {type(model).__name__} gives other predictions with its cache "
            f"of keys and values than without, by {worst:.1e} relative; give a text that exists"
        )


@dataclass
class _ModelWriter:
    """A model of transformers as a `Writer`.

    Attributes:
        by: the model.
        sites: its routed experts.
        past: its cache of keys and values.
        chosen: expert ids of the last pass by site, [R * P, k].
    """

    by: WriterModel
    sites: Sequence[RoutedSite]
    past: Any = None
    chosen: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def of(cls, by: WriterModel) -> Iterator["_ModelWriter"]:
        """Watch the routing of a model while it writes.

        Raises:
            ConfigError: it has no routed experts.
        """
        try:
            writer = cls(by, find_routed(by.model))
        except ModelError as error:
            raise ConfigError(
                f"--calibration ebss balances routed experts, and {error}; give a text"
            ) from error
        handles = [
            site.hooked.register_forward_pre_hook(writer._hook(site), with_kwargs=True)
            for site in writer.sites
        ]
        try:
            yield writer
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, tokens: Tensor) -> Written:
        """See `Writer`."""
        return self._read(tokens)

    def go_on(self, prefixes: Tensor, tokens: Tensor) -> Written:
        """See `Writer`.

        Raises:
            ModelError: its cache cannot be put into another order.
        """
        try:
            self.past.reorder_cache(prefixes)
        except (AttributeError, NotImplementedError, TypeError) as error:
            raise ModelError(
                f"--calibration ebss: the cache of {type(self.by.model).__name__} "
                f"({type(self.past).__name__}) cannot follow several beginnings of a text; give a "
                "text that exists"
            ) from error
        return self._read(tokens[:, None], self.past)

    def _read(self, tokens: Tensor, past: Any = None) -> Written:
        """One pass over tokens [R, P]."""
        self.chosen = {}
        given = {} if past is None else {"past_key_values": past}
        found = self.by.model(tokens.to(device_of(self.by.model)), use_cache=True, **given)
        self.past = getattr(found, "past_key_values", None)
        log_probs = torch.log_softmax(found.logits[:, -1].float(), -1)
        log_probs[:, len(self.by.tokenizer) :] = -torch.inf  # rows that pad the vocabulary
        return Written(log_probs, [self._usage(site, len(tokens)) for site in self.sites])

    def _usage(self, site: RoutedSite, n_rows: int) -> Tensor:
        """How often each prefix's new tokens chose each expert, float32 [R, E]."""
        ids = self.chosen[site.name].to(torch.int64).reshape(n_rows, -1)  # [R, P * k]
        counts = torch.zeros(n_rows, site.n_experts + 1, device=ids.device)
        counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype))
        return counts[:, : site.n_experts]  # E stands for none

    def _hook(self, site: RoutedSite) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.chosen[site.name] = site.reader.route(args, kwargs).expert_ids

        return hook
