"""A tokenizer is known by what it does, and told where it does not fit its checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedbt_app.errors import FedBTError
from fedbt_app.model.checkpoint import Checkpoint, find_model
from fedbt_app.model.tokenizer import TokenizerFacts, tokenizer_facts

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
Folder = Callable[..., Path]


@pytest.fixture
def folder_of(tiny_bert: Path, tmp_path: Path) -> Folder:
    """Return a function that makes a folder of a vocabulary alone, and of what else is given."""

    def make(words: list[str] | None = None, **tokenizer_config: Any) -> Path:
        folder = tmp_path / f"tokenizer-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        shutil.copy(tiny_bert / "config.json", folder)
        shutil.copy(tiny_bert / "model.safetensors", folder)
        pieces = [*SPECIAL, *(WORDS if words is None else words)]
        (folder / "vocab.txt").write_text("\n".join(pieces))
        if tokenizer_config:
            (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        return folder

    return make


def facts(folder: Path) -> TokenizerFacts:
    return Checkpoint(folder).tokenizer_facts


def saved_again(folder: Path, change: Callable[[PreTrainedTokenizerFast], Any]) -> Path:
    """Save the tokenizer of `folder` in the library's own layout, changed."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    other = folder.with_name(f"{folder.name}-again")
    tokenizer.save_pretrained(other)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, other)
    return other


# Fingerprint --------------------------------------------------------------------------------------


def test_a_vocabulary_alone_and_the_file_that_is_saved_of_it_have_one_fingerprint(
    folder_of: Folder,
) -> None:
    for settings in ({}, {"do_lower_case": False}, {"do_lower_case": True}):
        alone = folder_of(**settings)
        again = saved_again(alone, lambda tokenizer: None)
        assert not (again / "vocab.txt").exists()
        assert facts(again) == facts(alone)


def test_lower_casing_is_the_default_that_a_file_may_spell_out(folder_of: Folder) -> None:
    assert facts(folder_of()) == facts(folder_of(do_lower_case=True))
    assert facts(folder_of()) == facts(folder_of(do_lower_case=True, strip_accents=True))


def test_how_rows_are_cut_or_filled_up_is_no_part_of_it(folder_of: Folder) -> None:
    def cutting(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.backend_tokenizer.enable_truncation(16)
        tokenizer.backend_tokenizer.enable_padding(length=16)

    plain = folder_of()
    assert facts(saved_again(plain, cutting)).fingerprint == facts(plain).fingerprint
    assert facts(folder_of(model_max_length=16)).fingerprint == facts(plain).fingerprint


def test_whatever_makes_other_pieces_of_a_text_changes_the_fingerprint(folder_of: Folder) -> None:
    plain = folder_of()
    others = [
        folder_of(do_lower_case=False),
        folder_of(strip_accents=False),
        folder_of(tokenize_chinese_chars=False),
        folder_of(mask_token="severe"),
        folder_of([*WORDS, "more"]),
        folder_of([*reversed(WORDS)]),
        saved_again(folder_of(), lambda tokenizer: tokenizer.add_tokens(["renal failure"])),
    ]
    prints = [tokenizer_facts(Checkpoint(other).load_tokenizer()).fingerprint for other in others]
    assert len({facts(plain).fingerprint, *prints}) == 1 + len(others)


def test_the_description_has_size_and_casing(folder_of: Folder) -> None:
    size = len(SPECIAL) + len(WORDS)
    assert facts(folder_of()).description == f"{size} pieces, lower-casing"
    assert facts(folder_of(do_lower_case=False)).description == f"{size} pieces, cased"


# What does not fit --------------------------------------------------------------------------------


def test_a_tokenizer_larger_than_the_embedding_is_refused_by_both_numbers(
    tiny_bert: Path, folder_of: Folder
) -> None:
    rows = Checkpoint(tiny_bert).architecture.dimensions.vocabulary
    words = [f"word{number}" for number in range(rows - len(SPECIAL))]
    assert len(Checkpoint(folder_of(words)).tokenizer()) == rows
    too_large = saved_again(folder_of(words), lambda tokenizer: tokenizer.add_tokens(["[NAME]"]))
    wanted = rf"tokenizer has {rows + 1} entries, the embedding {rows}: .*resize_token_embeddings"
    with pytest.raises(FedBTError, match=wanted):
        Checkpoint(too_large).tokenizer()


def test_a_cased_vocabulary_with_a_lower_casing_tokenizer_is_told_with_the_mend(
    folder_of: Folder,
) -> None:
    cased = ["COPD", "Knee", *WORDS]
    (warning,) = facts(folder_of(cased)).warnings
    assert "2 pieces with upper-case letters but the tokenizer lower-cases" in warning
    assert '{"do_lower_case": false} into its tokenizer_config.json' in warning
    assert facts(folder_of(cased, do_lower_case=False)).warnings == ()


def test_small_letters_alone_with_a_tokenizer_that_keeps_capitals_are_told(
    folder_of: Folder,
) -> None:
    small = ["a", *WORDS]
    (warning,) = facts(folder_of(small, do_lower_case=False)).warnings
    assert '{"do_lower_case": true} into its tokenizer_config.json' in warning
    assert facts(folder_of(small)).warnings == ()


def test_nothing_is_told_of_a_tokenizer_that_fits(tiny_bert: Path) -> None:
    assert facts(tiny_bert).warnings == ()
    assert facts(find_model("embedded")).warnings == ()
