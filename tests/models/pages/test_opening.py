"""Models whose weights stay in files: the same as in memory, and the files made whole or not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alphaquant.errors import ModelError, StoreError
from alphaquant.models.loading import load_model
from alphaquant.models.mapping import map_model, weights_digest
from alphaquant.models.pages import prepared
from alphaquant.models.pages.opening import Opened, open_weights
from alphaquant.models.pages.private_maps import can_map
from alphaquant.models.walk import batches_of, releasing, walk
from alphaquant.testing.checkpoints import save_tiny
from alphaquant.testing.models import FAMILIES, tiny_model, tiny_tokens

pytestmark = pytest.mark.skipif(not can_map(), reason="needs Linux")

QUICK = ("llama", "olmoe", "gpt_oss", "deepseek_v3", "llama4_text")
"""Dense, merged experts, transposed ones with biases, buffers in the state, a text part."""
SAVED = [
    pytest.param(family, marks=[] if family in QUICK else [pytest.mark.slow])
    for family in FAMILIES
    if family != "listed_moe"  # transformers makes none from files
]
WEIGHTS = "model.safetensors"
TOKENS = tiny_tokens(2, 9)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same state and buffers: names, dtypes, numbers."""
    of_a, of_b = ({**m.state_dict(), **dict(m.named_buffers())} for m in (a, b))
    return list(of_a) == list(of_b) and all(
        x.dtype == of_b[n].dtype and torch.equal(x, of_b[n]) for n, x in of_a.items()
    )


@pytest.fixture
def stages() -> list[tuple[str, int, int]]:
    """Progress calls."""
    return []


@pytest.fixture
def open_again(tmp_path: Path, stages: list[tuple[str, int, int]]) -> Callable[..., Opened]:
    """Open with one cache for the test."""

    def run(source: Path, dtype: str = "auto") -> Opened:
        return open_weights(source, dtype, tmp_path / "cache", lambda *at: stages.append(at))

    return run


def copies(tmp_path: Path) -> list[Path]:
    """Folders of prepared checkpoints."""
    found = (tmp_path / "cache").iterdir()
    return [f for f in found if f.is_dir() and f.name != "read"]


@pytest.mark.parametrize("family", SAVED)
@torch.no_grad()
def test_a_model_in_files_is_the_model_in_memory(
    family: str, tmp_path: Path, open_again: Callable[..., Opened]
) -> None:
    source = save_tiny(tmp_path / "source", family)
    plain = load_model(source)
    for opened in (open_again(source), open_again(source)):
        assert type(opened.model) is type(plain) and not opened.model.training
        assert same(opened.model, plain) and opened.pages is not None
        assert not any(p.requires_grad for p in opened.model.parameters())
        assert torch.equal(opened.model(TOKENS).logits, plain(TOKENS).logits)
        assert opened.model.config.dtype == plain.config.dtype  # type: ignore[union-attr]
        mapped = {
            t.data_ptr() for layer in opened.pages.layers.values() for t in layer.tensors.values()
        } | {t.data_ptr() for t in opened.pages.rest.tensors.values()}
        assert all(p.data_ptr() in mapped for p in opened.model.parameters())
        found = map_model(opened.model, pages=opened.pages)
        assert weights_digest(found) == weights_digest(map_model(plain))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["olmoe", "llama"])
def test_only_the_first_opening_makes_a_copy(
    family: str,
    dtype: str,
    tmp_path: Path,
    open_again: Callable[..., Opened],
    stages: list[tuple[str, int, int]],
) -> None:
    source = save_tiny(tmp_path / "source", family)
    first = open_again(source, dtype)
    is_dense = family == "llama" and dtype == "bfloat16"
    assert first.is_in_place == is_dense
    assert stages == ([] if is_dense else [("prepare", n, 3) for n in range(4)])
    assert len(copies(tmp_path)) == (0 if is_dense else 1)
    stages.clear()
    assert same(open_again(source, dtype).model, first.model) and not stages


