"""The header of a GGUF file, and files that are none or are cut short."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from alphaquant.errors import ModelError
from alphaquant.models.gguf import header as header_module
from alphaquant.models.gguf.header import GgufTensor, read_header
from alphaquant.testing.gguf_files import save_gguf

KEY_TYPE_AT = 24 + 8 + len("general.architecture")
"""Of the first key: behind magic, version, two counts and the key with its length."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    save_gguf(path, "llama", "Q8_0", extra={"note": np.zeros((3, 64), np.float32)})
    return path


def changed(tiny: Path, tmp_path: Path, at: int, data: bytes) -> Path:
    content = bytearray(tiny.read_bytes())
    content[at : at + len(data)] = data
    (tmp_path / "changed.gguf").write_bytes(content)
    return tmp_path / "changed.gguf"


def test_tensors_and_settings_are_those_that_gguf_reads(tiny: Path) -> None:
    found, wanted = read_header(tiny), gguf.GGUFReader(tiny)
    assert found.architecture == "llama"
    assert found.metadata["llama.embedding_length"] == 64
    assert "tokenizer.ggml.tokens" not in found.metadata
    assert found.tensors == tuple(
        GgufTensor(
            t.name, tuple(t.shape[::-1].tolist()), t.tensor_type.name, t.data_offset, t.n_bytes
        )
        for t in wanted.tensors
    )


def test_rows_of_q8_0_take_34_bytes_per_32_weights(tiny: Path) -> None:
    (note,) = (tensor for tensor in read_header(tiny).tensors if tensor.name == "note")
    assert (note.shape, note.n_bytes) == ((3, 64), 204)


def test_shares_are_of_all_weights(tiny: Path) -> None:
    found = read_header(tiny)
    n_plain = sum(t.shape[0] for t in found.tensors if t.type == "F32")
    n_all = n_plain + sum(t.n_bytes // 34 * 32 for t in found.tensors if t.type == "Q8_0")
    assert found.quantized_shares == {"Q8_0": pytest.approx(1 - n_plain / n_all)}
    assert found.bits_per_weight == pytest.approx((8.5 * (n_all - n_plain) + 32 * n_plain) / n_all)


def test_a_file_cut_anywhere_is_named(tiny: Path, tmp_path: Path) -> None:
    content, part = tiny.read_bytes(), tmp_path / "part.gguf"
    for n_bytes in (5, 30, 60, 2000, len(content) // 3, len(content) - 1):
        part.write_bytes(content[:n_bytes])
        with pytest.raises(ModelError, match=r"part.gguf is damaged or incomplete.*again"):
            read_header(part)


@pytest.mark.parametrize("content", [b"", b"GGU", b"\x00" * 99, b"GGML" * 9])
def test_a_file_of_another_kind_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "none.gguf").write_bytes(content)
    with pytest.raises(ModelError, match="no GGUF file: it starts with"):
        read_header(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("at", "data", "says"),
    [
        (4, struct.pack("<I", 1), "version 1; versions 2 and 3"),
        (8, struct.pack("<Q", 2**60), "damaged"),
        (16, struct.pack("<Q", 2**60), "damaged"),
        (24, struct.pack("<Q", 2**60), "damaged"),
        (KEY_TYPE_AT, struct.pack("<I", 77), "damaged"),
        (32, b"\xff\xfe", "damaged"),
    ],
    ids=["old version", "tensors", "keys", "key", "type", "no UTF-8"],
)
def test_a_damaged_header_is_named(
    at: int, data: bytes, says: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=says):
        read_header(changed(tiny, tmp_path, at, data))


def test_a_type_that_gguf_does_not_know_is_named(tiny: Path, tmp_path: Path) -> None:
    name = b"blk.0.ffn_up.weight"
    at = tiny.read_bytes().index(name) + len(name) + 4 + 2 * 8
    with pytest.raises(ModelError, match=r"blk.0.ffn_up.weight is of ggml type 4,"):
        read_header(changed(tiny, tmp_path, at, struct.pack("<I", 4)))


def test_one_part_of_several_is_refused(tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny-00001-of-00002.gguf", settings={"split.count": 2.0})
    with pytest.raises(ModelError, match=r"one of 2 parts .*llama-gguf-split --merge"):
        read_header(tmp_path / "tiny-00001-of-00002.gguf")


def test_without_the_package_the_message_says_what_to_install(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header_module, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'aq-search\[gguf\]'"):
        read_header(tiny)
