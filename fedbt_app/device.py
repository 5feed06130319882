"""Where to compute and in which number format: one code path for CPUs and GPUs."""

import torch

from fedbt_app.errors import FedBTError


def pick_device(wanted: str) -> torch.device:
    """Return the device to compute on; `auto` takes a GPU where there is one."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise FedBTError(f"device={wanted} is not a device: use auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FedBTError(f"device={wanted} but this machine has no usable GPU: use device=auto or cpu")
    return device


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Say whether matrix products run in bfloat16 (autocast); weights and optimizer stay float32.

    `auto` does where the hardware multiplies bfloat16 itself: emulated, it would be slower.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