def test_a_dense_checkpoint_with_a_tied_head_is_used_in_place(
    tmp_path: Path, open_again: Callable[..., Opened]
) -> None:
    source = save_tiny(tmp_path / "source", "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(source / WEIGHTS)
    opened = open_again(source, "bfloat16")
    model: Any = opened.model
    assert opened.is_in_place and not copies(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert same(model, load_model(source, dtype="bfloat16"))
    before = (source / WEIGHTS).read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (source / WEIGHTS).read_bytes() == before


def test_shards_and_their_order_make_no_difference(
    tmp_path: Path, open_again: Callable[..., Opened]
) -> None:
    source = save_tiny(tmp_path / "source")
    tensors = load_file(source / WEIGHTS)
    places = {}
    names = sorted(tensors, key=lambda n: hash(n) % 7)  # experts of a layer in many files
    for i in range(4):
        file = f"part-{i}.safetensors"
        save_file({n: tensors[n] for n in names[i::4]}, source / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names[i::4], file)
    expected = load_model(source)
    (source / WEIGHTS).unlink()
    (source / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    assert same(open_again(source).model, expected)


def test_files_of_torch_stay_in_memory(tmp_path: Path, open_again: Callable[..., Opened]) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    expected = load_model(source)
    torch.save(load_file(source / WEIGHTS), source / "pytorch_model.bin")
    (source / WEIGHTS).unlink()
    opened = open_again(source)
    assert opened.pages is None and opened.folder is None
    assert same(opened.model, expected)


def change(source: Path, how: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(source / WEIGHTS)
    how(tensors)
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["olmoe", "llama"])
@pytest.mark.parametrize(
    "how",
    [
        lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"),
        lambda tensors: tensors.pop("model.norm.weight"),
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}),
        lambda tensors: tensors.update({"lm_head.weight": torch.ones(7, 32)}),
        lambda tensors: [tensors.pop(n) for n in list(tensors) if ".mlp." in n and "gate" in n],
        lambda tensors: [
            tensors.pop(n) for n in list(tensors) if "experts.2.up" in n or "up_proj" in n
        ],
    ],
    ids=["no q", "no norm", "short norm", "short head", "no gates", "no up"],
)
def test_what_is_missing_or_misshapen_is_the_error_that_it_is_in_memory(
    family: str, how: Any, tmp_path: Path, open_again: Callable[..., Opened]
) -> None:
    source = save_tiny(tmp_path / "source", family)
    change(source, how)
    with pytest.raises(ModelError) as expected:
        load_model(source, dtype="bfloat16")
    for _ in range(2):
        with pytest.raises(ModelError) as found:
            open_again(source, "bfloat16")
        assert str(found.value) == str(expected.value)
        assert not copies(tmp_path)


def test_further_tensors_do_not_matter_and_other_numbers_make_another_copy(
    tmp_path: Path, open_again: Callable[..., Opened]
) -> None:
    source = save_tiny(tmp_path / "source")
    first = open_again(source)
    change(source, lambda tensors: tensors.update(mtp=torch.ones(3)))
    assert same(open_again(source).model, first.model)
    change(source, lambda tensors: tensors["model.norm.weight"].mul_(2))
    third = open_again(source)
    assert len(copies(tmp_path)) == 3 and same(third.model, load_model(source))


def flip(folder: Path) -> None:
    file = folder / "layer-001.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda folder: (folder / "layer-000.safetensors").unlink(),
        lambda folder: (folder / "rest.safetensors").write_bytes(b""),
        lambda folder: (folder / "form.json").write_text("{"),
        lambda folder: (folder / "form.json").write_text("[]"),
        lambda folder: (folder / "form.json").unlink(),
    ],
    ids=["a bit", "a file", "cut", "form", "other form", "no form"],
)
def test_a_damaged_copy_is_made_anew(
    damage: Callable[[Path], object],
    tmp_path: Path,
    open_again: Callable[..., Opened],
    stages: list[tuple[str, int, int]],
) -> None:
    source = save_tiny(tmp_path / "source")
    expected = load_model(source)
    open_again(source)
    (folder,) = copies(tmp_path)
    damage(folder)
    stages.clear()
    assert same(open_again(source).model, expected)
    assert stages and copies(tmp_path) == [folder]


