"""Which device is taken, and which are refused in one line."""

import pytest
import torch

from fedbt_app.errors import FedBTError
from fedbt_app.model.device import pick_device, use_bfloat16


def test_what_is_no_device_of_ours_is_refused() -> None:
    for wanted in ("mps", "meta", "gpu", "", "cpu:x"):
        with pytest.raises(
            FedBTError, match=f"device={wanted} is not a device: use auto, cpu, cuda or cuda:1"
        ):
            pick_device(wanted)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FedBTError, match="no usable GPU"):
        pick_device("cuda:0")
    assert pick_device("auto") == torch.device("cpu")


def test_a_numbered_gpu_is_there_and_its_driver_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "init", lambda: started.append(True))
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert started == [True]
    with pytest.raises(FedBTError, match="device=cuda:2 but the GPUs here are 0 to 1"):
        pick_device("cuda:2")


def test_bfloat16_is_taken_where_the_processor_is_faster_at_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    for found, faster in (
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_bf16": False}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert use_bfloat16("auto", cpu) is faster
        assert use_bfloat16("bf16", cpu)
        assert not use_bfloat16("float32", cpu)
