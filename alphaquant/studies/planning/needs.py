"""How much work a search is, counted from the shapes of a model and the sizes that were chosen.

Multiplications are counted in units of one weight and one token.

Letters: A quantizable weights that a token passes, V vocabulary, K inputs of a matrix.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from alphaquant.evaluators.teacher import TOP_K
from alphaquant.models.loads import experts_per_token
from alphaquant.models.sites import LayerSite, ModelMap
from alphaquant.quant.two_sided.output_hessian import owners, row_blocks
from alphaquant.spaces.formats import Format, parse_format
from alphaquant.spaces.space import SearchSpace
from alphaquant.spaces.units import Matrix
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.costing import (
    anchors_of,
    bank_formats,
    is_short,
    listing_step,
    sampled_share,
)
from alphaquant.studies.program import N_UNIFORM
from alphaquant.studies.sizing import effort_of

TRACED = 12
"""Hidden states that the trace of a layer holds."""
_KEPT_BYTES = 8
"""Of a probability that the teacher keeps, with its token."""
_LISTED = {1: 2.5, 5: 3.0}
"""Formats that a short bank adds to its anchors in the mean, by the sizes that it looks at, where
it does not hold all of them; at 4.25 bits the demo has 2.3 and 3.0, a random OLMoE 2.6."""
_SAMPLED_TRIALS = 6
"""Trials that a search samples before its rule ends it, in the mean."""
_FRONT = 7
"""Points of the front that the gate looks at, beside the uniform formats."""
_SQUARED, _CHANGED = 512, 128
"""Tokens of a matrix whose products are squared, and whose output is measured, per format."""
COST_PASSES = 11
"""Forward passes that measuring costs over a text is worth beside its products: one to record, one
with a graph, gradients, and what is written, read and run again between. Fitted to a model of 40
million weights."""


@dataclass(frozen=True)
class Stack:
    """Matrices that share their inputs and are quantized together.

    Attributes:
        matrices: in order.
        count: how many stacks of these shapes the model has.
    """

    matrices: tuple[Matrix, ...]
    count: int

    @property
    def n_cols(self) -> int:
        """K."""
        return self.matrices[0].cols

    @property
    def n_rows(self) -> int:
        """Rows of all its matrices."""
        return sum(m.rows for m in self.matrices)


@dataclass(frozen=True)
class Needs:
    """What a search computes and keeps.

    Attributes:
        spec: without open sizes.
        model_map: the model, with weights or without.
        space: units, menu, budget.
        itemsize: bytes of a number of the computation.
    """

    spec: SearchSpec
    model_map: ModelMap
    space: SearchSpace
    itemsize: int

    @property
    def seq_len(self) -> int:
        """Tokens of a window."""
        return self.spec.texts.seq_len or 1

    @property
    def calibration(self) -> int:
        """Calibration tokens."""
        return (self.spec.texts.calibration_samples or 1) * self.seq_len

    @property
    def evaluation(self) -> int:
        """Tokens of a trial."""
        return (self.spec.texts.evaluation_samples or 1) * self.seq_len

    @property
    def heldout(self) -> int:
        """Tokens of the gate."""
        return (self.spec.texts.heldout_samples or 1) * self.seq_len

    @cached_property
    def expert_share(self) -> float:
        """Share of the tokens that a routed expert sees."""
        n_experts = 1 + max((m.expert or 0 for m in self.space.inventory.matrices), default=0)
        return experts_per_token(self.model_map.model.config, n_experts) / n_experts

    @cached_property
    def active(self) -> float:
        """A, without the head."""
        return self.active_in(len(self.model_map.layers))

    def active_in(self, n_layers: int) -> float:
        """Weights that a token passes in the first layers."""
        return sum(
            m.n_weights * (1.0 if m.expert is None else self.expert_share)
            for m in self.space.inventory.matrices
            if m.layer < n_layers
        )

    @property
    def vocabulary(self) -> int:
        """V."""
        config: Any = self.model_map.model.config
        return int(config.get_text_config().vocab_size)

    @cached_property
    def n_formats(self) -> float:
        """Formats of a matrix in the bank, in the mean."""
        if self.n_rounds == 1:
            return float(len(self.bank_formats))
        is_one_size = len(effort_of(self.spec).around) == 1
        return self._in_short_bank(_LISTED[1] if is_one_size else _LISTED[5])

    def _in_short_bank(self, n_listed: float) -> float:
        """Formats of a matrix in a short bank that lists so many beside the anchors."""
        names = bank_formats(self.space)
        n_anchors = len(anchors_of(self.space, names, effort_of(self.spec).anchor_bits))
        of_most, share = min(n_anchors + n_listed, len(names)), sampled_share(self.space)
        return share * len(names) + (1 - share) * of_most

    @cached_property
    def bank_formats(self) -> tuple[Format, ...]:
        """Formats that the bank may hold."""
        return tuple(parse_format(name) for name in bank_formats(self.space))

    @property
    def n_rounds(self) -> int:
        """Rounds in which the bank is filled and costs are measured."""
        return 2 if is_short(self.spec, self.space) else 1

    @cached_property
    def stacks(self) -> list[Stack]:
        """What is quantized, by shape."""
        counts: dict[tuple[Any, ...], tuple[tuple[Matrix, ...], int]] = {}
        for layer in self.model_map.parts:
            for matrices in _stacks_of(layer):
                key = tuple((m.rows, m.cols) for m in matrices)
                first, count = counts.get(key, (matrices, 0))
                counts[key] = (first, count + 1)
        return [Stack(matrices, count) for matrices, count in counts.values()]

    @property
    def hessian_products(self) -> float:
        """Multiplications of all Hessians over one token, a quarter again for held-back ones."""
        return 1.25 * sum(
            s.count * s.n_cols**2 * (1.0 if s.matrices[0].expert is None else self.expert_share)
            for s in self.stacks
        )

    @property
    def n_planned(self) -> int:
        """Assignments that are measured together."""
        most = self.spec.run.trials or 10**9
        return min(N_UNIFORM + 1 + effort_of(self.spec).n_front_sizes, most)

    @property
    def n_sampled(self) -> int:
        """Trials that a sampler proposes."""
        most = self.spec.run.trials
        return _SAMPLED_TRIALS if most is None else max(0, most - self.n_planned)

    @property
    def probe_tokens(self) -> int:
        """Tokens of the probe's assignments together."""
        effort = effort_of(self.spec)
        return effort.n_probes * min(effort.probe_tokens, self.evaluation)

    @property
    def gate_tokens(self) -> int:
        """Tokens of the gate's assignments together."""
        names = bank_formats(self.space)
        n_uniform = len(names)
        if is_short(self.spec, self.space):  # others are not in the bank
            n_uniform = len(anchors_of(self.space, names, effort_of(self.spec).anchor_bits))
        return (_FRONT + n_uniform) * self.heldout

    @property
    def cost_passes(self) -> float:
        """Forward passes over the calibration text that tracing gradients is worth, all rounds."""
        return COST_PASSES * (1.0 + self._listing_share)

    @property
    def cost_products(self) -> float:
        """Multiplications of the costs beside the passes through the model, in float32."""
        share = self._listing_share
        products = self._products_of(self.n_formats, self.calibration)
        if share == 0.0:
            return products
        n_twice = self._in_short_bank(0) if share < 1.0 else 0.0  # all windows: they are kept
        return products + self._products_of(n_twice, int(share * self.calibration))

    @property
    def _listing_share(self) -> float:
        """Of the calibration text, what is read to list formats for a short bank."""
        return 0.0 if self.n_rounds == 1 else 1 / listing_step(self.calibration // self.seq_len)

    def _products_of(self, n_formats: float, n_tokens: int) -> float:
        """Multiplications of the costs of so many formats over so many tokens."""
        of_format = min(n_tokens, _SQUARED) + _CHANGED + n_tokens // self.seq_len
        return n_formats * of_format * self.space.inventory.n_weights + n_tokens * self.active

    @property
    def is_two_sided(self) -> bool:
        """Whether the quantizer asks for output Hessians."""
        return bool(self.spec.quantizer.two_sided) and self.spec.limits.candidates is None

    @property
    def output_products(self) -> float:
        """Multiplications of all output Hessians over one token, with those of their noise."""
        return 2.0 * sum(
            s.count * (1.0 if m.expert is None else self.expert_share) * _outputs_of(m)
            for s in self.stacks
            for m in s.matrices
        )

    @property
    def outputs_bytes(self) -> int:
        """Of the output Hessians, float16; the down projections of a module share theirs."""
        names = {name for x in self.model_map.layers for name in owners(x).values()}
        return sum(2 * _outputs_of(m) for m in self.space.inventory.matrices if m.name in names)

    @property
    def bank_bytes(self) -> int:
        """Of the bank."""
        names = bank_formats(self.space)
        inventory = self.space.inventory
        mean = sum(inventory.storage_bits(parse_format(n)) for n in names) / len(names) / 8
        return round(self.n_formats * mean)

    @property
    def teacher_bytes(self) -> int:
        """Of the original's predictions."""
        return (self.evaluation + self.heldout) * min(self.vocabulary, TOP_K) * _KEPT_BYTES

    @property
    def token_bytes(self) -> int:
        """Of the hidden state of a token."""
        config: Any = self.model_map.model.config
        return int(config.get_text_config().hidden_size) * self.itemsize

    @property
    def states_bytes(self) -> int:
        """Of the hidden states of all layers with their gradients, while costs are measured."""
        return self.calibration * self.token_bytes * (2 * len(self.model_map.layers) + TRACED)

    @cached_property
    def layer_bytes(self) -> int:
        """Of the largest decoder layer's parameters, in the dtype of the computation."""
        sizes = (
            sum(p.numel() for p in layer.module.parameters()) for layer in self.model_map.layers
        )
        return max(sizes) * self.itemsize

    @property
    def rest_bytes(self) -> int:
        """Of what is beside the decoder layers, in the dtype of the computation."""
        total = sum(p.numel() for p in self.model_map.model.parameters())
        inside = sum(p.numel() for x in self.model_map.layers for p in x.module.parameters())
        return (total - inside) * self.itemsize

    @cached_property
    def layer_hessian_bytes(self) -> int:
        """Of the Hessians of the largest layer."""
        return max(
            sum(stack[0].cols ** 2 * 4 for stack in _stacks_of(layer))
            for layer in self.model_map.layers
        )


def _outputs_of(matrix: Matrix) -> int:
    """Numbers of a matrix's output Hessian."""
    sizes: list[int] = [rows.stop - rows.start for rows in row_blocks(matrix.rows)]
    return sum(size * size for size in sizes)


def _stacks_of(layer: LayerSite) -> list[tuple[Matrix, ...]]:
    """Stacks of a part: q, k and v, gate and up of one module, and single matrices."""
    found: list[tuple[Matrix, ...]] = []
    joined: dict[tuple[str, int], list[Matrix]] = {}
    for site in layer.plain:
        matrix, parts = site.matrix, ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        if matrix.projection in parts:
            joined.setdefault((matrix.name.rpartition(".")[0], matrix.cols), []).append(matrix)
        else:
            found.append((matrix,))
    found += [tuple(matrices) for matrices in joined.values()]
    for experts in layer.experts:
        for e in range(experts.n_experts):
            found += [experts.inner(e), (experts.down[e],)]
    return found
