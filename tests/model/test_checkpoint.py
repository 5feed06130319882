import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedbt_app.errors import FedBTError
from fedbt_app.model.checkpoint import Checkpoint, find_model, read_config
from fedbt_app.parts import HeadKind

Tensors = dict[str, torch.Tensor]
FILES = ("model.safetensors", "pytorch_model.bin")


@pytest.fixture
def stored(tiny_bert: Path) -> Tensors:
    return load_file(tiny_bert / "model.safetensors")


@pytest.fixture
def folder_of(tiny_bert: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(tensors: Tensors | None, file: str = "model.safetensors", **config: Any) -> Path:
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_bert, folder, ignore=shutil.ignore_patterns("model.safetensors"))
        values = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(values))
        if tensors is not None and file.endswith(".bin"):
            torch.save(tensors, folder / file)
        elif tensors is not None:
            save_file(tensors, folder / file)
        return folder

    return make


def old_names(tensors: Tensors) -> Tensors:
    renamed = {}
    for name, value in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        )
        renamed[f"bert.{name}"] = value
    return renamed


# Reading ------------------------------------------------------------------------------------------


def test_names_without_prefix_are_read_by_their_canonical_names(
    tiny_bert: Path, stored: Tensors
) -> None:
    checkpoint = Checkpoint(tiny_bert)
    assert not any(name.startswith("bert.") for name in stored)
    for name, value in stored.items():
        assert f"bert.{name}" in checkpoint
        assert torch.equal(checkpoint.tensor(f"bert.{name}"), value)
    assert "embeddings.word_embeddings.weight" not in checkpoint
    assert "classifier.weight" not in checkpoint


def test_gamma_and_beta_of_old_exports_are_weight_and_bias(
    stored: Tensors, folder_of: Callable[..., Path]
) -> None:
    for file in FILES:
        checkpoint = Checkpoint(folder_of(old_names(stored), file))
        for kind in ("weight", "bias"):
            wanted = stored[f"encoder.layer.2.output.LayerNorm.{kind}"]
            assert torch.equal(
                checkpoint.tensor(f"bert.encoder.layer.2.output.LayerNorm.{kind}"), wanted
            )


def test_half_precision_is_read_as_float32(stored: Tensors, folder_of: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(
        folder_of({name: value.to(torch.bfloat16) for name, value in stored.items()})
    )
    read = checkpoint.tensor("bert.pooler.dense.weight")
    assert read.dtype == torch.float32
    assert torch.equal(read, stored["pooler.dense.weight"].to(torch.bfloat16).float())


def test_safetensors_win_over_a_bin_file(stored: Tensors, folder_of: Callable[..., Path]) -> None:
    folder = folder_of(stored)
    torch.save({name: value + 1 for name, value in stored.items()}, folder / "pytorch_model.bin")
    assert torch.equal(
        Checkpoint(folder).tensor("bert.pooler.dense.bias"), stored["pooler.dense.bias"]
    )


def test_a_lacking_tensor_is_named(stored: Tensors, folder_of: Callable[..., Path]) -> None:
    del stored["encoder.layer.1.output.dense.bias"]
    with pytest.raises(
        FedBTError, match=r"lacks tensor bert\.encoder\.layer\.1\.output\.dense\.bias"
    ):
        Checkpoint(folder_of(stored)).fingerprint(HeadKind.TOKEN)


def test_label_names_come_in_the_order_of_their_ids(
    stored: Tensors, folder_of: Callable[..., Path]
) -> None:
    names = {str(index): f"class {12 - index}" for index in reversed(range(12))}
    assert Checkpoint(folder_of(stored, id2label=names)).labels == tuple(
        f"class {12 - i}" for i in range(12)
    )
    assert Checkpoint(folder_of(stored, id2label=None)).labels == ()


# Fingerprint --------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_weights_whatever_file_and_names(
    tiny_bert: Path, stored: Tensors, folder_of: Callable[..., Path]
) -> None:
    wanted = Checkpoint(tiny_bert).fingerprint(HeadKind.SEQUENCE)
    double = {name: value.double() for name, value in stored.items()}
    assert (
        Checkpoint(folder_of(stored, "pytorch_model.bin")).fingerprint(HeadKind.SEQUENCE) == wanted
    )
    for same in (old_names(stored), double):
        assert Checkpoint(folder_of(same)).fingerprint(HeadKind.SEQUENCE) == wanted


def test_a_head_counts_for_the_fingerprint_where_the_task_starts_from_it(
    tiny_bert: Path, stored: Tensors, folder_of: Callable[..., Path]
) -> None:
    pooler = stored | {"pooler.dense.bias": stored["pooler.dense.bias"] + 1e-6}
    no_pooler = {name: value for name, value in stored.items() if not name.startswith("pooler.")}
    base, others = (
        Checkpoint(tiny_bert),
        [Checkpoint(folder_of(tensors)) for tensors in (pooler, no_pooler)],
    )
    for other in others:
        assert other.fingerprint(HeadKind.SEQUENCE) != base.fingerprint(HeadKind.SEQUENCE)
        assert other.fingerprint(HeadKind.TOKEN) == base.fingerprint(HeadKind.TOKEN)


