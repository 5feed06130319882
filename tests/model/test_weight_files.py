"""Where a checkpoint's tensors may lie: in one file or in shards, bare or as a trainer left them."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

from fedbt_app.errors import FedBTError
from fedbt_app.model.checkpoint import Checkpoint, find_model, without_wrappers
from fedbt_app.parts import HeadKind

Tensors = dict[str, torch.Tensor]
NAMES = ("model.safetensors", "pytorch_model.bin")


@pytest.fixture
def stored(tiny_bert: Path) -> Tensors:
    return load_file(tiny_bert / "model.safetensors")


@pytest.fixture
def folder(tiny_bert: Path, tmp_path: Path) -> Path:
    """Make a copy of the tiny BERT without its weights."""
    made = tmp_path / "base"
    shutil.copytree(tiny_bert, made, ignore=shutil.ignore_patterns("model.safetensors"))
    return made


@pytest.fixture
def saved(folder: Path) -> Callable[[Any], Path]:
    """Return a function that puts an object into pytorch_model.bin."""

    def save(content: Any) -> Path:
        torch.save(content, folder / "pytorch_model.bin")
        return folder

    return save


def shard(folder: Path, tensors: Tensors, name: str) -> list[Path]:
    """Write two shards and their index."""
    stem, _, ending = name.rpartition(".")
    halves = sorted(tensors)[::2], sorted(tensors)[1::2]
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        path = folder / f"{stem}-{number:05}-of-00002.{ending}"
        weight_map |= dict.fromkeys(half, path.name)
        part = {tensor: tensors[tensor] for tensor in half}
        if ending == "bin":
            torch.save(part, path)
        else:
            save_file(part, path)
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [folder / file for file in sorted(set(weight_map.values()))]


def assert_is(tiny_bert: Path, folder: Path) -> None:
    """The checkpoint in `folder` has the tiny BERT's tensors."""
    wanted = Checkpoint(tiny_bert).fingerprint(HeadKind.SEQUENCE)
    assert Checkpoint(folder).fingerprint(HeadKind.SEQUENCE) == wanted


# Shards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_shards_are_read_by_their_index(
    tiny_bert: Path, folder: Path, stored: Tensors, name: str
) -> None:
    shards = shard(folder, stored, name)
    assert_is(tiny_bert, folder)
    before = Checkpoint(folder).file_id
    assert all(str(path.resolve()) in before for path in shards)
    shards[1].touch()
    assert Checkpoint(folder).file_id != before


