"""The demo's files exist, load, and their three texts have nothing in common."""

import itertools
import re

import pytest

from alphaquant.demo import TEXT_PARTS, model_path, text_path
from alphaquant.errors import DataError

PAIRS = list(itertools.combinations(TEXT_PARTS, 2))
MAX_TEXT_BYTES = 3_000_000
PASSAGE_CHARS = 200
HEADING = re.compile(r"^# Title: (.+)\n\n## Author: (.+)\n\n## Year: (\d+)\n", re.MULTILINE)


def read(part: str) -> str:
    return text_path(part).read_text(encoding="utf-8")


def shared_passages(one: str, other: str, n_chars: int) -> list[str]:
    """Aligned half-length blocks of `one` found in `other`.

    A shared passage of n_chars contains at least one whole block of half that, at any offset.
    """
    half = n_chars // 2
    blocks = {one[i : i + half] for i in range(0, len(one) - half + 1, half)}
    found = (other[i : i + half] for i in range(len(other) - half + 1))
    return [block for block in found if block in blocks]


def test_model_folder_holds_checkpoint_and_tokenizer() -> None:
    names = {path.name for path in model_path().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_model_loads_and_predicts_next_tokens_better_than_chance() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path())
    ids = tokenizer(read("heldout")[:2000], return_tensors="pt").input_ids[:, :256]
    with torch.no_grad():
        nats_per_token = float(model(input_ids=ids, labels=ids).loss)
    # Chance is ln 4096 = 8.3; held-out books were at about 4.2 (perplexity 70) after training.
    assert nats_per_token < 6.0


def test_texts_take_at_most_three_megabytes() -> None:
    assert sum(text_path(part).stat().st_size for part in TEXT_PARTS) <= MAX_TEXT_BYTES


@pytest.mark.parametrize("part", TEXT_PARTS)
def test_text_is_long_enough_for_several_hundred_windows(part: str) -> None:
    assert len(read(part)) > 700_000


@pytest.mark.parametrize("pair", PAIRS)
def test_no_passage_of_two_hundred_characters_is_in_two_texts(pair: tuple[str, str]) -> None:
    assert shared_passages(read(pair[0]), read(pair[1]), PASSAGE_CHARS) == []


@pytest.mark.parametrize("pair", PAIRS)
def test_no_book_is_in_two_texts(pair: tuple[str, str]) -> None:
    books = [{(m[1], m[2]) for m in HEADING.finditer(read(part))} for part in pair]
    assert all(books)
    assert books[0].isdisjoint(books[1])


def test_held_out_authors_are_in_no_other_text() -> None:
    authors = {part: {m[2] for m in HEADING.finditer(read(part))} for part in TEXT_PARTS}
    assert authors["heldout"].isdisjoint(authors["calibration"] | authors["search"])


def test_every_book_was_published_before_1930_and_is_listed_in_the_terms() -> None:
    terms = (model_path().parent / "TERMS.md").read_text(encoding="utf-8")
    for title, author, year in itertools.chain.from_iterable(
        HEADING.findall(read(part)) for part in TEXT_PARTS
    ):
        assert int(year) < 1930
        assert f"{author}: {title} ({year})" in terms


@pytest.mark.parametrize("offset", [0, 1, 99, 100, 150])
def test_passage_check_finds_a_copied_passage_at_any_offset(offset: int) -> None:
    one = "".join(f"{i:05d} " for i in range(1000))
    copied = one[offset : offset + PASSAGE_CHARS]
    assert shared_passages(one, f"before {copied} after", PASSAGE_CHARS)


def test_unknown_part_is_refused_with_the_possible_ones() -> None:
    with pytest.raises(DataError, match="'train'.*calibration, search, heldout"):
        text_path("train")