def test_other_weights_have_another_fingerprint(
    tiny_bert: Path, stored: Tensors, folder_of: Callable[..., Path]
) -> None:
    base = Checkpoint(tiny_bert).fingerprint(HeadKind.MASKED_LM)
    for name in ("embeddings.word_embeddings.weight", "encoder.layer.3.output.LayerNorm.bias"):
        changed = stored | {name: stored[name].clone()}
        changed[name].flatten()[0] += 1e-6
        assert Checkpoint(folder_of(changed)).fingerprint(HeadKind.MASKED_LM) != base


def test_the_same_weights_that_compute_otherwise_have_another_fingerprint(
    tiny_bert: Path, stored: Tensors, folder_of: Callable[..., Path]
) -> None:
    base = Checkpoint(tiny_bert).fingerprint(HeadKind.MASKED_LM)
    changes: tuple[dict[str, Any], ...] = (
        {"layer_norm_eps": 1e-5},
        {"num_attention_heads": 2},
        {"hidden_act": "relu"},
    )
    for change in changes:
        assert Checkpoint(folder_of(stored, **change)).fingerprint(HeadKind.MASKED_LM) != base


def test_the_tokenizer_id_changes_with_the_vocabulary(
    tiny_bert: Path, stored: Tensors, folder_of: Callable[..., Path]
) -> None:
    folder = folder_of(stored)
    assert Checkpoint(folder).tokenizer_id == Checkpoint(tiny_bert).tokenizer_id
    with (folder / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert Checkpoint(folder).tokenizer_id != Checkpoint(tiny_bert).tokenizer_id


# What is refused ----------------------------------------------------------------------------------


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_code_pickled_in_a_bin_file_is_not_run(
    tmp_path: Path, stored: Tensors, folder_of: Callable[..., Path]
) -> None:
    mark = tmp_path / "ran"
    folder = folder_of(stored | {"x": Payload(mark)}, "pytorch_model.bin")
    with pytest.raises(FedBTError, match=r"not a plain PyTorch weights file"):
        Checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Payload(mark)}))
    with pytest.raises(FedBTError, match=r"not a plain PyTorch weights file"):
        Checkpoint(folder)
    assert not mark.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert mark.exists()  # it would have run


def test_a_truncated_weights_file_is_refused_by_name(
    stored: Tensors, folder_of: Callable[..., Path]
) -> None:
    for file in FILES:
        path = folder_of(stored, file) / file
        content = path.read_bytes()
        for kept in (5000, 7, 0):
            path.write_bytes(content[:kept])
            with pytest.raises(FedBTError, match=file):
                Checkpoint(path.parent)


def test_a_folder_without_weights_is_refused(folder_of: Callable[..., Path]) -> None:
    with pytest.raises(FedBTError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        Checkpoint(folder_of(None))


def test_a_missing_or_malformed_config_is_refused(tmp_path: Path) -> None:
    for content in (None, "{", "[]", "\xff"):
        if content is not None:
            (tmp_path / "config.json").write_text(content, encoding="latin-1")
        with pytest.raises(FedBTError, match=r"no readable config\.json"):
            read_config(tmp_path)


def test_a_model_folder_that_does_not_exist_is_not_looked_up_on_the_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "fedbt_app.model.checkpoint._from_hub", lambda model: pytest.fail(f"asked for {model}")
    )
    for model in ("/no/such/folder", "./none", "~/none-here", "some/deep/folder"):
        with pytest.raises(FedBTError, match=f"model folder {model} does not exist"):
            find_model(model)


def test_a_model_folder_is_found(tiny_bert: Path) -> None:
    assert find_model(str(tiny_bert)) == tiny_bert
    assert Checkpoint(find_model("embedded")).architecture.depth == 6


def test_a_base_that_would_not_be_trained_as_what_it_is_is_refused(
    stored: Tensors, folder_of: Callable[..., Path]
) -> None:
    with pytest.raises(FedBTError, match=r"is_decoder=true in its config\.json"):
        Checkpoint(folder_of(stored, is_decoder=True))
    untied = Checkpoint(folder_of(stored, tie_word_embeddings=False))
    untied.fingerprint(HeadKind.SEQUENCE)
    with pytest.raises(FedBTError, match=r"tie_word_embeddings=false"):
        untied.fingerprint(HeadKind.MASKED_LM)


def test_weights_that_are_not_those_of_the_config_are_refused_by_both_shapes(
    stored: Tensors, folder_of: Callable[..., Path]
) -> None:
    rows, width = stored["embeddings.word_embeddings.weight"].shape
    other = Checkpoint(folder_of(stored, vocab_size=rows + 1))
    wanted = rf"word_embeddings\.weight is \({rows}, {width}\), .* \({rows + 1}, {width}\)"
    with pytest.raises(FedBTError, match=wanted):
        other.fingerprint(HeadKind.SEQUENCE)


def test_a_classifier_of_any_number_of_labels_is_no_reason_to_refuse(
    stored: Tensors, folder_of: Callable[..., Path]
) -> None:
    classifier = {"classifier.weight": torch.zeros(3, 32), "classifier.bias": torch.zeros(3)}
    trained = {f"bert.{name}": value for name, value in stored.items()} | classifier
    folder = folder_of(trained, id2label={"0": "a", "1": "b", "2": "c"})
    assert Checkpoint(folder).fingerprint(HeadKind.SEQUENCE)


def test_a_missing_tokenizer_is_refused(stored: Tensors, folder_of: Callable[..., Path]) -> None:
    folder = folder_of(stored)
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(FedBTError, match=r"has no tokenizer: copy its vocab\.txt"):
        Checkpoint(folder).tokenizer()
