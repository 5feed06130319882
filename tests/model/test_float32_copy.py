"""Half precision on disk: frozen tensors are views of a float32 copy in the cache, which is there once for all."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import client_app
import server_app
from fedbt_app.config import RunConfig
from fedbt_app.files import PARTIAL
from fedbt_app.model import float32_copy as copy_module
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.model.float32_copy import COPIES_KEPT, float32_copy
from fedbt_app.model.local_model import build
from fedbt_app.model.weights import ModelSpec, Weights
from fedbt_app.parts import HeadKind
from fedbt_app.plan import untrained_plan
from fedbt_app.tasks import TASKS
from fedbt_app.wire.local_grid import LocalGrid, simulated

Tensors = dict[str, torch.Tensor]
FILES = ("model.safetensors", "pytorch_model.bin")
NAME = "bert.encoder.layer.2.output.dense.weight"


@pytest.fixture
def stored(tiny_bert: Path) -> Tensors:
    return load_file(tiny_bert / "model.safetensors")


@pytest.fixture
def base(tiny_bert: Path, tmp_path: Path, stored: Tensors) -> Callable[..., Path]:
    """Return a function that writes the tiny BERT in a number format."""

    def make(kind: torch.dtype, file: str = "model.safetensors", **more: torch.Tensor) -> Path:
        folder = tmp_path / f"base-{len(list(tmp_path.glob('base-*')))}"
        shutil.copytree(tiny_bert, folder, ignore=shutil.ignore_patterns("model.safetensors"))
        tensors = {name: value.to(kind) for name, value in stored.items()} | more
        if file.endswith(".bin"):
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file)
        return folder

    return make


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a cache folder of this test's own."""
    return tmp_path / "cache"


def copies(place: Path) -> list[Path]:
    return sorted((place / "float32").glob("*.safetensors"))


