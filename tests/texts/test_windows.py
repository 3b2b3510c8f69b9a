"""Sources, windows, digests and overlap of the token sets; no network, no model."""

import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alphaquant import demo
from alphaquant.errors import DataError
from alphaquant.texts import sources, windows
from alphaquant.texts.windows import TextRequest, TokenSet, check_disjoint, load_tokens

EOS = 255
GOLDEN_STARTS = [10, 30, 75, 130, 175, 185]
GOLDEN_DIGEST = "e3baaf76f46a52b64deb442a6cdb9265e329142635d9a9363d2c01ac41271c05"


class CharTokenizer:
    """Token id = code point below 255, 0 beyond; counts its calls without special tokens."""

    def __init__(
        self,
        eos_token_id: int | None = EOS,
        start: tuple[int, ...] = (),
        bos_token_id: int | None = None,
    ) -> None:
        self.eos_token_id = eos_token_id
        self.bos_token_id = bos_token_id
        self.start = start
        self.n_calls = 0

    def __len__(self) -> int:
        return 256

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        assert not verbose
        ids = [ord(char) if ord(char) < EOS else 0 for char in text]
        if add_special_tokens:
            return [*self.start, *ids]
        self.n_calls += 1
        return ids


@pytest.fixture(scope="module")
def demo_tokenizer() -> Iterator[PreTrainedTokenizerBase]:
    """The demo's; it remembers texts, for whole parts are tokenized again and again."""
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    with mock.patch.object(tokenizer, "encode", cache(tokenizer.encode)):
        yield tokenizer


@pytest.fixture(scope="module")
def books(demo_tokenizer: PreTrainedTokenizerBase) -> list[TokenSet]:
    """All windows of each part of the demo's books."""
    return [load(f"demo:{role}", 800, 256, tokenizer=demo_tokenizer) for role in sources.ROLES]


def load(source: object, n_samples: int = 2, seq_len: int = 4, **options: Any) -> TokenSet:
    tokenizer = options.pop("tokenizer", CharTokenizer())
    role, seed = options.pop("role", "calibration"), options.pop("seed", 0)
    bos = options.pop("bos", "auto")
    assert not options, f"unknown options {options}"
    return load_tokens(TextRequest(str(source), role, n_samples, seq_len, seed, bos), tokenizer)


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def write_lines(path: Path, *records: object) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def all_tokens(source: Path, n_tokens: int, **options: Any) -> list[int]:
    """Every token of a file: as many windows of one token as it has."""
    return load(source, n_samples=n_tokens, seq_len=1, **options).tokens.flatten().tolist()


def token_set(tokens: torch.Tensor, role: str = "search") -> TokenSet:
    digest, domains = windows.token_digest(tokens), ("made up",) * len(tokens)
    return TokenSet("made up", role, tokens, len(tokens), 0, digest, domains)


# Windows and their draw


def test_windows_are_consecutive_pieces_of_the_text_in_its_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "abcdefghij")
    tokens = load(path, n_samples=2, seq_len=4)
    assert tokens.tokens.dtype == torch.int64
    assert tokens.tokens.tolist() == [[97, 98, 99, 100], [101, 102, 103, 104]]
    assert tokens.n_available == 2


def test_windows_are_drawn_without_replacement_and_sorted(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(200, dtype=np.uint8))
    starts = load(tmp_path / "a.npy", n_samples=30, seq_len=5).tokens[:, 0].tolist()
    assert starts == sorted(set(starts))
    assert len(starts) == 30
    assert all(start % 5 == 0 for start in starts)


def test_the_draw_of_a_seed_stays_the_same_over_versions(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(200, dtype=np.uint8))
    tokens = load(tmp_path / "a.npy", n_samples=6, seq_len=5, seed=7)
    assert tokens.tokens[:, 0].tolist() == GOLDEN_STARTS
    assert tokens.digest == GOLDEN_DIGEST


def test_the_same_request_gives_equal_sets_and_another_seed_another_one(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(250, dtype=np.uint8))
    first, again = (load(tmp_path / "a.npy", n_samples=10) for _ in range(2))
    other = load(tmp_path / "a.npy", n_samples=10, seed=1)
    assert torch.equal(first.tokens, again.tokens)
    assert first == again
    assert other.digest != first.digest


