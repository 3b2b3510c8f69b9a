"""`aq-quantize --tune` from its command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaquant.runtime.checkpoint import load


def options(tiny: Path, texts: dict[str, Path], folder: Path, *more: str) -> list[str]:
    (folder / "config.json").write_text(json.dumps({"default": {"wq": "int2", "group_size": 32}}))
    return [
        *("--model", str(tiny), "--config", str(folder / "config.json"), "--method", "rtn"),
        *("--calibration", str(texts["calibration"]), "--calibration-samples", "32"),
        *("--seq-len", "32", "--out", str(folder / "out"), *more),
    ]


def test_scales_are_tuned_and_told_and_the_checkpoint_runs(
    run: Any, tiny: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    plain, tuned = tmp_path / "plain", tmp_path / "tuned"
    for folder in (plain, tuned):
        folder.mkdir()
    assert run("aq-quantize", *options(tiny, texts, plain)).code == 0
    given = ("--tune", "scales,norms", "--tune-epochs", "4")
    done = run("aq-quantize", *options(tiny, texts, tuned, *given))
    assert done.code == 0, done.err
    told = json.loads(done.out)["tuning"]
    report = json.loads((tuned / "out" / "quantize_report.json").read_text())
    assert report["tuning"] == told
    assert (told["n_windows"], told["heldback_windows"], told["parts"]) == (
        24,
        8,
        ["scales", "norms"],
    )
    assert told["is_kept"] and told["kl_after"] < told["kl_before"]
    tokens = torch.arange(24).view(1, -1) + 5
    with torch.no_grad():
        logits = [load(folder / "out")(tokens).logits for folder in (plain, tuned)]
    assert not torch.equal(*logits)
    codes = [
        {n: t for n, t in load(folder / "out").named_buffers() if n.endswith("codes")}
        for folder in (plain, tuned)
    ]
    assert all(torch.equal(codes[1][name], t) for name, t in codes[0].items())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ("--tune", "weights"),
            "tune is 'weights'; known are scales, norms, routers, all and none",
        ),
        (("--tune", "all", "--calibration-samples", "12"), "give 16 --calibration-samples"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    given: tuple[str, ...], said: str, run: Any, tiny: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    done = run("aq-quantize", *options(tiny, texts, tmp_path, *given))
    assert done.code != 0 and said in done.err
    assert not (tmp_path / "out").exists()
