"""What is said of a run before it is trained."""

from qtdog.config import RunConfig
from qtdog.data import DomainSet
from qtdog.methods.checks import remarks
from qtdog.methods.presets import changed_from_preset, find_method
from qtdog.training.evaluation import sources


def facts(run: RunConfig, dataset: DomainSet, environment: dict[str, str]) -> list[str]:
    """On which data, with which presets and versions: lines that the runs of one command have mostly in common."""
    method, quantization = find_method(run.method), run.quantization
    described = "float"
    if quantization:
        inputs = f", inputs {quantization.act_bits} bit" if quantization.act_bits else ""
        described = (
            f"{quantization.weight_bits} bit per {quantization.granularity}{inputs}, "
            f"from {quantization.switch_step} ({quantization.quantizer}, {quantization.qat_mode})"
        )
    rules = {"loss": method.loss, "step": method.step, "averaging": method.averaging}
    numbers = {"loss": run.loss, "step": run.step, "averaging": run.averaging}
    told = [
        f"{kind} {rule}" + "".join(f" {name}={value}" for name, value in numbers[kind].items())
        for kind, rule in rules.items()
    ]
    changed = ", ".join(f"{name}={value}" for name, value in changed_from_preset(run).items())
    return [
        f"data: {dataset.source}",
        "environment: " + ", ".join(f"{name} {value}" for name, value in environment.items()),
        f"method preset {run.method}: {', '.join(told)}, {described}",
        f"protocol preset {run.dataset}, of {run.method}: {'changed ' + changed if changed else 'unchanged'}",
        *remarks(run, method, len(sources(run, dataset))),
    ]