def test_more_samples_of_the_same_seed_contain_the_fewer(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(250, dtype=np.uint8))
    few, many = (load(tmp_path / "a.npy", n_samples=n).tokens.tolist() for n in (5, 20))
    assert all(window in many for window in few)


def test_the_digest_depends_on_tokens_and_shape() -> None:
    tokens = torch.arange(12).view(3, 4)
    digests = {windows.token_digest(t) for t in (tokens, tokens.view(4, 3), tokens + 1)}
    assert len(digests) == 3


def test_provenance_is_json_and_says_asked_and_available(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "abcdefghijkl")
    tokens = load(path, n_samples=2, seq_len=4, role="search", seed=3)
    assert json.loads(json.dumps(tokens.provenance())) == {
        "source": str(path),
        "role": "search",
        "n_samples": 2,
        "seq_len": 4,
        "n_available": 3,
        "seed": 3,
        "digest": tokens.digest,
        "bos": None,
        "domains": {str(path): 2},
    }


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"role": "training"}, id="unknown role"),
        pytest.param({"n_samples": 0}, id="no sample"),
        pytest.param({"seq_len": -1}, id="negative length"),
        pytest.param({"seed": -1}, id="negative seed"),
        pytest.param({"seed": 2**63}, id="seed beyond 63 bits"),
    ],
)
def test_a_request_out_of_range_is_refused(change: dict[str, Any]) -> None:
    request = TextRequest("demo", "search", 1, 1, 2**63 - 1)
    with pytest.raises(DataError, match=str(next(iter(change.values())))):
        replace(request, **change)


def test_too_little_text_says_how_many_windows_exist(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "abcdefghij")
    with pytest.raises(DataError, match=r"3 windows of 4 tokens asked, its 10 tokens make 2;"):
        load(path, n_samples=3, seq_len=4)


@pytest.mark.parametrize("text", ["", "abc"], ids=["empty", "shorter than one window"])
def test_a_text_without_a_whole_window_is_too_short(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=f"its {len(text)} tokens make 0"):
        load(write(tmp_path / "a.txt", text), n_samples=1, seq_len=4)


# Local files


def test_a_long_text_is_tokenized_in_pieces_that_add_up(tmp_path: Path) -> None:
    line = "0123456789" * 1000 + "\n"
    text = line * 150 + "a" * (3 * sources.CHUNK)  # ends in a line that is longer than a piece
    tokenizer = CharTokenizer()
    tokens = load(write(tmp_path / "a.txt", text), 1, 1_000, tokenizer=tokenizer)
    assert tokenizer.n_calls == 3  # what texts start with, then CHUNK twice: 2M tokens are enough
    assert tokens.n_available == 2_000
    pieces = list(sources._read_path(tmp_path / "a.txt", CharTokenizer()))
    assert [len(piece) > sources.CHUNK for piece in pieces] == [True] * 3
    assert np.array_equal(np.concatenate(pieces), np.frombuffer(text.encode(), dtype=np.uint8))
    assert pieces[0][-1] == ord("\n")


def test_only_the_beginning_of_a_long_source_is_used(tmp_path: Path) -> None:
    values = np.zeros(windows.MIN_READ_TOKENS + 5_000, dtype=np.uint8)
    np.save(tmp_path / "a.npy", values)
    assert load(tmp_path / "a.npy", 1, 1_000).n_available == windows.MIN_READ_TOKENS // 1_000
    assert load(tmp_path / "a.npy", 252, 1_000).n_available == 252 * windows.READ_FACTOR - 11


