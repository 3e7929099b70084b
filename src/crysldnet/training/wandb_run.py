"""Weights & Biases: metric definitions, tables, plots and artifacts of a run."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from crysldnet.artifacts.model_file import kind_of
from crysldnet.console import note
from crysldnet.data.store import file_hash
from crysldnet.measures import find, unit_of

Summary = Literal["min", "max", "mean", "last"]

ARTIFACTS = {"encoder.safetensors": "encoder", "model.safetensors": "model", "predictions_test.csv": "predictions"}
"""Run folder file to the type and collection of its artifact."""
WORST = 20
PLOTTED = 10_000
"""Maximum rows of a table; W&B charts show no more."""


def summary_of(metric: str) -> Summary:
    """Return how a metric is summarized: its best value, if defined.

    Args:
        metric: as logged, ``val/mae`` or ``diffusion/val/masked_accuracy``.
    """
    measure, _ = find(metric)
    directions: dict[str | None, Summary] = {"higher": "max", "lower": "min", None: measure.summary}
    return directions[measure.better]


def with_epoch_from_one(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return logged values with the epoch counted from 1; tests, which follow the last epoch, have none."""
    tested = any(name.startswith("test/") for name in metrics)
    counted = {name: value + 1 if name == "epoch" else value for name, value in metrics.items()}
    return {name: value for name, value in counted.items() if not (tested and name == "epoch")}


class WandbRun(WandbLogger):
    """Log to one W&B run; each metric is defined with its summary and unit when first logged.

    Args:
        target_units: units of the targets and their errors.
        settings: settings of Lightning's logger.
    """

    LOGGER_JOIN_CHAR = "/"

    def __init__(self, *, target_units: Mapping[str, str], **settings: Any) -> None:
        super().__init__(**settings)
        self._wandb_init.pop("anonymous", None)  # W&B would warn about it
        self.target_units = target_units
        self.units: dict[str, str] = {}
        self._gone = False
        self._close_another()

    @rank_zero_only
    def _close_another(self) -> None:
        """Close a run left open in this process; Lightning would log to it."""
        import wandb

        if wandb.run is not None:
            name = wandb.run.name or wandb.run.id
            note(f"the W&B run {name} was still open and is closed, so that this run has its own")
            wandb.finish()

    def begin_stage(self, stage: str) -> None:
        """Prefix subsequent metric names with the stage."""
        self._prefix = stage

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values at a step; if W&B's own process has exited, training continues without it."""
        if not self._gone:
            try:
                self._log(metrics, step)
            except ConnectionError as error:  # a signal to all processes ends it, but the run must save first
                self._detach()
                note(f"W&B's process is gone ({error}); the rows that follow are in metrics.csv alone")

    def _detach(self) -> None:
        """Detach from a W&B run whose process has exited.

        Its import hooks would otherwise fail in the next import of a package they watch, such as scikit-learn.
        """
        import wandb

        self._gone = True
        run = self.experiment
        run._unregister_telemetry_import_hooks(run.id)
        with suppress(ConnectionError):
            wandb.teardown(exit_code=1)
        wandb.run = None

    def _log(self, metrics: Mapping[str, float], step: int | None) -> None:
        metrics = with_epoch_from_one(metrics)
        names = [f"{self._prefix}/{name}" if self._prefix else name for name in metrics]
        new = {name: unit_of(name, self.target_units) for name in names if name not in self.units}
        for name in new:
            self.experiment.define_metric(
                name, step_metric="trainer/global_step", step_sync=True, summary=summary_of(name)
            )
        self.units |= new
        if any(new.values()):
            units = {name: unit for name, unit in self.units.items() if unit}
            self.experiment.config.update({"units": units}, allow_val_change=True)
        super().log_metrics(metrics, step)

    @rank_zero_only
    def publish(self, folder: Path, pretrained: Path | None) -> None:
        """Log the output of a complete run, and close the W&B run."""
        import wandb

        if self._gone:
            return

        predictions = folder / "predictions_test.csv"
        if predictions.exists():
            self.experiment.log(prediction_tables(predictions))
        plots = {f"plots/{path.stem}": wandb.Image(str(path)) for path in sorted((folder / "plots").glob("*.png"))}
        if plots:
            self.experiment.log(plots)
        self._log_artifacts(folder, pretrained)
        self.experiment.finish()

    @rank_zero_only
    def publish_submission(self, folder: Path, submission: Path) -> None:
        """Log the predictions of benchmark tasks and the submission, and close the W&B run."""
        import wandb

        if self._gone:
            return
        for path in sorted(folder.glob("*/predictions.csv")):
            tables = prediction_tables(path)
            self.experiment.log({f"{path.parent.name}/{name.removeprefix('test/')}": t for name, t in tables.items()})
        hashes = {path.name: file_hash(path) for path in sorted(submission.iterdir())}
        artifact = wandb.Artifact("submission", "submission", metadata={"sha256": hashes, "run_folder": folder.name})
        artifact.add_dir(str(submission))
        self.experiment.log_artifact(artifact, aliases=["latest", re.sub(r"[/:]", "-", folder.name)])
        self.experiment.finish()

    def _log_artifacts(self, folder: Path, pretrained: Path | None) -> None:
        import wandb

        made_from: dict[str, dict[str, str | list[str]]] = {"encoder": {}, "model": {}, "predictions": {}}
        if pretrained is not None:
            start = "model" if kind_of(pretrained) == "property_model" else "encoder"
            sha256 = file_hash(pretrained)
            made_from["model"] = {start: sha256}
            if not self.experiment.offline and not self.experiment.disabled:
                used = wandb.Artifact(start, start, metadata={"sha256": sha256})
                used.add_file(str(pretrained), f"{start}.safetensors")
                self.experiment.use_artifact(used)  # identical content is the same version, whoever logged it first
        models = [file_hash(path) for path in sorted(folder.glob("member_*/model.safetensors"))]
        if (folder / "model.safetensors").exists():
            made_from["predictions"] = {"model": file_hash(folder / "model.safetensors")}
        elif models:
            made_from["predictions"] = {"model": models}
        for name, kind in ARTIFACTS.items():
            path = folder / name
            if not path.exists():
                continue
            artifact = wandb.Artifact(
                kind,
                kind,
                metadata={
                    "sha256": file_hash(path),
                    "made_from": made_from[kind],
                    "run_folder": folder.name,
                },
            )
            artifact.add_file(str(path), name)
            self.experiment.log_artifact(artifact, aliases=["latest", re.sub(r"[/:]", "-", folder.name)])


