"""The model card: what the model is, how it is used, and what was measured."""

import math
from collections.abc import Mapping
from typing import Any

from shapwrap._version import __version__
from shapwrap.audit import Audit
from shapwrap.errors import ArgumentError
from shapwrap.saving.config import Config
from shapwrap.saving.files import GENERATED

TAGS = ("explainability", "interpretability", "shapley-values", "vision")


def numbers(measured: Mapping[str, Any] | None) -> dict[str, float | None]:
    """What was measured, as JSON: numbers, None where one is not finite.

    Args:
        measured: Numbers by name, as `Trainer.evaluate` returns them; an `Audit` among them stands
            for its skill and residual. Strings and lists of a record of training are left out.

    Raises:
        ArgumentError: No mapping.
    """
    if measured is None:
        return {}
    if isinstance(measured, Audit):
        measured = {"audit": measured}
    if not isinstance(measured, Mapping):
        raise ArgumentError(
            f"measured is {type(measured).__name__}; expected numbers by name, such as what "
            "Trainer.evaluate returns, or an Audit."
        )
    found: dict[str, float | None] = {}
    for name, value in measured.items():
        if isinstance(value, Audit):
            prefix = "" if name == "audit" else f"{name} "
            found[f"{prefix}skill"] = _finite(value.overall_skill)
            found[f"{prefix}residual"] = _finite(float(value.residual.mean()))
            found[f"{prefix}audited images"] = len(value.residual)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[str(name)] = _finite(value)
    return found


def model_card(
    config: Config, repo_id: str | None, dataset: str | None, further: Mapping[str, Any] | None
) -> str:
    """The text of README.md.

    Args:
        config: Of the saved model.
        repo_id: Where it goes on the hub, for the snippet.
        dataset: On which was measured what is in `config.measured`.
        further: Metadata of `huggingface_hub.ModelCardData`, such as license, datasets, base_model.

    Raises:
        ArgumentError: Metadata that contradicts what is known.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    task = ("zero-shot-" if config.kind == "ShapleyCLIP" else "") + "image-classification"
    name = (repo_id or _name(config)).split("/")[-1]
    results = [
        EvalResult(
            task_type=task,
            dataset_type="custom",
            dataset_name=dataset,
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in config.measured.items()
        if dataset is not None and value is not None and not metric.endswith("images")
    ]
    data = {
        "library_name": "shapwrap",
        "pipeline_tag": task,
        "tags": list(TAGS),
        **({"model_name": name, "eval_results": results} if results else {}),
        **(further or {}),
    }
    try:
        header = ModelCardData(**data).to_yaml()
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"card_data is {dict(further or {})!r:.100}; expected metadata of "
            f"huggingface_hub.ModelCardData ({error})."
        ) from error
    parts = [f"---\n{header}\n---\n\n{GENERATED}\n\n# {name}\n", _about(config)]
    parts += [_use(config, repo_id), _measured(config, dataset)]
    return str(ModelCard("\n".join(part for part in parts if part)))


def _about(config: Config) -> str:
    facts = config.facts
    rows, columns = facts["grid"]
    height, width = facts["image_size"]
    whole = "similarities with texts" if config.kind == "ShapleyCLIP" else "logits"
    lines = [
        f"{_name(config)}, wrapped by [shapwrap](https://pypi.org/project/shapwrap/) "
        f"{__version__}: its {whole} are sums of patch values. Trained with the Shapley loss, "
        "these approach the Shapley values of the patches; how close they are, `audit` measures on "
        "any images.\n",
        "| | |\n| --- | --- |",
        f"| Masking | {facts['masking']} |",
        f"| Readout | {facts['readout']} |",
        f"| Patches | {rows} x {columns} at {height} x {width} pixels |",
    ]
    if config.kind == "ShapleyWrapper":
        lines.append(f"| Classes | {facts['num_classes']} |")
    if (normalization := config.data.get("mean")) is not None:
        lines.append(f"| Mean of pixels | {normalization} |")
        lines.append(f"| Standard deviation | {config.data.get('std')} |")
    if not config.weights["complete"]:
        base = config.weights.get("base") or "to be passed with `model=`"
        lines.append(f"| Weights | what fine-tuning changed; pretrained: {base} |")
    return "\n".join(lines) + "\n"


def _use(config: Config, repo_id: str | None) -> str:
    source = repo_id or "path/to/this/folder"
    needs = ", model=backbone" if config.backbone["library"] is None else ""
    if config.kind == "ShapleyCLIP":
        use = 'explanation = wrapped.explain(images, ["a photo of a cat"] * len(images))'
    else:
        use = "logits = wrapped(images)\nexplanation = wrapped.explain(images)"
    height, width = config.facts["image_size"]
    told = " as the table says" if "mean" in config.data else ""
    return (
        "## Use\n\n```python\n"
        f"from shapwrap import {config.kind}\n\n"
        f'wrapped = {config.kind}.from_pretrained("{source}"{needs})\n'
        f"# images: float [B, C, {height}, {width}], normalised{told}\n"
        f"{use}\nexplanation.plot(images)\n```\n"
    )


def _measured(config: Config, dataset: str | None) -> str:
    if not config.measured:
        return ""
    on = f" on {dataset}" if dataset else ""
    rows = [
        f"| {name} | {'not finite' if value is None else f'{value:.6g}'} |"
        for name, value in config.measured.items()
    ]
    return "\n".join([f"## Measured{on}\n", "| Measure | Value |\n| --- | --- |", *rows]) + "\n"


def _name(config: Config) -> str:
    named = config.backbone.get("architecture")
    return str(named or config.backbone["class"].rsplit(".", 1)[-1])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
