"""The benchmarks of rotation and of written texts: their pieces on small inputs."""

import math
import re

import pytest
import torch

from tests.benches import import_benchmark


def test_a_paired_ratio_has_the_error_of_the_difference() -> None:
    rotation = import_benchmark("rotation")
    plain = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ratio, stderr = rotation.paired_ratio(plain * 0.5, plain)
    assert (ratio, stderr) == pytest.approx((0.5, 0.0), abs=1e-7)
    # windows that move one by one: rest is 0.1, -0.1, 0.1, -0.1 and its standard error 0.0577
    ratio, stderr = rotation.paired_ratio(plain + torch.tensor([0.1, -0.1, 0.1, -0.1]), plain)
    assert ratio == pytest.approx(1.0)
    assert stderr == pytest.approx(0.11547 / math.sqrt(4) / 2.5, rel=1e-3)


def test_ratios_of_seeds_are_averaged_as_factors() -> None:
    rotation = import_benchmark("rotation")
    rows = [
        {"format": "int4-g64", "kl": 1.0, "kl_rotated": r, "ratio": r, "ratio_stderr": 0.1}
        for r in (0.5, 2.0)
    ]
    (line,) = rotation.table(rows).splitlines()[2:]
    assert line.startswith("| int4-g64 | 2 | 1.000000 | 1.250000 | 1.000 +- 0.69")
    (line,) = rotation.table(rows[:1]).splitlines()[2:]
    assert line.endswith("| 0.500 +- 0.100 |")


def test_half_of_each_is_half_written_by_the_model() -> None:
    source = import_benchmark("calibration_texts").TEXTS["half of each"]
    shares = {name: float(share) for name, share in re.findall(r"([\w:]+)=([\d.]+)", source)}
    assert shares == {"ebss": 0.5, "demo": 0.375, "demo:code": 0.125}
