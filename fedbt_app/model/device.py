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
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise FedBTError(f"device={wanted} is not a device: use auto, cpu, cuda or cuda:1")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise FedBTError(
                f"device={wanted} but this machine has no usable GPU: use device=auto or cpu"
            )
        if device.index is not None and device.index >= (there := torch.cuda.device_count()):
            raise FedBTError(
                f"device={wanted} but the GPUs here are 0 to {there - 1}: name one of those"
            )
        # or the memory meter of a numbered GPU asks a driver that nothing has started
        torch.cuda.init()
    return device


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
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    intel = "Intel" in capabilities.get("cpu_name", "")
    return bool(capabilities.get("amx_bf16") or (capabilities.get("avx512_bf16") and not intel))