def test_a_copy_that_was_stopped_leaves_nothing(
    tmp_path: Path, open_again: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "source")
    write, calls = prepared.write_aligned, []

    def stop(path: Path, tensors: Any) -> str:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        return write(path, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepared, "write_aligned", stop)
        open_again(source)
    assert not copies(tmp_path)
    # One that was killed could not even tidy up.
    part = calls[0].parent
    part.mkdir()
    (part / "layer-000.safetensors").write_bytes(b"half")
    assert same(open_again(source).model, load_model(source))
    assert [f.name for f in copies(tmp_path)] == [part.name.removesuffix(".part")]


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source = save_tiny(tmp_path / "source")
    with pytest.raises(StoreError, match=r"cannot make .*file/cache.* with --cache or \$ALPHA"):
        open_weights(source, "auto", tmp_path / "file" / "cache")


def test_no_room_for_the_copy_is_one_line_before_the_work(
    tmp_path: Path, open_again: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "source")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match=r"take \d+ bytes, and 1000 are free .* --cache or") as e:
        open_again(source)
    assert "\n" not in str(e.value)


@torch.no_grad()
def test_a_walk_holds_the_pages_of_one_layer(
    tmp_path: Path, open_again: Callable[..., Opened]
) -> None:
    opened = open_again(save_tiny(tmp_path / "source", num_hidden_layers=4))
    found = map_model(opened.model, pages=opened.pages)
    batches = batches_of(TOKENS, 1)
    expected = [opened.model(batch).logits for batch in batches]
    found.release()
    results: list[Any] = []
    for step in walk(found, batches, results):
        step.run()
        held = [i for i, x in enumerate(found.layers) if x.pages and x.pages.resident_bytes()]
        assert held == [step.layer.index]
    for result, logits in zip(results, expected, strict=True):
        assert torch.equal(result.logits, logits)
    with releasing(found):
        opened.model(TOKENS)
    assert all(x.pages and not x.pages.resident_bytes() for x in found.layers)
    left = walk(found, batches)
    next(left).run()
    left.close()  # in the middle
    assert all(x.pages and not x.pages.resident_bytes() for x in found.layers)


@torch.no_grad()
def test_written_weights_survive_a_walk_until_they_are_restored(
    tmp_path: Path, open_again: Callable[..., Opened]
) -> None:
    opened = open_again(save_tiny(tmp_path / "source"))
    found = map_model(opened.model, pages=opened.pages)
    expected = opened.model(TOKENS).logits
    for view in found.views.values():
        view.mul_(0.5)
    changed = opened.model(TOKENS).logits
    list(walk(found, batches_of(TOKENS, 1)))
    found.release()
    assert torch.equal(opened.model(TOKENS).logits, changed)
    assert not torch.equal(changed, expected)
    for layer in found.layers:
        assert layer.pages is not None
        layer.pages.restore()
    assert torch.equal(opened.model(TOKENS).logits, expected)


def test_a_model_without_weights_has_tied_modules_as_transformers_ties_them(
    tmp_path: Path, open_again: Callable[..., Opened]
) -> None:
    """Both tied tensors are in the files; transformers compares them."""
    model: Any = tiny_model("llama", tie_word_embeddings=True, vocab_size=4096)
    source = tmp_path / "source"
    model.to(torch.bfloat16).save_pretrained(source)
    change(
        source,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        ),
    )
    assert same(open_again(source, "bfloat16").model, load_model(source, dtype="bfloat16"))
