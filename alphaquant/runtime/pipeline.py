"""From a model and an assignment to a packed checkpoint, layer by layer.

A checkpoint made with a trial's settings has the trial's codes.
"""

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphaquant.errors import StoreError
from alphaquant.models.loads import utilization_facts
from alphaquant.models.mapping import device_of, weights_digest
from alphaquant.models.sites import ModelMap
from alphaquant.progress import Progress, Stage
from alphaquant.provenance import device_facts, versions
from alphaquant.quant.bank import Bank
from alphaquant.quant.layerwise import QuantizedLayer, quantize_layers
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.quant.place import place_of
from alphaquant.quant.tuning.learning import Tuning, tune
from alphaquant.quant.two_sided.output_hessian import Measured
from alphaquant.runtime.checkpoint import CheckpointWriter, LayerFile, read_layer
from alphaquant.runtime.first_run import first_run
from alphaquant.runtime.integrity import write_checksums
from alphaquant.runtime.parts import Part, open_part
from alphaquant.spaces.assignment import Assignment, BitCount
from alphaquant.spaces.formats import Format
from alphaquant.specs.quantizer import QuantSettings

logger = logging.getLogger(__name__)

Export = Callable[[Path, Path], Mapping[str, Any]]
"""Writes a packed checkpoint again: from its directory to an empty one, giving facts for JSON."""

_DECIDING_VERSIONS = ("aq-search", "torch", "transformers", "numba")
"""Packages with another version of which a layer may come out otherwise."""


@dataclass(frozen=True)
class PipelineResult:
    """What was written.

    Attributes:
        path: the checkpoint's directory.
        quantized_bytes: bytes of the packed matrices.
        checkpoint_bytes: bytes of all tensors.
        fallbacks: matrices quantized otherwise than asked, as name -> reason.
        seconds: wall time.
        export: what was written instead of the packed checkpoint, None for nothing.
        tuning: what tuning made of the divergence, None where nothing was tuned.
    """

    path: Path
    quantized_bytes: int
    checkpoint_bytes: int
    fallbacks: Mapping[str, str]
    seconds: float
    export: Mapping[str, Any] | None = None
    tuning: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class PackingJob:
    """What the numbers of a packed checkpoint depend on.

    Attributes:
        model_map: the original model.
        assignment: format of every matrix.
        settings: method and options; `rtn` needs no tokens.
        tokens: calibration windows, int64 [N, T], None without.
        activations: what the inputs of matrices are rounded to at inference, by matrix name;
            calibration sees them as they are.
        batch_size: windows per forward pass.
        bank: of a search with these settings and windows, whose matrices are taken; None for none.
        tuning: how free numbers move when the codes are chosen; None where they stay.
        outputs: gives the output Hessians, where rounding is two-sided.
    """

    model_map: ModelMap
    assignment: Assignment
    settings: QuantSettings
    tokens: Tensor | None = None
    activations: Mapping[str, Format] = field(default_factory=dict)
    batch_size: int = 16
    bank: Bank | None = None
    tuning: Tuning | None = None
    outputs: Measured | None = None

    @property
    def counts(self) -> BitCount:
        """Bits and bytes of the checkpoint."""
        return self.assignment.count_bits(self.model_map.inventory)

    @property
    def activation_names(self) -> dict[str, str]:
        """What inputs are rounded to, by matrix name."""
        return {name: fmt.name for name, fmt in self.activations.items()}

    def identity(self, model_digest: str | None) -> dict[str, Any]:
        """Everything that must be the same for its layers to be those of an earlier run.

        Args:
            model_digest: of the model's weights; None to compute it.
        """
        parameter, found = next(self.model_map.model.parameters()), versions()
        return {
            "model_digest": model_digest or weights_digest(self.model_map),
            "formats": self.assignment.digest,
            "activations": self.activation_names,
            "settings": asdict(self.settings),
            "windows": None if self.tokens is None else _digest(self.tokens),
            "batch_size": self.batch_size,
            "tuning": None if self.tuning is None else _tuning_facts(self.tuning),
            "computed_as": f"{parameter.dtype} on {parameter.device.type}",
            "versions": {name: found[name] for name in _DECIDING_VERSIONS},
        }