def test_windows_line_ends_and_byte_order_marks_leave_no_trace(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.txt", "ab\ncd\n")
    other = write(tmp_path / "b.txt", "\ufeffab\r\ncd\r\n")
    assert all_tokens(plain, 6) == all_tokens(other, 6)


def test_documents_of_json_lines_end_in_eos(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl", {"id": "x", "text": "ab"}, {"text": ""}, {"text": "c"}
    )
    assert all_tokens(path, 5) == [97, 98, EOS, 99, EOS]


def test_documents_are_parted_by_a_blank_line_if_there_is_no_eos(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.json", {"text": "a"}, {"text": "b"})
    tokens = all_tokens(path, 6, tokenizer=CharTokenizer(eos_token_id=None))
    assert tokens == [97, 10, 10, 98, 10, 10]


def test_token_lists_of_json_lines_are_concatenated(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"tokens": [1]}, {"tokens": []}, {"tokens": [2, 3]})
    assert all_tokens(path, 3) == [1, 2, 3]


@pytest.mark.parametrize(
    ("record", "tokens"),
    [
        pytest.param({"id": "z", "text": "a", "input_ids": [1]}, [97, EOS], id="text wins"),
        pytest.param({"id": "z", "tokens": [7, 8]}, [7, 8], id="tokens before other strings"),
        pytest.param({"input_ids": [7, 8], "n": 2}, [7, 8], id="input_ids"),
        pytest.param({"n": 2, "content": "a"}, [97, EOS], id="the only string"),
    ],
)
def test_the_field_of_a_json_record(tmp_path: Path, record: object, tokens: list[int]) -> None:
    path = write_lines(tmp_path / "a.jsonl", record)
    assert all_tokens(path, len(tokens)) == tokens


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        pytest.param('{"text": "ab"}\n\n{"text"\n', "line 3 is not JSON", id="broken JSON"),
        pytest.param("5\n", "line 1 is 5 and not a JSON object", id="number"),
        pytest.param('{"n": 1}\n', "fields 'n' and none", id="no string"),
        pytest.param('{"text": "a"}\n{"body": "b"}\n', "line 2: field 'text'", id="field missing"),
        pytest.param('{"tokens": "abcd"}\n', "list of integers", id="text instead of ids"),
        pytest.param('{"tokens": [1, true]}\n', "list of integers", id="not all integers"),
        pytest.param('{"tokens": [1, 1.5]}\n', "list of integers", id="float ids"),
        pytest.param('{"tokens": [1, 1e30]}\n', "list of integers", id="huge float"),
        pytest.param(f'{{"tokens": [1, {10**30}]}}\n', "up to 64 bits", id="huge integer"),
        pytest.param(
            '{"tokens": [1, 256]}\n', "from 1 to 256; the tokenizer has 0 to 255", id="id"
        ),
    ],
)
def test_json_lines_that_cannot_be_read(tmp_path: Path, lines: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "a.jsonl", lines), 1, 1)


@pytest.mark.parametrize("shape", [(12,), (3, 4), (4, 3)], ids=["flat", "rows fit", "rows do not"])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16, np.dtype(">i4")])
def test_token_files_give_their_ids_in_row_order(
    tmp_path: Path, shape: tuple[int, ...], dtype: Any
) -> None:
    values = np.arange(12, dtype=dtype).reshape(shape)
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(values))
    save_file({"tokens": values.astype(np.int64)}, tmp_path / "a.safetensors")
    for name in ("a.npy", "fortran.npy", "a.safetensors"):
        tokens = load(tmp_path / name, n_samples=3, seq_len=4).tokens
        assert torch.equal(tokens, torch.arange(12).view(3, 4)), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(np.arange(4.0), "type float64; token ids are integers", id="floats"),
        pytest.param(np.array([0, -1]), "from -1 to 0; the tokenizer has 0 to 255", id="negative"),
        pytest.param(
            np.array([0, 256]), "from 0 to 256; the tokenizer", id="beyond the tokenizer"
        ),
        pytest.param(np.array(["a"], dtype=object), "cannot read", id="pickled objects"),
        pytest.param(np.empty(0, dtype=np.int64), "cannot read|0 tokens make 0", id="no token"),
    ],
)
def test_npy_files_that_are_not_token_ids(
    tmp_path: Path, values: np.ndarray[Any, Any], message: str
) -> None:
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "a.npy", 1, 1)