def prediction_tables(path: Path) -> dict[str, Any]:
    """Return all predictions, the worst of each target, and a parity plot for each regression target.

    The worst are the largest errors, for classes the most confident wrong predictions.
    """
    import wandb

    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0]) if rows else []
    logged: dict[str, Any] = {"test/predictions": wandb.Table(columns, [list(row.values()) for row in rows[:PLOTTED]])}
    worst: list[list[Any]] = []
    wrong: list[list[Any]] = []
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target]
        if any(row["probability"] for row in own):  # classification
            missed = [row for row in own if row["true"] and row["true"] != row["prediction"]]
            surest = sorted(missed, key=lambda row: -float(row["probability"]))[:WORST]
            wrong += [[r["material_id"], target, r["true"], r["prediction"], float(r["probability"])] for r in surest]
            continue
        points = [(r["material_id"], float(r["true"]), float(r["prediction"])) for r in own if r["true"]]
        table = wandb.Table(["material_id", "true", "prediction"], [list(point) for point in points[:PLOTTED]])
        unit = own[0]["unit"]
        title = f"{target}{f' ({unit})' if unit else ''}, test split"
        logged[f"test/parity/{target}"] = wandb.plot.scatter(table, "true", "prediction", title=title)
        furthest = sorted(points, key=lambda point: -abs(point[2] - point[1]))[:WORST]
        worst += [[i, target, true, predicted, predicted - true, unit] for i, true, predicted in furthest]
    if worst:
        header: list[str | int] = ["material_id", "target", "true", "prediction", "error", "unit"]
        logged["test/worst"] = wandb.Table(header, worst)
    if wrong:
        columns = ["material_id", "target", "true", "prediction", "probability"]
        logged["test/worst_classes"] = wandb.Table(columns, wrong)
    return logged


def begin_stage(loggers: Iterable[Logger], stage: str) -> None:
    """Tell the loggers that a stage starts."""
    for logger in loggers:
        if (begin := getattr(logger, "begin_stage", None)) is not None:
            begin(stage)


def publish_submission(loggers: Iterable[Logger], folder: Path, scores: Mapping[str, float], submission: Path) -> None:
    """Log the results of a benchmark run.

    Args:
        loggers: loggers of the run.
        folder: run folder.
        scores: scores by TASK/NAME.
        submission: submission folder.
    """
    for logger in loggers:
        logger.log_metrics(dict(scores), 0)
        if isinstance(logger, WandbRun):
            logger.publish_submission(folder, submission)


def publish(loggers: Iterable[Logger], folder: Path, pretrained: Path | None = None) -> None:
    """Log the output of a complete run.

    Args:
        loggers: loggers of the run.
        folder: run folder.
        pretrained: initial encoder, if any.
    """
    for logger in loggers:
        if isinstance(logger, WandbRun):
            logger.publish(folder, pretrained)
