"""AdamW with weight-decay groups and a faster head; warm-up and cosine."""

from typing import Any

from timm.optim._param_groups import param_groups_weight_decay
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from shapwrap.errors import TrainingError
from shapwrap.training.config import TrainerConfig
from shapwrap.wrapper import ShapleyWrapper


def parameter_groups(wrapped: ShapleyWrapper, config: TrainerConfig) -> list[dict[str, Any]]:
    """Groups for an optimizer: with and without weight decay, backbone and head.

    Raises:
        TrainingError: Every parameter is frozen.
    """
    excluded: Any = getattr(wrapped.model, "no_weight_decay", None)
    listed: Any = excluded() if callable(excluded) else ()
    names = {f"model.{name}" for name in listed}
    # Tokens and positions, [1, T, D], are no weights, whether or not the model lists them.
    names |= {n for n, p in wrapped.named_parameters() if p.ndim == 3 and p.shape[0] == 1}
    head = {id(parameter) for parameter in wrapped.head_parameters()}
    groups: list[dict[str, Any]] = []
    decay_groups: Any = param_groups_weight_decay(
        wrapped, config.weight_decay, no_weight_decay_list=names
    )
    for group in decay_groups:
        for of_head in (False, True):
            parameters = [p for p in group["params"] if (id(p) in head) == of_head]
            rate = config.learning_rate * (config.head_multiplier if of_head else 1.0)
            if parameters:
                groups.append({**group, "params": parameters, "lr": rate})
    if not groups:
        raise TrainingError(
            "all parameters are frozen (requires_grad is False); expected some to train."
        )
    return groups


def make_optimizer(wrapped: ShapleyWrapper, config: TrainerConfig) -> Optimizer:
    """AdamW over the trainable parameters."""
    return AdamW(parameter_groups(wrapped, config), lr=config.learning_rate)


def make_scheduler(optimizer: Optimizer, config: TrainerConfig, steps: int) -> LRScheduler:
    """Linear warm-up, then a cosine to 0, over `steps` optimizer steps."""
    warmup = min(round(config.warmup * steps), steps - 1)
    cosine = CosineAnnealingLR(optimizer, T_max=max(1, steps - warmup))
    if warmup == 0:
        return cosine
    linear = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [linear, cosine], milestones=[warmup])