def test_safetensors_files_that_are_not_token_ids(tmp_path: Path) -> None:
    save_file({"ids": np.arange(4)}, tmp_path / "named.safetensors")
    save_file({"tokens": np.ones(4, dtype=np.float16)}, tmp_path / "float.safetensors")
    with pytest.raises(DataError, match=r"tensors \['ids'\]; the token ids must be called"):
        load(tmp_path / "named.safetensors")
    with pytest.raises(DataError, match="type F16; token ids are integers"):
        load(tmp_path / "float.safetensors")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".npy", ".safetensors"])
def test_a_damaged_file_is_a_data_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(DataError, match="cannot read"):
        load(path)


# Names


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match="'wikitext3'.*demo:search.*wikitext2, c4.*must exist"):
        load("wikitext3")


@pytest.mark.parametrize(
    ("source", "name"),
    [("", ""), (" ", ""), ("demo:test", "demo:test"), ("5", "5"), ("=0.5", "=0.5"), ("demo,", "")],
)
def test_an_empty_or_misspelled_name_is_unknown(source: str, name: str) -> None:
    with pytest.raises(
        DataError, match=f"source '{name}' is neither a known name nor an existing"
    ):
        load(source)


def test_folders_and_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder; give a file in \.txt"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"is a \.csv file; give a file in \.txt"):
        load(write(tmp_path / "a.csv", "a,b"))