def test_shards_that_the_library_writes_are_read(tiny_bert: Path, folder: Path) -> None:
    BertModel.from_pretrained(tiny_bert).save_pretrained(folder, max_shard_size="30kB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    assert_is(tiny_bert, folder)


def mapped_file(tensor: torch.Tensor) -> str:
    """Return the name of the file that the system has mapped where the tensor is."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, file = line.split()
        start, end = (int(number, 16) for number in span.split("-"))
        if start <= tensor.data_ptr() < end:
            return Path(file).name
    raise AssertionError("nowhere")


@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_a_shard_are_views_of_its_file(folder: Path, stored: Tensors, name: str) -> None:
    shards = [path.name for path in shard(folder, stored, name)]
    checkpoint = Checkpoint(folder)
    for place, tensor in enumerate(sorted(stored)[:2]):
        assert mapped_file(checkpoint.tensor(f"bert.{tensor}")) == shards[place]


def test_half_precision_in_shards_is_copied_as_float32_once(
    folder: Path, stored: Tensors, tmp_path: Path
) -> None:
    shard(folder, {name: value.bfloat16() for name, value in stored.items()}, NAMES[0])
    read = Checkpoint(folder, tmp_path / "cache").tensor("bert.pooler.dense.weight")
    assert torch.equal(read, stored["pooler.dense.weight"].bfloat16().float())
    assert len(list((tmp_path / "cache" / "float32").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("name", NAMES)
def test_what_is_amiss_with_shards_is_named(folder: Path, stored: Tensors, name: str) -> None:
    first, second = shard(folder, stored, name)
    index = folder / f"{name}.index.json"
    content = json.loads(index.read_text())
    second.rename(second.with_suffix(".away"))
    with pytest.raises(FedBTError, match=rf"index\.json names {second.name}, which is not there"):
        Checkpoint(folder)
    second.with_suffix(".away").rename(second)
    for wrong in ("../outside.bin", "/etc/passwd"):
        index.write_text(json.dumps({"weight_map": {"pooler.dense.bias": wrong}}))
        with pytest.raises(FedBTError, match="which is not there"):
            Checkpoint(folder)
    moved = content["weight_map"] | {sorted(stored)[0]: second.name}
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(FedBTError, match=rf"{second.name} lacks {sorted(stored)[0]}"):
        Checkpoint(folder)
    for broken in ("{", "[]", "{}", '{"weight_map": []}'):
        index.write_text(broken)
        with pytest.raises(FedBTError, match=r"is not an index of shards"):
            Checkpoint(folder)
    index.unlink()
    with pytest.raises(FedBTError, match=rf"nor the \.index\.json of either, but .*{first.name}"):
        Checkpoint(folder)


# What a trainer wraps around a state dict ---------------------------------------------------------


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def test_a_state_dict_is_found_in_what_a_trainer_saved(
    tiny_bert: Path, saved: Callable[[Any], Path], stored: Tensors
) -> None:
    wrapped: list[Mapping[str, Any]] = [
        {"state_dict": stored},
        {"epoch": 3, "step": torch.tensor(7), "model_state_dict": prefixed(stored, "module.")},
        {"state_dict": prefixed(stored, "model.bert."), "optimizer": {"state": {0: {}}}},
        prefixed(stored, "module.bert."),
        prefixed(stored, "_orig_mod.module."),
    ]
    for content in wrapped:
        assert_is(tiny_bert, saved(content))


def test_a_prefix_goes_only_where_all_names_have_it_and_never_the_models_own() -> None:
    assert without_wrappers(["module.a", "module.b"], "bert") == {"module.a": "a", "module.b": "b"}
    assert without_wrappers(["module.a", "b"], "bert") == {"module.a": "module.a", "b": "b"}
    assert without_wrappers(["model.a"], "model") == {"model.a": "model.a"}
    assert without_wrappers([], "bert") == {}


def test_what_is_ambiguous_or_no_weights_is_named(
    saved: Callable[[Any], Path], stored: Tensors
) -> None:
    several = {"model": stored, "ema": stored}
    with pytest.raises(FedBTError, match=r"several sets of tensors \(ema, model\)"):
        Checkpoint(saved(several))
    with pytest.raises(FedBTError, match=r"holds no tensors, but args, epoch: save a state dict"):
        Checkpoint(saved({"epoch": 3, "args": {"lr": 1.0}}))
    with pytest.raises(FedBTError, match=r"not a plain PyTorch weights file"):
        Checkpoint(saved([1, 2]))
    other = Checkpoint(saved(prefixed(stored, "student.")))
    with pytest.raises(FedBTError, match=rf"has {len(stored)} tensors \(student\.embeddings"):
        other.fingerprint(HeadKind.TOKEN)


# Other things that are there ----------------------------------------------------------------------


def test_weights_of_another_kind_are_named(folder: Path) -> None:
    (folder / "tf_model.h5").touch()
    with pytest.raises(FedBTError, match=r"but tf_model\.h5: .*save_pretrained"):
        Checkpoint(folder)


def test_a_file_given_as_the_model_is_answered_with_its_folder(tiny_bert: Path) -> None:
    file = tiny_bert / "model.safetensors"
    with pytest.raises(FedBTError, match=rf"is a file: give its folder, {tiny_bert}$"):
        find_model(str(file))


def test_a_vocabulary_is_loaded_beside_a_config_without_a_type(
    tiny_bert: Path, folder: Path, stored: Tensors
) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    save_file(stored, folder / "model.safetensors")
    assert_is(tiny_bert, folder)
    assert Checkpoint(folder).tokenizer_facts == Checkpoint(tiny_bert).tokenizer_facts


@pytest.mark.parametrize("name", NAMES)
def test_a_hub_models_shards_are_asked_for(
    folder: Path, stored: Tensors, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {path.name for path in shard(folder, stored, name)}
    asked: list[str] = []

    def snapshot_download(model: str, allow_patterns: list[str]) -> str:
        asked[:] = allow_patterns
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_model("someone/large") == folder
    assert all(any(Path(file).match(pattern) for pattern in asked) for file in shards)
