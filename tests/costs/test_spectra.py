"""Spectra: the worked example, Gaussian noise of known alpha, blocks, and whole models."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alphaquant.costs import spectra as spectra_module
from alphaquant.costs.spectra import (
    Spectra,
    farms_alpha,
    measure_spectra,
    plain_alpha,
    stored_spectra,
    unit_spectra,
)
from alphaquant.errors import ModelError, StoreError
from alphaquant.models.mapping import map_model
from alphaquant.spaces.units import Matrix, Unit
from alphaquant.testing.models import tiny_model


def _gaussian(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def noise() -> dict[str, Tensor]:
    return {"square": _gaussian(2048, 2048), "wide": _gaussian(1024, 2048)}


def test_the_worked_example() -> None:
    singular = torch.tensor([1.0, math.e, math.e, math.e**3]).sqrt()
    rotation = torch.linalg.qr(_gaussian(4, 4)).Q
    # Squares of float32 roots, rotated in float32: a few 1e-7, times the k = 3 logarithms.
    assert plain_alpha(rotation @ torch.diag(singular)) == pytest.approx(1.6, abs=1e-5)


def test_the_tail_is_a_tenth_of_the_values() -> None:
    squares = torch.ones(200)
    squares[:20] = math.e
    squares[20] = math.e  # l_{n-k} itself
    assert plain_alpha(torch.diag(squares.sqrt())) > 1e6
    squares[:20] = math.e**3
    assert plain_alpha(torch.diag(squares.sqrt())) == pytest.approx(1 + 1 / 2, abs=1e-5)


@pytest.mark.parametrize(("shape", "alpha"), [("square", 6.43), ("wide", 8.28)])
def test_gaussian_noise_has_the_known_alpha(
    noise: dict[str, Tensor], shape: str, alpha: float
) -> None:
    # Five draws of each shape are within 1.5 % of each other.
    assert plain_alpha(noise[shape]) == pytest.approx(alpha, rel=0.03)


def test_blocks_make_alpha_independent_of_the_shape(noise: dict[str, Tensor]) -> None:
    square, wide = (farms_alpha(noise[shape], seed=0) for shape in ("square", "wide"))
    assert wide == pytest.approx(square, rel=0.03)
    assert square == pytest.approx(6.38, rel=0.03)


def test_alpha_is_that_of_the_singular_values_of_either_side() -> None:
    weight = _gaussian(96, 200)
    values = torch.linalg.svdvals(weight.double()).square().sort().values
    expected = 1 + 10 / float((values[-10:] / values[-11]).log().sum())
    assert plain_alpha(weight) == pytest.approx(expected, rel=1e-9)
    assert plain_alpha(weight.T) == pytest.approx(expected, rel=1e-9)


def test_the_scale_of_the_weights_plays_no_part() -> None:
    weight = _gaussian(130, 256)
    assert plain_alpha(weight * 1e-2) == pytest.approx(plain_alpha(weight), rel=1e-6)
    assert farms_alpha(weight * 1e-2, 0) == pytest.approx(farms_alpha(weight, 0), rel=1e-6)


def test_a_heavy_tail_has_a_small_alpha() -> None:
    weight = _gaussian(256, 256)
    heavy = weight * torch.arange(1, 257).pow(-1.0)
    assert plain_alpha(heavy) < 0.5 * plain_alpha(weight)
    assert farms_alpha(heavy, 0) < 0.5 * farms_alpha(weight, 0)


def test_blocks_are_pooled_and_the_rest_is_left_out() -> None:
    # Three rows of two blocks of 128 x 128, each of another scale.
    weight = _gaussian(384, 256)
    blocks = [block for row in weight.split(128) for block in row.split(128, dim=1)]
    for scale, block in enumerate(blocks):
        block *= 1 + scale / 10
    values = torch.cat([torch.linalg.svdvals(b.double()).square() for b in blocks]).sort().values
    expected = 1 + 76 / float((values[-76:] / values[-77]).log().sum())
    assert farms_alpha(weight, 0) == pytest.approx(expected, rel=1e-9)
    padded = torch.full((400, 300), 1e6)
    padded[:384, :256] = weight
    assert farms_alpha(padded, 0) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(127, 512), (512, 127)])
def test_matrices_narrower_than_a_block_are_taken_whole(shape: tuple[int, int]) -> None:
    weight = _gaussian(*shape)
    assert farms_alpha(weight, 0) == plain_alpha(weight)


def test_of_many_blocks_some_are_drawn_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _gaussian(512, 512)
    everything = farms_alpha(weight, 0)
    assert everything == farms_alpha(weight, 1)
    monkeypatch.setattr(spectra_module, "MAX_BLOCKS", 4)
    drawn = [farms_alpha(weight, seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len({everything, *drawn}) == 4


def test_degenerate_matrices() -> None:
    assert math.isnan(plain_alpha(torch.ones(1, 64)))
    assert math.isnan(plain_alpha(torch.ones(64, 1)))
    for weight in (torch.zeros(16, 16), torch.eye(16), torch.ones(16, 16)):
        assert 1 < plain_alpha(weight) < math.inf


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v2", "llama"])
def test_every_matrix_of_a_model_is_measured(family: str) -> None:
    model_map = map_model(tiny_model(family))
    done: list[tuple[Any, ...]] = []
    spectra = measure_spectra(model_map, seed=0, progress=lambda *args: done.append(args))
    assert spectra.matrices == tuple(m.name for m in model_map.inventory.matrices)
    assert done == [("spectra", 1, 2), ("spectra", 2, 2)]
    for i, name in enumerate(spectra.matrices):
        weight = model_map.view(name).detach().float()
        assert spectra.alpha[i] == spectra.alpha_farms[i] == plain_alpha(weight)
        assert spectra.variance[i] == pytest.approx(np.var(weight.numpy(), dtype=np.float64))


def test_blocks_of_a_model_depend_on_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra_module, "BLOCK_SIZE", 8)
    monkeypatch.setattr(spectra_module, "MAX_BLOCKS", 3)
    model_map = map_model(tiny_model("llama"))
    first, again, other = (measure_spectra(model_map, seed=seed) for seed in (0, 0, 1))
    assert first.alpha_farms.tolist() == again.alpha_farms.tolist()
    assert (first.alpha_farms != other.alpha_farms).all()
    assert (first.alpha == other.alpha).all()


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model_map = map_model(tiny_model("mixtral"))
    name = model_map.inventory.matrices[5].name
    with torch.no_grad():
        model_map.view(name)[0, 0] = math.nan
    with pytest.raises(ModelError, match=f"^{name} has weights that are not finite"):
        measure_spectra(model_map)


def test_stored_spectra_are_measured_once_per_weights_and_seed(tmp_path: Path) -> None:
    model_map, done = map_model(tiny_model("mixtral")), []

    def stored(weights: str = "one", seed: int = 0) -> Spectra:
        return stored_spectra(
            tmp_path, weights, model_map, seed=seed, progress=lambda *step: done.append(step)
        )

    first, again = stored(), stored()
    assert len(done) == 2
    assert first.matrices == again.matrices
    for part in ("alpha", "alpha_farms", "variance"):
        assert np.array_equal(getattr(first, part), getattr(again, part)), part
    stored("two")
    stored(seed=1)
    assert len(done) == 6
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("content", [b"garbage", None], ids=["garbage", "a bit flipped"])
def test_a_damaged_file_of_spectra_is_a_store_error(tmp_path: Path, content: bytes | None) -> None:
    model_map = map_model(tiny_model("llama"))
    stored_spectra(tmp_path, "one", model_map)
    (path,) = tmp_path.iterdir()
    flipped = bytearray(path.read_bytes())
    flipped[-3] ^= 1
    path.write_bytes(bytes(flipped) if content is None else content)
    with pytest.raises(StoreError, match=r"is damaged .*; delete it and run the same command"):
        stored_spectra(tmp_path, "one", model_map)


def test_units_have_the_means_of_their_matrices() -> None:
    gate, up = Matrix("gate", 10, 30, "expert", 0, 0), Matrix("up", 10, 10, "expert", 0, 0)
    other = Matrix("q", 5, 5, "attention", 0)
    spectra = Spectra(
        ("q", "up", "gate"),
        np.array([9.0, 4.0, 8.0]),
        np.array([1.0, 2.0, 6.0]),
        np.array([3.0, 0.0, 1.0]),
    )
    units = unit_spectra(spectra, [Unit("w13", (gate, up)), Unit("q", (other,))])
    assert units.alpha.tolist() == [7.0, 9.0]
    assert units.alpha_farms.tolist() == [5.0, 1.0]
    assert units.variance.tolist() == [0.75, 3.0]
