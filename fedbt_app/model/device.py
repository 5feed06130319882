"""Where to compute and in which number format: one code path for CPUs and GPUs."""

import torch

from fedbt_app.errors import FedBTError


def pick_device(wanted: str) -> torch.device:
    """Return the device to compute on; `auto` takes a GPU where there is one.

    Raises
    ------
    FedBTError
        If `wanted` is neither auto, cpu nor a GPU that is there.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise FedBTError(f"device={wanted} is not a device: use auto, cpu, cuda or cuda:1")
    if device.type == "cuda":
        _check_gpu(wanted, device.index)
        # or the memory meter of a numbered GPU asks a driver that nothing has started
        torch.cuda.init()
    return device


def _check_gpu(wanted: str, number: int | None) -> None:
    if not torch.cuda.is_available():
        raise FedBTError(
            f"device={wanted} but this machine has no usable GPU: use device=auto or cpu"
        )
    if number is None:
        return
    last = torch.cuda.device_count() - 1
    if number > last:
        raise FedBTError(f"device={wanted} but the GPUs here are 0 to {last}: name one of those")


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Say whether matrix products run in bfloat16 (autocast); weights and optimizer stay float32.

    `auto` does where the hardware multiplies bfloat16 faster than float32. Intel's AVX512 has an
    instruction for it that is none the faster: there it takes AMX, which a virtual machine may
    hide.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not hasattr(torch.cpu, "get_capabilities"):  # older torch cannot tell
        return False
    capabilities = torch.cpu.get_capabilities()
    if "Intel" in capabilities.get("cpu_name", ""):
        return bool(capabilities.get("amx_bf16"))
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
