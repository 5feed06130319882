import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from fedbt_app import tensors as tensors_module
from fedbt_app.client.pool import RUNS_KEPT, ParameterPool
from fedbt_app.errors import FedBTError
from fedbt_app.parts import PartState
from fedbt_app.tensors import Tensors, digest

RUN = "0123456789abcdef" * 2


def some(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(20, 30, generator=generator),
        "a.bias": torch.randn(20, generator=generator),
    }


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def part_file(pool: ParameterPool, part: str) -> Path:
    (file,) = pool.folder.glob(f"{part}.*")
    return file


def test_what_is_stored_is_read_bit_for_bit_by_a_later_pool_of_the_client(tmp_path: Path) -> None:
    state = ParameterPool(tmp_path, RUN, "a").store("block.3", 7, some())
    later = ParameterPool(tmp_path, RUN, "a")
    assert same(later.tensors("block.3"), some())
    assert later.states() == {"block.3": state} == {"block.3": PartState(7, digest(some()))}


def test_storing_a_part_again_replaces_it_and_leaves_the_others(tmp_path: Path) -> None:
    pool = ParameterPool(tmp_path, RUN, "a")
    for part, version, seed in (("head", 1, 1), ("block.0", 1, 2), ("head", 2, 3)):
        pool.store(part, version, some(seed))
    assert same(pool.tensors("head"), some(3))
    assert same(pool.tensors("block.0"), some(2))
    assert {part: state.version for part, state in pool.states().items()} == {
        "head": 2,
        "block.0": 1,
    }
    assert len(list(pool.folder.iterdir())) == 2


def test_a_part_that_was_never_stored_is_not_held(tmp_path: Path) -> None:
    pool = ParameterPool(tmp_path, RUN, "a")
    assert pool.states() == {}
    assert pool.tensors("head") == {}


def test_clients_and_runs_have_pools_of_their_own(tmp_path: Path) -> None:
    ParameterPool(tmp_path, RUN, "a").store("head", 1, some())
    assert ParameterPool(tmp_path, RUN, "b").states() == {}
    assert ParameterPool(tmp_path, "f" * 32, "a").states() == {}


def test_equal_digests_mean_equal_names_and_bits() -> None:
    tensors = some()
    assert digest(tensors) == digest(dict(reversed(tensors.items())))
    assert digest(tensors) == digest(
        {"a.weight": tensors["a.weight"].T.contiguous().T, "a.bias": tensors["a.bias"]}
    )
    renamed = {"b.weight": tensors["a.weight"], "a.bias": tensors["a.bias"]}
    nudged = {name: value.clone() for name, value in tensors.items()}
    nudged["a.weight"][3, 3] = torch.nextafter(nudged["a.weight"][3, 3], torch.tensor(9.0))
    assert len({digest(tensors), digest(renamed), digest(nudged)}) == 3


def test_a_flipped_byte_anywhere_makes_the_part_not_held(tmp_path: Path) -> None:
    for place in (0.0, 0.02, 0.5, 0.999):
        pool = ParameterPool(tmp_path, RUN, "a")
        pool.store("head", 1, some())
        pool.store("block.1", 1, some(1))
        content = bytearray(part_file(pool, "head").read_bytes())
        content[int(place * len(content))] ^= 0x04
        part_file(pool, "head").write_bytes(content)
        assert set(pool.states()) == {"block.1"}
        assert pool.tensors("head") == {}


def test_every_header_byte_that_is_damaged_makes_the_part_not_held_or_leaves_it_equal(
    tmp_path: Path,
) -> None:
    pool = ParameterPool(tmp_path, RUN, "a")
    state = pool.store("head", 1, some())
    whole = part_file(pool, "head").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in range(header):
        content = bytearray(whole)
        content[place] ^= 0x10
        part_file(pool, "head").write_bytes(content)
        held = pool.tensors("head")
        assert not held or same(held, some()), f"byte {place}"
        if "head" in pool.states():
            assert pool.states()["head"].digest == state.digest


def test_a_truncated_file_counts_as_not_held(tmp_path: Path) -> None:
    for kept in (0, 4, 60, 1000, -1):
        pool = ParameterPool(tmp_path, RUN, "a")
        pool.store("head", 1, some())
        part_file(pool, "head").write_bytes(part_file(pool, "head").read_bytes()[:kept])
        assert pool.states() == {}
        assert pool.tensors("head") == {}
        pool.store("head", 2, some(2))
        assert pool.states()["head"].version == 2


