"""How a client optimises."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True)
class TrainSettings:
    """How a client optimises.

    `tokens_per_batch` (0: no limit) bounds a batch's padded word pieces beside `batch_size`;
    `micro_batch_size` (0: the batch) is how many examples run at once, their gradients added up;
    `seed` is that of dropout, order and masking.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    tokens_per_batch: int = 0
    micro_batch_size: int = 0
    checkpointing: bool = False
    seed: tuple[int, ...] = (0,)


class Optimizer:
    """AdamW that steps a tensor in the backward pass, once its gradient is whole, and drops that.

    The same numbers as stepping all of them afterwards, without ever holding all gradients: nothing
    still to come in the backward pass needs the values of a tensor whose gradient is whole. Weight
    decay is on matrices only: biases and LayerNorm are left alone, as in BERT's own training.

    Attributes
    ----------
    due : whether the coming backward pass completes the gradients; False lets them add up
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], settings: TrainSettings) -> None:
        self.due = True
        self._hooks = []
        for parameter in parameters:
            own = _adamw(parameter, settings)
            hook = parameter.register_post_accumulate_grad_hook(partial(self._step, own))
            self._hooks.append(hook)

    def _step(self, own: torch.optim.Optimizer, _: torch.Tensor) -> None:
        if self.due:
            own.step()
            own.zero_grad(set_to_none=True)

    def detach(self) -> None:
        """Leave the tensors: later backward passes change nothing."""
        for hook in self._hooks:
            hook.remove()


def _adamw(parameter: torch.nn.Parameter, settings: TrainSettings) -> torch.optim.AdamW:
    decay = 0.0
    if parameter.ndim > 1:
        decay = settings.weight_decay
    own = torch.optim.AdamW(
        [parameter],
        lr=settings.learning_rate,
        weight_decay=decay,
        fused=True,
    )
    # As torch would begin, but before there are activations: among those it would fragment the
    # heap.
    own.state[parameter] = {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
    return own
