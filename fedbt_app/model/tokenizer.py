"""What a tokenizer does: its fingerprint, a few words on it, and whether it fits its checkpoint.

Read off the loaded tokenizer and never off its files: one tokenizer has several layouts on disk.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedbt_app.errors import FedBTError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ROLES = ("cls_token", "sep_token", "pad_token", "mask_token", "unk_token")
_STRAYS = (
    0.001  # of a vocabulary: so many upper-case pieces may have slipped into one of small letters
)
# How a row is cut or filled up, and how pieces become text again, are no matter of the pieces.
_NOT_COMPARED = ("version", "truncation", "padding", "decoder", "post_processor", "added_tokens")


@dataclass(frozen=True)
class TokenizerFacts:
    """What a run has to know of a tokenizer.

    Attributes
    ----------
    fingerprint : SHA-256 over all that decides which pieces a text becomes, and their ids
    description : a few words, of what most often tells two tokenizers apart
    warnings : what a person should know before training with it
    """

    fingerprint: str
    description: str
    warnings: tuple[str, ...]


def tokenizer_facts(tokenizer: "PreTrainedTokenizerFast") -> TokenizerFacts:
    """Read them off a transformers tokenizer."""
    text = json.dumps(_behaviour(tokenizer), sort_keys=True)
    casing = "cased"
    if _lowercases(tokenizer):
        casing = "lower-casing"
    return TokenizerFacts(
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        description=f"{entries(tokenizer)} pieces, {casing}",
        warnings=tuple(_warnings(tokenizer)),
    )


def check_size(tokenizer: "PreTrainedTokenizerFast", vocabulary: int, source: str) -> None:
    """Refuse a tokenizer with ids that the embedding of `vocabulary` rows does not have."""
    needed = entries(tokenizer)
    if needed > vocabulary:
        raise FedBTError(
            f"{source}: the tokenizer has {needed} entries, the embedding {vocabulary}: call "
            "resize_token_embeddings and save the model, or take the added tokens out of the tokenizer's files"
        )


def entries(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return how many rows of an embedding its ids need."""
    return 1 + max(tokenizer.get_vocab().values())


def _behaviour(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    does = {name: value for name, value in stored.items() if name not in _NOT_COMPARED}
    does["normalizer"] = _spelt_out(does["normalizer"])
    special = {role: getattr(tokenizer, role) for role in _ROLES}
    added = stored["added_tokens"]
    does["added"] = [token for token in added if token["content"] not in special.values()]
    does["special"] = [[*item, getattr(tokenizer, f"{item[0]}_id")] for item in special.items()]
    # what is put around a text and between two, however the file says it
    pair = tokenizer("a", "a")
    does["around"] = [tokenizer("a")["input_ids"], pair["input_ids"], pair.get("token_type_ids")]
    return does


def _spelt_out(normalizer: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Say what BERT's normaliser leaves open: without a word on accents, it strips them where it
    lower-cases.
    """
    if not normalizer or normalizer.get("strip_accents", "") is not None:
        return normalizer
    return {**normalizer, "strip_accents": normalizer["lowercase"]}


def _lowercases(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Say whether it makes no difference between capital and small letters."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and "A" not in normalizer.normalize_str("A")


def _warnings(tokenizer: "PreTrainedTokenizerFast") -> Iterator[str]:
    """Yield what a person should know before training with it: a casing that is not its
    vocabulary's.
    """
    special = set(tokenizer.all_special_tokens)
    pieces = [piece for piece in tokenizer.get_vocab() if piece not in special]
    capitals = sum(any(letter.isupper() for letter in piece) for piece in pieces)
    lowering = _lowercases(tokenizer)
    if lowering and capitals > _STRAYS * len(pieces):
        yield (
            f"the vocabulary has {capitals} pieces with upper-case letters but the tokenizer lower-cases, so that "
            'they are never used: put {"do_lower_case": false} into its tokenizer_config.json if the model is cased'
        )
    if not lowering and not capitals and "a" in pieces:
        yield (
            "the vocabulary has no piece with upper-case letters but the tokenizer does not lower-case: put "
            '{"do_lower_case": true} into its tokenizer_config.json'
        )
