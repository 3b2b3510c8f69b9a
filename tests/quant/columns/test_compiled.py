"""What numba compiled is of all sources of the loops, not of the one file that numba looks at."""

import importlib
import sys
from pathlib import Path

import pytest

from alphaquant.quant.columns import columns_numba, compiled, coupled_numba
from alphaquant.quant.columns.compiled import DIGEST, SOURCES, digest_of

LOOPS = """
import aq_helper
from alphaquant.quant.columns.compiled import entry, inner

scaled = inner(aq_helper.scaled)


@entry
def twice(x):
    return 2 * scaled(x)
"""


def test_the_digest_is_of_every_file_that_the_loops_are_made_of(tmp_path: Path) -> None:
    names = {path.name for path in SOURCES}
    assert names == {
        *("columns_numba.py", "coupled_numba.py", "grids_numba.py"),
        *("compiled.py", "codecs.py", "format_rules.py"),
    }
    copies = [tmp_path / path.name for path in SOURCES]
    for path, copy in zip(SOURCES, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    assert digest_of(copies) == DIGEST
    seen = {DIGEST}
    for copy in copies:
        copy.write_text(copy.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        seen.add(digest_of(copies))
    assert len(seen) == 1 + len(copies)


@pytest.mark.parametrize(
    "loop",
    [
        *(columns_numba.fit_group, columns_numba.gptq_block, columns_numba.sweep_block),
        coupled_numba.sweep_rows,
    ],
)
def test_files_of_an_entry_have_the_digest_in_their_names(loop: object) -> None:
    assert f".{DIGEST}.nbi" in loop._cache._cache_file._index_name  # type: ignore[attr-defined]


def test_a_change_of_another_file_is_seen_where_the_digest_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second result is numba's: it looks at the file of the entry alone."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "aq_loops.py").write_text(LOOPS)

    def result(factor: float, digest: str) -> float:
        (tmp_path / "aq_helper.py").write_text(f"def scaled(x):\n    return {factor} * x\n")
        monkeypatch.setattr(compiled, "DIGEST", digest)
        for name in ("aq_helper", "aq_loops"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return float(importlib.import_module("aq_loops").twice(1.0))

    found = [result(0.5, "old"), result(10.25, "old"), result(10.25, "new")]
    assert found == [1.0, 1.0, 20.5]