@torch.no_grad()
def quantize_to_checkpoint(
    job: PackingJob,
    target: Path | Part,
    *,
    facts: Mapping[str, Any],
    tokenizer: Any = None,
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total: None,
    export: Export | None = None,
) -> PipelineResult:
    """Quantize every matrix to its format, write a packed checkpoint, and run it once.

    Layers that an earlier run of the same job finished are not made again.

    Args:
        job: model, formats, and how to round to them.
        target: directory to write, or what `open_part` gave for it.
        facts: provenance for the report (model, data, configuration).
        tokenizer: saved beside the weights.
        overwrite: replace an existing target.
        progress: called with ("quantize", layers done, layers), then ("first_run", 0 or 1, 1).
        export: makes another program's files of the checkpoint, which take its place.

    Raises:
        ModelError: GPTQ without tokens, what the engine raises, or a checkpoint that gives other
            numbers than its weights do in the original model.
        StoreError: the target exists, another job is unfinished there, or the disk is full.
    """
    opened = nullcontext(target) if isinstance(target, Part) else open_part(target, overwrite)
    with opened as part:
        run = _Run(job, part, CheckpointWriter(part.checkpoint, job.activations), progress)
        part.claim(job.identity(facts.get("model_digest")))
        started = time.perf_counter()
        report = run.start_report(facts)
        for made in run.layers():
            report["utilization"] |= made["utilization"]
            report["matrices"] += made["matrices"]
        if job.tuning is not None:
            report["tuning"] = run.tune(job.tuning)
        run.finish(report, tokenizer)
        path, exported = run.place(export)
    fallbacks = {r["matrix"]: r["fallback"] for r in report["matrices"] if r["fallback"]}
    return PipelineResult(
        path=path,
        quantized_bytes=run.writer.quantized_bytes,
        checkpoint_bytes=job.counts.checkpoint_bytes,
        fallbacks=fallbacks,
        seconds=time.perf_counter() - started,
        export=exported,
        tuning=report.get("tuning"),
    )


