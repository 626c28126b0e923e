"""AdamW with weight-decay groups and a faster head; warm-up and cosine."""

from collections.abc import Iterable
from typing import Any

from timm.optim._param_groups import param_groups_weight_decay
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from shapwrap.errors import TrainingError
from shapwrap.training.config import LoopConfig
from shapwrap.training.layer_decay import layer_scales
from shapwrap.training.trainable import head_of


def parameter_groups(
    module: nn.Module, config: LoopConfig, head: Iterable[nn.Parameter] | None = None
) -> list[dict[str, Any]]:
    """Groups for an optimizer: with and without weight decay, backbone and head, by layers.

    Args:
        module: A model, or one that holds a model as `model`.
        config: Rates and decay.
        head: Parameters of the head; by default what the module's own `head_parameters()` tells,
            and all of a head that was passed to a wrapped model; none for other modules.

    Raises:
        TrainingError: Every parameter is frozen.
    """
    names: set[str] = set()
    for prefix, part in (("", module), ("model.", getattr(module, "model", None))):
        excluded: Any = getattr(part, "no_weight_decay", None)
        listed: Any = excluded() if callable(excluded) else ()
        names |= {f"{prefix}{name}" for name in listed}
    # Tokens and positions, [1, T, D], are no weights, whether or not the model lists them.
    names |= {n for n, p in module.named_parameters() if p.ndim == 3 and p.shape[0] == 1}
    head = head_of(module, head)
    head_ids = {id(parameter) for parameter in head}
    decay = config.layer_decay
    scales = {} if decay is None else layer_scales(module, decay, head)
    groups: list[dict[str, Any]] = []
    decay_groups: Any = param_groups_weight_decay(
        module, config.weight_decay, no_weight_decay_list=names
    )
    for group in decay_groups:
        for of_head in (False, True):
            parameters = [p for p in group["params"] if (id(p) in head_ids) == of_head]
            rate = config.learning_rate * (config.head_multiplier if of_head else 1.0)
            layers: dict[float, list[nn.Parameter]] = {}
            for parameter in parameters:
                layers.setdefault(scales.get(id(parameter), 1.0), []).append(parameter)
            # The highest layer first: its rate is that of the history.
            groups += [
                {**group, "params": layers[scale], "lr": rate * scale}
                for scale in sorted(layers, reverse=True)
            ]
    if not groups:
        raise TrainingError(
            "all parameters are frozen (requires_grad is False); expected some to train."
        )
    return groups


def make_optimizer(
    module: nn.Module, config: LoopConfig, head: Iterable[nn.Parameter] | None = None
) -> Optimizer:
    """AdamW over the trainable parameters; see `parameter_groups`."""
    return AdamW(parameter_groups(module, config, head), lr=config.learning_rate)


def make_scheduler(optimizer: Optimizer, config: LoopConfig, steps: int) -> LRScheduler:
    """Linear warm-up, then a cosine to 0, over `steps` optimizer steps."""
    warmup = min(round(config.warmup * steps), steps - 1)
    cosine = CosineAnnealingLR(optimizer, T_max=max(1, steps - warmup))
    if warmup == 0:
        return cosine
    linear = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [linear, cosine], milestones=[warmup])