def test_a_malformed_lineage_is_refused_and_makes_no_folder(tmp_path: Path) -> None:
    paths = ("../../etc", "..", "", "/", f"../{RUN}")
    for lineage in (*paths, RUN[:-1], RUN + "0", RUN.upper(), RUN[:-1] + "/", f"{RUN}\n"):
        with pytest.raises(FedBTError, match="malformed run lineage"):
            ParameterPool(tmp_path / "pools", lineage, "a")
        assert list(tmp_path.iterdir()) == []


def test_a_clients_name_cannot_lead_out_of_its_run(tmp_path: Path) -> None:
    for client in ("../../outside", "a/b", "..", "Ward 3 (Köln)"):
        pool = ParameterPool(tmp_path / "pools", RUN, client)
        pool.store("head", 1, some())
        assert pool.folder.parent == tmp_path / "pools" / RUN
        assert [path.name for path in tmp_path.iterdir()] == ["pools"]


def test_an_interrupted_write_leaves_the_old_part_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    pool = ParameterPool(tmp_path, RUN, "a")
    before = pool.store("head", 1, some(1))
    for owner, name in ((tensors_module, "save_file"), (os, "replace"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(KeyboardInterrupt):
                pool.store("head", 2, some(2))
        assert same(pool.tensors("head"), some(1))
        assert pool.states() == {"head": before}
        assert [path.name for path in pool.folder.iterdir()] == ["head.safetensors"]


def test_a_full_disk_is_named_with_what_to_do_and_leaves_no_half_written_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = ParameterPool(tmp_path, RUN, "a")
    full = "No space left on device"
    for error in (OSError(28, full), SafetensorError(f"I/O error: {full}")):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(tensors_module, "save_file", fail)
        with pytest.raises(FedBTError, match=rf"{full}.*free some space.*pool-dir"):
            pool.store("head", 1, some())
        assert list(pool.folder.iterdir()) == []


def test_a_pool_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FedBTError, match=r"pool .*file.* cannot be written \(Not a directory\)"):
        ParameterPool(tmp_path / "file", RUN, "a")


def test_residual_of_a_round_that_is_done_again_is_the_one_from_before_it(tmp_path: Path) -> None:
    pool = ParameterPool(tmp_path, RUN, "a")
    pool.store_residual("block.1", some(1))  # round 1, from the base
    assert pool.residual("block.1") == {}  # it did not come to count
    pool.store_residual("block.1", some(2))
    pool.store("block.1", 1, some())
    assert same(pool.residual("block.1"), some(2))
    pool.store_residual("block.1", some(3))
    assert same(pool.residual("block.1"), some(2))
    assert pool.residual("block.11") == {}


def test_residuals_of_two_versions_are_kept_and_no_more(tmp_path: Path) -> None:
    pool = ParameterPool(tmp_path, RUN, "a")
    for version in range(1, 12):
        pool.store("head", version, some())
        pool.store_residual("head", some(version))
    assert len(list((pool.folder / "residuals").iterdir())) == 2
    assert same(pool.residual("head"), some(10))
    assert pool.states().keys() == {"head"}


def test_a_half_written_file_of_a_killed_process_is_not_a_part(tmp_path: Path) -> None:
    pool = ParameterPool(tmp_path, RUN, "a")
    (pool.folder / "tmpabc.partial").write_bytes(b"half")
    assert pool.states() == {}


def test_only_the_runs_used_last_are_kept(tmp_path: Path) -> None:
    runs = [f"{number:032x}" for number in range(RUNS_KEPT + 2)]
    (tmp_path / "notes").mkdir()  # not a run: not ours to drop
    for number, run in enumerate(runs[:-1]):
        ParameterPool(tmp_path, run, "a").store("head", 1, some())
        os.utime(tmp_path / run, (number, number))
    ParameterPool(tmp_path, runs[1], "b")  # used again: no longer the oldest
    ParameterPool(tmp_path, runs[-1], "a")
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"notes", runs[1], *runs[-2:]}
    assert ParameterPool(tmp_path, runs[1], "a").states() != {}
