"""What an optimizer needs to know of scales."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .layers import quantized_layers


def named_scales(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the state dict, learned scale) of each quantized weight and input of `model`, each once."""
    seen: set[int] = set()
    for name, layer in quantized_layers(model):
        for kind in ("weight_scale", "act_scale"):
            scale = getattr(layer, kind, None)
            if scale is not None and scale.requires_grad and id(scale) not in seen:
                seen.add(id(scale))
                yield f"{name}.{kind}" if name else kind, scale


def scales(model: nn.Module) -> list[nn.Parameter]:
    """The learned scales of `model`, of weights and inputs."""
    return [scale for _, scale in named_scales(model)]


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, scale_lr: float | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups of a quantized model: its parameters, and its scales with their own lr and no weight decay.

    `scale_lr` is `lr` by default. Parameters that do not require gradients are left out. Scales of layers that are not
    enabled yet are among them: an optimizer leaves alone what has no gradient.
    """
    own = scales(model)
    ids = {id(s) for s in own}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    groups: list[dict[str, Any]] = [{"params": others, "lr": lr, "weight_decay": weight_decay}]
    if own:
        groups.append({"params": own, "lr": lr if scale_lr is None else scale_lr, "weight_decay": 0.0})
    return groups


def add_scales_(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    model: nn.Module,
    lr: float | None = None,
    scheduler: Any = None,
) -> int:
    """Give scales to optimizers that were made before `quantize_`, as groups without weight decay.

    That is surgery: whatever else knows the model's parameters by now (schedulers, averages, DistributedDataParallel,
    a trainer that resumes) has to be told as well. `quantize_(model, config, enabled=False)` before the optimizer is
    made, and `enable_` at the switch, need none of it.

    Args:
        optimizer: the model's, or those that hold parts of it; each gets the scales of the layers that it trains.
        lr: of the scales, where a scheduler begins; by default that of each optimizer's first group.
        scheduler: PyTorch's of these optimizers, one or several; the scales' rate follows the weights' in proportion.

    Returns:
        How many scales were added; those that an optimizer has already are left as they are.

    Raises:
        ValueError: if a quantized layer's weight is in no optimizer, as when they were built for another model; or for
            a scheduler that is not named, or of a kind that cannot be told.
    """
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    schedulers = list(scheduler) if isinstance(scheduler, list | tuple) else [s for s in [scheduler] if s is not None]
    holder = {id(p): opt for opt in optimizers for group in opt.param_groups for p in group["params"]}
    new: dict[int, list[nn.Parameter]] = {}
    learned = {id(scale) for scale in scales(model)}
    for name, layer in quantized_layers(model):
        if layer.latent_weight.requires_grad and id(layer.latent_weight) not in holder:
            raise ValueError(f"add_scales_: the weight of {name} is in no optimizer; were they built for this model?")
        for scale in (layer.weight_scale, getattr(layer, "act_scale", None)):
            if scale is not None and id(scale) in learned and id(scale) not in holder:
                owner = holder[id(layer.latent_weight)] if layer.latent_weight.requires_grad else optimizers[0]
                new.setdefault(id(owner), []).append(scale)
                holder[id(scale)] = owner
    changed = [opt for opt in optimizers if id(opt) in new]
    for opt in changed:
        _check_schedulers(opt, schedulers)
    for opt in changed:
        first = opt.param_groups[0]
        base = first.get("initial_lr", first["lr"])
        ratio = 1.0 if lr is None else lr / base
        for scheduled in _flat(schedulers):
            if scheduled.optimizer is opt:
                _add_group_(scheduled, ratio)
        rates: dict[str, Any] = {
            key: first[key] * ratio for key in ("lr", "initial_lr", "max_lr", "min_lr") if key in first
        }
        others = {key: value for key, value in first.items() if key not in ("params", "param_names")}
        opt.add_param_group({**others, **rates, "params": new[id(opt)], "weight_decay": 0.0})
    return sum(map(len, new.values()))


_SCHEDULED_LISTS = ("base_lrs", "_last_lr", "min_lrs")  # one rate a group
_SCHEDULERS = (
    *("ChainedScheduler", "ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "ExponentialLR"),
    *("LambdaLR", "LinearLR", "MultiStepLR", "MultiplicativeLR", "OneCycleLR", "PolynomialLR", "ReduceLROnPlateau"),
    *("SequentialLR", "StepLR"),
)


def _flat(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Schedulers, and those within them."""
    for scheduled in schedulers:
        yield scheduled
        yield from _flat(getattr(scheduled, "_schedulers", ()))


def _check_schedulers(optimizer: torch.optim.Optimizer, schedulers: list[Any]) -> None:
    """Make sure that the schedulers of an optimizer are known, and can be told of another group."""
    instead = "or call quantize_(model, config, enabled=False) before all of them are made, and enable_ now"
    own = [s for s in _flat(schedulers) if getattr(s, "optimizer", None) is optimizer]
    if "initial_lr" in optimizer.param_groups[0] and not own:
        raise ValueError(
            f"add_scales_: the optimizer has a scheduler of learning rates: pass it as scheduler=, {instead}"
        )
    known = {getattr(torch.optim.lr_scheduler, name) for name in _SCHEDULERS}
    for scheduled in _flat(schedulers):
        if type(scheduled) not in known:
            raise ValueError(f"add_scales_: {type(scheduled).__name__} cannot be told of new scales: {instead}")


def _add_group_(scheduled: Any, ratio: float) -> None:
    """Let a scheduler know of one more group, whose rate is in proportion to that of the first."""
    for name in _SCHEDULED_LISTS:
        if isinstance(rates := getattr(scheduled, name, None), list) and rates:
            setattr(scheduled, name, [*rates, rates[0] * ratio])
    if hasattr(scheduled, "lr_lambdas"):
        scheduled.lr_lambdas = [*scheduled.lr_lambdas, scheduled.lr_lambdas[0]]
