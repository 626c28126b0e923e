"""The run: every model, every method on it, every metric of that; finished pieces are kept."""

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from shapwrap.comparison.checks import check_methods, check_metric
from shapwrap.comparison.config import ComparisonConfig, MethodConfig, MetricConfig, ModelConfig
from shapwrap.comparison.datasets import ComparisonData
from shapwrap.comparison.maps import explain_all, restore
from shapwrap.comparison.measures import Subject
from shapwrap.comparison.methods import Method, applies, class_of, learns, make_method
from shapwrap.comparison.models import Factory, ModelShelf, PreparedModel
from shapwrap.comparison.registry import METRICS, find
from shapwrap.comparison.results import MethodRow, ModelRow, Outcome, outcome_of
from shapwrap.comparison.scores import model_scores
from shapwrap.comparison.store import Piece, Store, digest
from shapwrap.comparison.training import check_training
from shapwrap.errors import ConfigurationError, UnsupportedBackboneError
from shapwrap.explanation import Explanation


class Runner:
    """One run of a comparison.

    Args:
        config: What is compared.
        data: On what.
        store: Where finished pieces lie.
        device: Where it runs.
        protocol: What every new piece is recorded with.
        own: Models, methods and metrics of one's own, by kind and name.
        notify: Told what is worth a line.
        progress: Show a progress bar; None for only on a terminal.

    Raises:
        ConfigurationError: A name or an option that is not known; nothing has run yet.
    """

    def __init__(
        self,
        config: ComparisonConfig,
        data: ComparisonData,
        store: Store,
        device: torch.device,
        protocol: Mapping[str, Any],
        own: Mapping[str, Mapping[str, Any]],
        notify: Callable[[str], None],
        progress: bool | None,
    ):
        self.config = config
        self.data = data
        self.store = store
        self.device = device
        self._protocol = dict(protocol)
        self._notify = notify
        self._progress = progress
        factories: Mapping[str, Factory] = own.get("models", {})
        self._shelf = ModelShelf(config, data, store, factories, device)
        for model in config.models:
            check_training(
                model.training,
                wrapped=model.kind == "wrapped",
                where=f"models.{model.name}.training",
            )
            self._shelf.made_from(model)
            if model.training and not len(data.train):  # pyright: ignore[reportArgumentType]
                raise ConfigurationError(
                    f"models.{model.name} has training, and data of kind {config.data.kind!r} has "
                    "no images to train on; give a checkpoint, or pretrained weights."
                )
        self._classes = {m.name: class_of(m, own.get("methods", {})) for m in config.methods}
        self._metrics = {
            m.name: own.get("metrics", {}).get(m.metric) or find(m.metric, METRICS, "metric")
            for m in config.metrics
        }
        for metric in config.metrics:
            if metric.metric not in own.get("metrics", {}):
                check_metric(metric, data, config)
        self._data_facts = {
            name: value
            for name, value in asdict(config.data).items()
            if name not in ("workers", "accuracy_images")
        } | {"seed": config.seed, "images": len(data)}

    def run(self) -> tuple[list[ModelRow], list[MethodRow]]:
        """All rows, whatever failed on the way."""
        plan = [(m, [x for x in self.config.methods if applies(x, m)]) for m in self.config.models]
        self._check_plan(plan)
        total = sum(1 + len(methods) * (1 + len(self.config.metrics)) for _, methods in plan)
        models, rows = [], []
        disable = None if self._progress is None else not self._progress
        with tqdm(total=total, disable=disable, unit="piece") as bar:
            for model, methods in plan:
                bar.set_description(model.name)
                row = self._model(model)
                models.append(row)
                bar.update()
                for method in methods:
                    bar.set_description(f"{model.name} / {method.name}")
                    if row.status == "failed":
                        rows.append(
                            MethodRow(model.name, model.kind, method.name, "failed", row.reason)
                        )
                    else:
                        rows.append(self._method(model, method))
                    bar.update(1 + len(self.config.metrics))
        return models, rows

    def _check_plan(self, plan: Sequence[tuple[ModelConfig, Sequence[MethodConfig]]]) -> None:
        """Raise on what would only show once a model is trained.

        Raises:
            ConfigurationError: A method refuses its options, or no method explains any model.
        """
        asked = {method.name for _, methods in plan for method in methods}
        idle = [method.name for method in self.config.methods if method.name not in asked]
        if not asked:
            raise ConfigurationError(
                f"no method explains any of the models: {', '.join(idle)} explain others; give "
                "models of that kind, or other methods."
            )
        for name in idle:
            self._notify(f"{name} explains none of the models")
        for model, methods in plan:
            made = [m for m in methods if not learns(self._classes[m.name])]
            if not made or not model.training or self._shelf.is_trained(model):
                continue
            try:
                with self._seeded():
                    prepared = self._shelf.untrained(model)
            except Exception as error:
                # Recorded as a failure in its turn, for the other models to go on.
                self._notify(f"{model.name} cannot be built: {type(error).__name__}: {error}")
                continue
            with self._seeded():
                check_methods(made, lambda m, on=prepared: self._make(m, on), model.name)

    # --- one model ----------------------------------------------------------------------------

    def _model(self, config: ModelConfig) -> ModelRow:
        key = ("metrics", config.name, "model")
        tested = {"accuracy_images": self.config.data.accuracy_images}
        made_from = {
            "model": digest(self._shelf.made_from(config)),
            "data": self._data_facts | tested,
        }

        def make() -> dict[str, Any]:
            model = self._shelf.get(config, self._progress)
            classes = len(self.data.class_names)
            return model_scores(model, self.data, classes, self.config.batch_size, self.device)

        piece = self._piece(key, made_from, make)
        row = {"model": config.name, "kind": config.kind, "status": piece.status}
        return ModelRow(**row, reason=piece.reason, protocol=piece.protocol, **piece.result)

    # --- one method on it ---------------------------------------------------------------------

    def _method(self, config: ModelConfig, method: MethodConfig) -> MethodRow:
        key = ("maps", config.name, method.name)
        settings = asdict(method)
        # Which other models it is applied to, and what it is called, changes no map.
        del settings["models"], settings["name"]
        made_from = {
            "model": digest(self._shelf.made_from(config)),
            "method": settings,
            "data": self._data_facts,
            "grid": config.grid,
            "seed": self.config.seed,
        }
        bound: list[Method] = []

        def bind() -> Method:
            if not bound:
                bound.append(self._bind(config, method))
            return bound[0]

        def make() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
            model = self._shelf.get(config, self._progress)
            tensors, facts = explain_all(
                bind(), model, self.data, self.config.batch_size, self.device
            )
            return facts, tensors

        piece = self._piece(key, made_from, make)
        row = partial(MethodRow, config.name, config.kind, method.name, piece.status)
        if piece.status != "finished":
            return row(piece.reason)
        explanation = restore(self.store.tensors(*key), piece.result)
        outcomes = {
            metric.name: self._measure(config, method, metric, piece, explanation, bind)
            for metric in self.config.metrics
        }
        return row(metrics=outcomes, facts=piece.result, protocol=piece.protocol)

    def _bind(self, config: ModelConfig, method: MethodConfig) -> Method:
        return self._make(method, self._shelf.get(config, self._progress))

    def _make(self, method: MethodConfig, model: PreparedModel) -> Method:
        return make_method(
            self._classes[method.name],
            method,
            model,
            self.config,
            self.data,
            self.store,
            self._progress,
        )

    # --- one metric of that -------------------------------------------------------------------

    def _measure(
        self,
        config: ModelConfig,
        method: MethodConfig,
        metric: MetricConfig,
        maps: Piece,
        explanation: Explanation,
        bind: Callable[[], Method],
    ) -> Outcome:
        settings = asdict(metric)
        del settings["name"]
        made_from = {"maps": digest(maps.made_from), "metric": settings, "seed": self.config.seed}

        def make() -> dict[str, Any]:
            model: PreparedModel = self._shelf.get(config, self._progress)
            subject = Subject(
                model=model,
                explanation=explanation,
                facts=maps.result | {"data": self._data_facts},
                bind=bind,
                data=self.data,
                metric=metric,
                store=self.store,
                batch_size=self.config.batch_size,
                chunk_size=self.config.chunk_size,
                seed=self.config.seed,
                device=self.device,
            )
            return asdict(self._metrics[metric.name](subject))

        piece = self._piece(("metrics", config.name, method.name, metric.name), made_from, make)
        if piece.status != "finished":
            return Outcome(piece.status, piece.reason)
        return outcome_of(piece.result, piece.protocol)

    # --- any piece ----------------------------------------------------------------------------

    def _piece(
        self, key: tuple[str, ...], made_from: Mapping[str, Any], make: Callable[[], Any]
    ) -> Piece:
        """Read from disk, or made now; a failure is a piece too."""
        found = self.store.read(*key, made_from=made_from)
        if found is not None:
            return found
        name = " / ".join(key)
        tensors = None
        warned: list[str] = []
        try:
            with _collected_warnings(warned), self._seeded():
                made = make()
            result, tensors = made if isinstance(made, tuple) else (made, None)
            piece = Piece("finished", dict(made_from), result, protocol=self._recorded(warned))
        except UnsupportedBackboneError as error:
            piece = Piece(
                "not applicable", dict(made_from), reason=str(error), protocol=self._recorded([])
            )
        except Exception as error:
            # A foreign model or method may raise anything; the other rows do not depend on it.
            reason = f"{type(error).__name__}: {error}"
            self._notify(f"{name} failed: {reason}")
            protocol = self._recorded(warned) | {"traceback": traceback.format_exc()}
            piece = Piece("failed", dict(made_from), reason=reason, protocol=protocol)
        for warning in warned:
            self._notify(f"{name}: {warning}")
        return self.store.write(*key, piece=piece, tensors=tensors)

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Torch's random state is the seed's inside, for every piece, and the caller's outside.

        What is resumed draws as it would have, also with methods that take no generator.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.config.seed)
            yield

    def _recorded(self, warned: list[str]) -> dict[str, Any]:
        return {
            **self._protocol,
            "seed": self.config.seed,
            "chunk_size": self.config.chunk_size,
            "batch_size": self.config.batch_size,
            **({"warnings": warned} if warned else {}),
        }


@contextmanager
def _collected_warnings(messages: list[str]) -> Iterator[None]:
    """Each different warning once, in the list instead of on the screen."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            texts = [f"{w.category.__name__}: {w.message}" for w in caught]
            messages.extend(dict.fromkeys(texts))