# Several sources


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three texts of ten windows of one letter each: a, b, c."""
    return [str(write(tmp_path / f"{c}.txt", c * 40)) for c in "abc"]


@pytest.mark.parametrize(
    ("shares", "n_samples", "letters"),
    [
        pytest.param((), 10, "aaaabbbccc", id="equal shares, the rest to the first"),
        pytest.param((0.7, 0.2, 0.1), 10, "aaaaaaabbc", id="stated shares"),
        pytest.param((7, 2, 1), 10, "aaaaaaabbc", id="relative shares"),
        pytest.param((0.26, 0.16, 0.58), 5, "abccc", id="largest remainder first"),
    ],
)
def test_windows_are_drawn_in_the_shares(
    files: list[str], shares: tuple[float, ...], n_samples: int, letters: str
) -> None:
    stated = [f"{file}={share}" for file, share in zip(files, shares, strict=False)]
    source = ", ".join(stated or files)
    tokens = load(source, n_samples)
    assert "".join(chr(first) for first in tokens.tokens[:, 0]) == letters
    assert tokens.n_available == 30
    assert tokens.digest == windows.token_digest(tokens.tokens)


def test_every_window_of_a_mixture_has_its_source_as_domain(files: list[str]) -> None:
    tokens = load(f"{files[0]}=0.7,{files[1]}=0.3", 10)
    assert tokens.domains == (files[0],) * 7 + (files[1],) * 3
    assert tokens.provenance()["domains"] == {files[0]: 7, files[1]: 3}
    assert load(files[2], 3).domains == (files[2],) * 3


def test_domains_stay_with_their_windows(files: list[str]) -> None:
    tokens = load(f"{files[0]}=0.7,{files[1]}=0.3", 10)
    letters = {files[0]: "a", files[1]: "b"}
    mixed = windows.shuffled(tokens)
    assert mixed.domains != tokens.domains
    assert mixed.digest == windows.token_digest(mixed.tokens) != tokens.digest
    found = [chr(window) for window in mixed.tokens[:, 0]]
    assert found == [letters[name] for name in mixed.domains]


def test_a_sample_has_every_text_in_its_share(files: list[str]) -> None:
    tokens = load(f"{files[0]},{files[1]}", 10)
    sample = windows.sample_of(tokens, 4)
    assert torch.equal(sample.tokens, tokens.tokens[[0, 4, 8]])
    assert sample.domains == (files[0], files[0], files[1])
    assert sample.digest == windows.token_digest(sample.tokens) != tokens.digest
    assert windows.sample_of(tokens, 1).digest == tokens.digest


def test_the_reading_limit_of_a_mixture_goes_by_the_windows_of_each_text(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "MIN_READ_TOKENS", 1)
    assert load(f"{files[0]},{files[1]}", n_samples=2).n_available == 2 * windows.READ_FACTOR


def test_each_text_of_a_mixture_must_be_long_enough(files: list[str]) -> None:
    with pytest.raises(DataError, match=r"a\.txt' is too short: 11 windows"):
        load(f"{files[0]}=0.9,{files[1]}=0.1", n_samples=12)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param("demo=0.5,c4", "states 1 shares for 2 texts", id="a share is missing"),
        pytest.param("demo=0,c4=1", "share '0' of 'demo'", id="zero"),
        pytest.param("demo=nan", "share 'nan' of 'demo'", id="not a number"),
        pytest.param("demo=0.5,demo=0.5", "names a text twice", id="the same text twice"),
        pytest.param("demo=0.999,c4=0.001", "leave none for c4", id="a share of no window"),
    ],
)
def test_shares_that_cannot_be_met(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(source)


def test_a_path_may_contain_commas_and_equal_signs(tmp_path: Path) -> None:
    path = write(tmp_path / "a=0.5,b.txt", "abcdefgh")
    assert load(path).tokens[0].tolist() == [97, 98, 99, 100]


def test_a_source_that_is_too_long_for_a_name_is_unknown_or_a_mixture(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a known name nor"):
        load("x" * 5_000)
    names = [write(tmp_path / f"{'n' * 100}{i}.txt", "abcd" * 4) for i in range(4)]
    assert len(load(",".join(map(str, names)), 4).tokens) == 4


@pytest.mark.parametrize("name", ["~nobody-of-this-name/a.txt", "a\0b.txt"])
def test_a_name_that_no_file_can_have_is_unknown(name: str) -> None:
    with pytest.raises(DataError, match="neither a known name nor"):
        load(name)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("a.jsonl.gz", "unpack it"), ("a.parquet", "JSON lines"), ("a.npz", "numpy.save")],
)
def test_other_kinds_of_files_are_refused_with_the_way(
    tmp_path: Path, name: str, advice: str
) -> None:
    with pytest.raises(DataError, match=rf"is a \.\w+ file; give a file in .*: .*{advice}"):
        load(write(tmp_path / name, "x"))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match="is no regular file"):
        load(tmp_path / "a.txt")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_texts_in_other_encodings_are_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("plain words\n".encode(encoding) * 9)
    with pytest.raises(DataError, match=r"UTF-8.*iconv -f UTF-16"):
        load(tmp_path / "a.txt")


# The roles of a study


def test_two_roles_with_one_file_are_refused_before_it_is_read(files: list[str]) -> None:
    windows.check_sources({"calibration": f"{files[0]},{files[1]}", "search": files[2]})
    link = Path(files[0]).with_name("link.txt")
    link.symlink_to(files[0])
    for source in (files[0], f"{files[2]}=0.5,{link}=0.5"):
        with pytest.raises(DataError, match=r"calibration text and heldout text overlap: both"):
            windows.check_sources({"calibration": f"{files[0]},{files[1]}", "heldout": source})
    with pytest.raises(DataError, match="overlap"):
        windows.check_sources({"calibration": "demo", "search": "demo:calibration"})
    windows.check_sources({role: "demo=0.7,demo:code=0.3,c4=1" for role in sources.ROLES})


# Beginning of text

BOS = 1


def test_windows_start_as_the_tokenizer_starts_a_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "abcdefghij")
    tokens = load(path, n_samples=3, tokenizer=CharTokenizer(start=(BOS,)))
    assert [bytes(row[1:]) for row in tokens.tokens.tolist()] == [b"abc", b"def", b"ghi"]
    assert tokens.tokens[:, 0].tolist() == [BOS] * 3
    assert (tokens.n_available, tokens.provenance()["bos"]) == (3, [BOS])


def test_tokenizers_that_put_nothing_give_the_windows_of_before(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "abcdefghij")
    auto, never = (load(path, bos=bos) for bos in ("auto", "never"))
    assert auto == never and auto.bos == ()
    with_start = CharTokenizer(start=(BOS,))
    assert load(path, bos="never", tokenizer=with_start).digest == auto.digest


def test_a_beginning_of_text_can_be_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "abcdefghij")
    tokens = load(path, bos="always", tokenizer=CharTokenizer(bos_token_id=7))
    assert tokens.tokens[:, 0].tolist() == [7, 7]
    with pytest.raises(DataError, match="has no beginning-of-text token.*--bos auto"):
        load(path, bos="always")
    with pytest.raises(DataError, match="--bos 'on' is not known; use one of auto, always"):
        load(path, bos="on")


def test_rows_of_a_token_file_that_start_themselves_stay_whole(tmp_path: Path) -> None:
    rows = np.array([[BOS, 40, 41, 42], [BOS, 50, 51, 52], [BOS, 60, BOS, 62]])
    np.save(tmp_path / "a.npy", rows)
    tokens = load(tmp_path / "a.npy", n_samples=3, tokenizer=CharTokenizer(start=(BOS,)))
    assert tokens.tokens.tolist() == rows.tolist()


def test_two_tokens_may_start_a_text_and_must_leave_room(tmp_path: Path) -> None:
    path, tokenizer = write(tmp_path / "a.txt", "abcd"), CharTokenizer(start=(BOS, 2))
    assert load(path, seq_len=4, tokenizer=tokenizer).tokens.tolist() == [
        [BOS, 2, 97, 98],
        [BOS, 2, 99, 100],
    ]
    with pytest.raises(DataError, match="windows of 2 tokens asked.*starts a text with 2"):
        load(path, seq_len=2, tokenizer=tokenizer)


def test_what_windows_start_with_neither_hides_nor_makes_an_overlap() -> None:
    a = torch.arange(100, 163).view(1, 63)
    front = torch.tensor([[BOS]])
    started = replace(token_set(torch.cat([front, a], 1)), bos=(BOS,))
    shifted = torch.cat([front, torch.tensor([[9] * 7]), a, torch.tensor([[9] * 9])], 1)
    with pytest.raises(DataError, match="1 runs of 63 tokens"):
        check_disjoint(started, replace(token_set(shifted), bos=(BOS,)))
    check_disjoint(started, replace(token_set(torch.cat([front, a + 63], 1)), bos=(BOS,)))


# The hub, without one


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: Iterator[str]) -> list[tuple[Any, ...]]:
    """Puts a library `datasets` in place that gives these texts; returns the calls it gets."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*args: str, **options: Any) -> Iterator[dict[str, str]]:
        calls.append((*args, options))
        return ({"text": row} for row in rows)

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_wikitext2_rows_are_joined_by_blank_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_datasets(monkeypatch, iter(["", "a\n", "b"]))
    tokens = load("wikitext2", n_samples=7, seq_len=1, role="heldout").tokens.flatten()
    assert bytes(tokens.tolist()) == b"\n\na\n\n\nb"
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "test"})]


