"""Lines of the paper's results, made up."""

from typing import Any


def line(method: str = "FedBT", value: float = 0.5, **changes: Any) -> dict[str, Any]:
    """Return a finished cell."""
    about = {"table": "finetune", "dataset": "notes", "method": method, "variant": "", "seed": 1}
    costs = {
        "train_flops": 10,
        "stock_flops": 40,
        "uplink_bytes": 4,
        "downlink_bytes": 2,
        "client_seconds": 1.0,
    }
    rest = {
        "metric": "accuracy",
        "value": value,
        "initial": 0.1,
        "curve": [],
        "tried": {},
        "wall_seconds": 1.0,
        "clients": 6,
        "cpu": "new",
    }
    return about | costs | rest | changes