@dataclass(frozen=True)
class _Run:
    """What a quantization works with; see `quantize_to_checkpoint`."""

    job: PackingJob
    part: Part
    writer: CheckpointWriter
    progress: Progress

    def start_report(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """What is known before the first layer; utilization and matrices come layer by layer."""
        bank, device = self.job.bank, device_of(self.job.model_map.model)
        return {
            "settings": asdict(self.job.settings),
            "versions": versions(),
            **device_facts(str(device)),
            "rounded_on": place_of(device).device.type,
            **facts,
            "bits": asdict(self.job.counts),
            "bank": None if bank is None else _bank_facts(bank),
            "utilization": {},
            "matrices": [],
            "activations": self.job.activation_names,
        }

    def layers(self) -> list[dict[str, Any]]:
        """Quantize what is not finished; utilization and matrices of every layer, in order."""
        made = self.part.finished()
        for index, record in made.items():
            self.writer.layers[index] = LayerFile(**record["layer"])
        self._check_space()
        n_layers = len(self.job.model_map.parts)
        if made:
            logger.warning(
                "%d of %d layers were finished by an earlier run and are not made again",
                *(len(made), n_layers),
            )
        self.progress(Stage.QUANTIZE, len(made), n_layers)
        for done in quantize_layers(
            self.job.model_map,
            self.job.assignment,
            self.job.settings,
            self.job.tokens,
            self.job.batch_size,
            {index: partial(self._read, index) for index in made},
            self.job.bank,
            self.job.outputs,
        ):
            made[done.layer.index] = self._add(done)
            self.progress(Stage.QUANTIZE, len(made), n_layers)
        return [made[index] for index in sorted(made)]

    def tune(self, tuning: Tuning) -> Mapping[str, Any]:
        """Move the free numbers of what was quantized, in the files and in the model; facts.

        A run that is killed from here on makes the layers anew: their files are others then.
        """
        self.progress(Stage.TUNE, 0, 1)
        layers = {i: self._read(i) for i in sorted(self.writer.layers)}
        packed = {name: matrix for layer in layers.values() for name, matrix in layer.items()}
        found = tune(self.job.model_map, packed, tuning, partial(self.progress, Stage.TUNE))
        if found.packed:
            for index, layer in layers.items():
                self.writer.write_layer(
                    index, {n: found.packed.get(n, m) for n, m in layer.items()}
                )
        for name, value in found.kept.items():
            self.job.model_map.model.get_parameter(name).copy_(value)
        return found.facts

    def finish(self, report: Mapping[str, Any], tokenizer: Any) -> None:
        """Write the rest and run the checkpoint once."""
        self.progress(Stage.FIRST_RUN, 0, 1)
        self.writer.finish(self.job.model_map, tokenizer)
        found = first_run(
            self.part.checkpoint, self.job.model_map, self.writer.layers, self.job.tokens
        )
        self.writer.write_json("quantize_report.json", {**report, "first_run": asdict(found)})
        write_checksums(self.part.checkpoint)
        self.progress(Stage.FIRST_RUN, 1, 1)

    def place(self, export: Export | None) -> tuple[Path, Mapping[str, Any] | None]:
        """Move the checkpoint, or what is made of it, to the target."""
        if export is None:
            return self.part.place(), None
        self.progress(Stage.EXPORT, 0, 1)
        folder = self.part.make_export()
        facts = export(self.part.checkpoint, folder)
        path = self.part.place(folder)
        self.progress(Stage.EXPORT, 1, 1)
        return path, facts

    def _read(self, index: int) -> Mapping[str, PackedMatrix]:
        layer = self.job.model_map.parts[index]
        return read_layer(self.part.checkpoint, self.writer.layers[index], layer)

    def _add(self, done: QuantizedLayer) -> dict[str, Any]:
        """Store a layer; what is kept of it for the report."""
        file = self.writer.add_layer(done.layer.index, done.items)
        seconds = done.seconds / len(done.items)
        widths = {site.name: site.up[0].cols for site in done.layer.experts}
        record = {
            "file": file.file,
            "sha256": file.sha256,
            "layer": asdict(file),
            "utilization": utilization_facts(done.utilization, widths),
            "matrices": [{**asdict(i.record), "seconds": seconds} for i in done.items],
        }
        self.part.add_layer(done.layer.index, record)
        return record

    def _check_space(self) -> None:
        """Refuse a disk that cannot hold the rest, before hours are spent.

        Raises:
            StoreError: naming the folder and the bytes.
        """
        needed = self.job.counts.checkpoint_bytes - self.writer.quantized_bytes
        free = shutil.disk_usage(self.part.folder).free
        if free < needed:
            raise StoreError(
                f"{self.part.folder} needs {needed} bytes more and {free} are free there; free "
                "space, or give another --out, then run the same command"
            )


def _bank_facts(bank: Bank) -> dict[str, Any]:
    """Name of a bank, and with what its first matrices were made."""
    return {"key": bank.path.name, **{k: bank.facts.get(k) for k in ("versions", "rounded_on")}}


def _tuning_facts(tuning: Tuning) -> dict[str, Any]:
    """Everything that tuning depends on beside the matrices."""
    texts = {"tokens": _digest(tuning.tokens), "heldback": _digest(tuning.heldback)}
    return {**asdict(tuning.settings), **texts}


def _digest(tokens: Tensor) -> str:
    """sha256 of windows and their shape."""
    numbers = tokens.to("cpu", torch.int64).contiguous()
    return hashlib.sha256(
        str(tuple(numbers.shape)).encode() + numbers.numpy().tobytes()
    ).hexdigest()