def mapped_file(tensor: torch.Tensor) -> str:
    """Return the file that a tensor's memory is a view of; nothing where it is the process's own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *file = line.split(maxsplit=5)
        begin, end = (int(value, 16) for value in span.split("-"))
        if begin <= tensor.data_ptr() < end:
            # others are [heap] and the like
            return next((name for name in file if name.startswith("/")), "")
    return ""


# What is read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_all_tensors_are_views_of_the_copy_with_the_values_of_the_source(
    kind: torch.dtype, file: str, base: Callable[..., Path], stored: Tensors, place: Path
) -> None:
    checkpoint = Checkpoint(base(kind, file), place)
    read = {name: checkpoint.tensor(f"bert.{name}") for name in stored}
    [copy] = copies(place)
    for name, tensor in read.items():
        assert torch.equal(tensor, stored[name].to(kind).to(torch.float32))
        assert mapped_file(tensor) == str(copy), name


def test_frozen_tensors_of_a_built_model_are_views_of_the_copy(
    base: Callable[..., Path], place: Path
) -> None:
    weights = Weights(
        Checkpoint(base(torch.bfloat16), place), lambda part: {}, ModelSpec(TASKS["ner"], ("O",))
    )
    head = {name: torch.zeros(shape) for name, shape in weights.lacking("head").items()}
    weights = Weights(weights.checkpoint, lambda part: head if part == "head" else {}, weights.spec)
    module = build(weights, untrained_plan(4)).module
    [copy] = copies(place)
    files = {
        name: mapped_file(value)
        for name, value in module.named_parameters()
        if name.startswith("bert.")
    }
    assert len(files) > 60
    assert set(files.values()) == {str(copy)}


def test_float32_is_read_where_it_is_whatever_integers_stand_beside_it(
    base: Callable[..., Path], place: Path
) -> None:
    for file in FILES:
        folder = base(torch.float32, file, **{"embeddings.position_ids": torch.arange(64)[None]})
        assert mapped_file(Checkpoint(folder, place).tensor(NAME)) == str(folder / file)
        assert not place.exists()


def test_identities_are_those_of_the_source_and_its_values(
    base: Callable[..., Path], place: Path
) -> None:
    folder = base(torch.float16)
    with_cache, without = Checkpoint(folder, place), Checkpoint(folder)
    for _ in range(2):  # made, and found
        assert with_cache.fingerprint(HeadKind.SEQUENCE) == without.fingerprint(HeadKind.SEQUENCE)
        assert with_cache.file_id == without.file_id
        with_cache = Checkpoint(folder, place)


def test_source_that_was_replaced_has_another_copy(
    base: Callable[..., Path], place: Path, stored: Tensors
) -> None:
    folder = base(torch.float16)
    Checkpoint(folder, place).tensor(NAME)
    save_file(
        {name: (value + 1).half() for name, value in stored.items()}, folder / "model.safetensors"
    )
    wanted = (stored[NAME.removeprefix("bert.")] + 1).half().float()
    assert torch.equal(Checkpoint(folder, place).tensor(NAME), wanted)


def test_scalars_and_tensors_without_elements_are_copied_too(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(1.5).half(),
        "none": torch.zeros(0, 4).half(),
        "turned": torch.rand(3, 5).half().T,
    }
    found = load_file(float32_copy(tmp_path, "a", list(tensors), tensors.__getitem__))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name].float()) for name in tensors)


def test_server_and_all_clients_share_one_copy(
    base: Callable[..., Path], settings: Callable[..., dict[str, Any]], place: Path
) -> None:
    values = settings(
        model=str(base(torch.float16)),
        cache_dir=str(place),
        num_rounds=1,
        max_train_examples=24,
        max_test_examples=8,
    )
    server_app.run(LocalGrid(client_app.app, values, simulated(2)), RunConfig.load(values))
    assert len(copies(place)) == 1


# One for all --------------------------------------------------------------------------------------


def test_copy_is_written_once_however_many_want_it_at_once(tmp_path: Path) -> None:
    tensors, read, found, start = {"a": torch.ones(3).half()}, [], [], threading.Barrier(6)

    def slowly(name: str) -> torch.Tensor:
        read.append(name)
        threading.Event().wait(0.1)
        return tensors[name]

    def work() -> None:
        start.wait()
        found.append(float32_copy(tmp_path, "a", ["a"], slowly))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 6
    assert read == ["a", "a"], "for its shape, and for its values"


def test_copies_used_last_are_kept(base: Callable[..., Path], place: Path) -> None:
    folders = [base(torch.float16) for _ in range(COPIES_KEPT + 1)]
    by_base = []
    for number, folder in enumerate(folders[:-1]):
        Checkpoint(folder, place).tensor(NAME)
        (made,) = set(copies(place)) - set(by_base)
        by_base.append(made)
        os.utime(made, (number, number))
    Checkpoint(folders[0], place).tensor(NAME)  # used again: no longer the oldest
    Checkpoint(folders[-1], place).tensor(NAME)
    assert len(copies(place)) == COPIES_KEPT
    assert by_base[0].exists()
    assert not by_base[1].exists()


def test_copy_that_others_crowd_out_while_it_is_used_is_done_without(
    base: Callable[..., Path], place: Path
) -> None:
    checkpoint = Checkpoint(base(torch.float16), place)
    before = checkpoint.tensor(NAME)
    [copy] = copies(place)
    copy.unlink()
    assert torch.equal(checkpoint.tensor(NAME), before)


def test_damaged_copy_is_made_anew_and_what_a_killed_writer_left_is_dropped(
    base: Callable[..., Path], place: Path
) -> None:
    folder = base(torch.float16)
    before = Checkpoint(folder, place).tensor(NAME).clone()
    [copy] = copies(place)
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-100])
    copy.with_name(f"{copy.name}.12345678{PARTIAL}").write_bytes(whole[:50])
    assert torch.equal(Checkpoint(folder, place).tensor(NAME), before)
    assert copies(place) == [copy]
    assert copy.read_bytes() == whole
    assert {path.name for path in copy.parent.iterdir()} == {copy.name, "lock"}


# A cache that can't be written --------------------------------------------------------------------


def test_full_disk_leaves_no_half_copy_and_is_told_in_one_line(
    base: Callable[..., Path],
    place: Path,
    stored: Tensors,
    monkeypatch: pytest.MonkeyPatch,
    flower_log: list[str],
) -> None:
    def half(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    checkpoint = Checkpoint(base(torch.float16), place)
    with monkeypatch.context() as patch:
        patch.setattr(copy_module, "_write", half)
        for name in ("encoder.layer.2.output.dense.weight", "pooler.dense.bias"):
            assert torch.equal(checkpoint.tensor(f"bert.{name}"), stored[name].half().float())
    assert [path.name for path in (place / "float32").iterdir()] == ["lock"]
    [line] = flower_log
    assert "No space left on device" in line
    assert "converted in memory" in line
    assert "set cache-dir" in line


def test_cache_that_is_no_folder_costs_memory_only(
    base: Callable[..., Path], place: Path, stored: Tensors, flower_log: list[str]
) -> None:
    place.write_text("a file")
    read = Checkpoint(base(torch.bfloat16), place).tensor(NAME)
    assert torch.equal(read, stored[NAME.removeprefix("bert.")].bfloat16().float())
    assert "(Not a directory)" in flower_log[0]


def test_without_a_cache_half_precision_is_converted_in_memory_and_nothing_is_said(
    base: Callable[..., Path], stored: Tensors, flower_log: list[str]
) -> None:
    read = Checkpoint(base(torch.float16)).tensor(NAME)
    assert torch.equal(read, stored[NAME.removeprefix("bert.")].half().float())
    assert mapped_file(read) == ""
    assert flower_log == []