def test_c4_is_streamed_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = iter(["x" * 499_999] * 10)
    calls = fake_datasets(monkeypatch, rows)
    tokens = load("c4", n_samples=1, seq_len=500_000, role="search").tokens
    assert tokens[0, -1] == EOS
    assert len(list(rows)) == 2  # 4 million tokens = 8 documents were asked, two are left
    assert [call[1]["streaming"] for call in calls] == [True]


def test_c4_reads_a_bounded_number_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "C4_MAX_DOCUMENTS", 3)
    fake_datasets(monkeypatch, iter(["ab"] * 10))
    assert load("c4", n_samples=1, seq_len=3).n_available == 3


def test_every_role_reads_another_part_of_the_hub_data_sets() -> None:
    for parts in (sources.WIKITEXT_SPLITS, sources.C4_FILES):
        assert tuple(parts) == sources.ROLES
        assert len(set(parts.values())) == len(sources.ROLES)


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline() -> Iterator[str]:
        yield "ab"
        raise ConnectionError("no route to host")

    fake_datasets(monkeypatch, offline())
    with pytest.raises(DataError, match=r"ConnectionError: no route.*give a local \.txt") as error:
        load("c4")
    assert isinstance(error.value.__cause__, ConnectionError)


def test_a_missing_datasets_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load("wikitext2")


# Overlap


def test_one_file_for_two_roles_is_caught(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(256, size=20 * 100))
    a, b = (
        load(tmp_path / "a.npy", 12, 100, role=role, seed=seed)
        for seed, role in enumerate(("calibration", "search"))
    )
    with pytest.raises(DataError, match=r"calibration text .* search text .* overlap.*disjoint;"):
        check_disjoint(a, b)


@pytest.mark.parametrize(
    ("n_shared", "is_disjoint"), [(63, True), (64, False)], ids=["63 tokens", "64 tokens"]
)
def test_a_shared_run_counts_at_any_offset(n_shared: int, is_disjoint: bool) -> None:
    a = torch.randint(1000, (3, 200), generator=torch.Generator().manual_seed(0))
    b = torch.randint(1000, (5, 150), generator=torch.Generator().manual_seed(1))
    b[4, 150 - n_shared :] = a[1, 17 : 17 + n_shared]
    if is_disjoint:
        check_disjoint(token_set(a), token_set(b))
    else:
        with pytest.raises(DataError, match=r"1 runs of 64 .*windows 1 and 4"):
            check_disjoint(token_set(a), token_set(b))


def test_windows_shorter_than_a_run_are_compared_whole() -> None:
    a = torch.arange(32).view(4, 8)
    check_disjoint(token_set(a), token_set(a + 1))  # shares 7 of 8 tokens
    with pytest.raises(DataError, match="1 runs of 8 tokens"):
        check_disjoint(token_set(a[:3]), token_set(a[2:]))
    with pytest.raises(DataError, match="4 runs of 8 tokens"):
        check_disjoint(token_set(a), token_set(torch.arange(128).view(1, 128)))


def test_equal_tokens_in_another_order_are_no_overlap() -> None:
    a = torch.arange(100).view(1, 100)
    check_disjoint(token_set(a), token_set(a.flip(1)))


# The embedded texts


def test_demo_is_the_text_of_the_role(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    by_role = load("demo", 4, 32, role="heldout", tokenizer=demo_tokenizer)
    by_part = load("demo:heldout", 4, 32, role="search", tokenizer=demo_tokenizer)
    other = load("demo", 4, 32, role="search", tokenizer=demo_tokenizer)
    assert by_role.digest == by_part.digest != other.digest
    assert by_part.role == "search"


def test_demo_windows_decode_to_passages_of_the_text(
    demo_tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = demo.text_path("search").read_text(encoding="utf-8")
    for window in load("demo:search", 5, 64, tokenizer=demo_tokenizer).tokens:
        passage = demo_tokenizer.decode(window.tolist())
        assert str(passage).strip("\ufffd") in text


def test_whole_demo_parts_share_no_passage(books: list[TokenSet]) -> None:
    for a, b in itertools.combinations(books, 2):
        check_disjoint(a, b)


def test_demo_code_is_that_of_the_role(demo_tokenizer: PreTrainedTokenizerBase) -> None:
    for role in sources.ROLES:
        code = load("demo:code", 4, 32, role=role, tokenizer=demo_tokenizer)
        named = load(f"demo:code-{role}", 4, 32, tokenizer=demo_tokenizer)
        assert code.digest == named.digest
        assert code.domains == ("demo:code",) * 4


def test_demo_code_has_windows_enough_and_shares_no_passage(
    demo_tokenizer: PreTrainedTokenizerBase, books: list[TokenSet]
) -> None:
    parts = [f"demo:code-{role}" for role in sources.ROLES]
    code = [load(part, 120, 256, tokenizer=demo_tokenizer) for part in parts]
    for a, b in itertools.combinations(code, 2):
        check_disjoint(a, b)
    for a, b in itertools.product(code, books):
        check_disjoint(a, b)


def test_modules_of_demo_code_are_named_once_and_listed_in_the_terms() -> None:
    terms = (demo.text_path("code-heldout").parents[1] / "TERMS.md").read_text(encoding="utf-8")
    seen: list[str] = []
    for role in sources.ROLES:
        text = demo.text_path(f"code-{role}").read_text(encoding="utf-8")
        named = re.findall(r"^# Python standard library: (.+)$", text, re.MULTILINE)
        line = re.search(rf"^Modules of `code-{role}.txt`.*$", terms, re.MULTILINE)
        assert line and re.findall(r"`(\S+\.py)`", line[0]) == named
        seen += named
    assert len(set(seen)) == len(seen) == 25
    assert "Python Software Foundation; All Rights Reserved" in terms
