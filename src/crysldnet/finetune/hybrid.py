"""Fit tabular models, alone or combined with networks, and their ensemble weights.

Training and validation crystals are pooled. Validation results are out-of-fold predictions, from members and weights
that weren't fitted to crystals of the same formula. They also calibrate the model, unless ``data.calibration_fraction``
reserves crystals for that.

Shapes: ``n`` crystals of training and validation, ``T`` targets.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from numpy.typing import NDArray

from crysldnet.artifacts import model_file
from crysldnet.artifacts.provenance import encoder_file, seen_crystals
from crysldnet.build import TARGET, build
from crysldnet.console import note, print_table
from crysldnet.data.datamodule import CrystalDataModule
from crysldnet.data.elements import formula_groups
from crysldnet.descriptors import stacked
from crysldnet.descriptors.composition import amounts_of
from crysldnet.encoders.elements import ElementProperties
from crysldnet.errors import DataError
from crysldnet.finetune.networks import Networks, train_networks
from crysldnet.finetune.settings import (
    TrainingConfig,
    class_entropies,
    make_data,
    make_descriptors,
    make_encoder,
    make_types,
)
from crysldnet.finetune.training import (
    Finetuned,
    add_errors,
    describe_model,
    evaluate,
    reported,
)
from crysldnet.graphs.crystals import Crystals
from crysldnet.models.hybrid import NETWORK, HybridModel, TabularPart
from crysldnet.models.predictor import Prediction
from crysldnet.models.references import fit_references
from crysldnet.models.targets import Estimate
from crysldnet.tabular.kernel import fit_projection
from crysldnet.tabular.stack import FittedStack, fit_stack
from crysldnet.training.calibrate import HeldOut, errors_of, held_out_errors, learn
from crysldnet.training.loggers import MetricsFile
from crysldnet.training.metrics import TargetMetrics
from crysldnet.training.trainer import TrainerSettings

WORTH_IT = 0.01
"""Minimum relative gain for keeping networks, which slow down predictions."""
Members = dict[str, dict[str, dict[str, float]]]
"""Weight and error (MAE, or error rate for classes) of each member by target and name."""
FEWEST = 10
"""Minimum number of crystals with a value for building folds."""
TITLES = {
    NETWORK: "networks",
    "extra_trees": "extremely randomized trees",
    "boosted_trees": "boosted trees",
    "kernel_ridge": "kernel ridge",
}


def train_hybrid(
    config: TrainingConfig,
    values: dict[str, Any],
    folder: Path,
    data: CrystalDataModule | None = None,
    loggers: list[Logger] | None = None,
) -> Finetuned:
    """Fit and evaluate a hybrid, and write ``model.safetensors`` to the folder; arguments as in ``train``."""
    pl.seed_everything(config.seed, workers=True, verbose=False)
    config.check_recipe()
    settings: TrainerSettings = build(config.trainer, "trainer")
    device = torch.device(settings.device)
    encoder, encoder_config, provenance = make_encoder(config)
    embeds = encoder_file(config.pretrained) is not None
    if not embeds and config.recipe == "frozen":
        encoder = ElementProperties()
        encoder_config = {TARGET: f"{ElementProperties.__module__}.{ElementProperties.__name__}"}
    values = {**values, "encoder": encoder_config}
    if data is None:
        data = make_data(config, encoder)
    data = _pooled(config, encoder, data)
    types = make_types(config, data)
    sizes = f"{len(data.rows['train']):,} training and {len(data.rows['test']):,} test"
    note(f"finetune: {sizes} crystals of {data.store.name}, recipe={config.recipe}")
    for reason, count in data.left_out.items():
        note(f"{count:,} crystals left out: {reason}")
    networks = Networks([], None)
    if config.recipe != "frozen":
        networks = train_networks(config, values, folder, data, device)
    if not embeds and networks.models:
        encoder = deepcopy(networks.models[0].encoder)
    model = HybridModel(
        encoder=encoder,
        networks=networks.models,
        targets=data.targets,
        units=data.units,
        types=types,
        referenced=config.atomic_references,
        descriptors=make_descriptors(data),
        per=config.target_per,
    )
    model.fit_scale(data.train_targets())
    model.to(device).eval()
    predicted, members = _fit(model, data, networks, embeds=embeds, seed=config.seed)
    validated, tested = (
        TargetMetrics(model.targets, types, class_entropies(types, data), sync_on_compute=False) for _ in range(2)
    )
    add_errors(validated, predicted.to(torch.float32), data.train_targets(), model)
    metrics = {f"val/{name}": float(value) for name, value in validated.compute().items() if name != "nll"}
    predictions = evaluate([model], data, data.rows["test"], [tested])
    if predictions:
        metrics |= reported(tested, "test")
    info = describe_model(model, data, config, values, provenance)
    info |= {"metrics": metrics, "blend": members}
    _export(model, info, config, data, predicted, folder)
    for logger in [MetricsFile(folder / "metrics.csv"), *(loggers or [])]:
        for part in ("val", "test"):
            logger.log_metrics({n: v for n, v in metrics.items() if n.startswith(part)} | {"epoch": 0}, 0)
    _print_members(members)
    return Finetuned(model.cpu(), info, metrics, data, predictions)


def _pooled(config: TrainingConfig, encoder: Any, data: CrystalDataModule) -> CrystalDataModule:
    """Return the same crystals with training and validation pooled."""
    data.setup()
    pool = np.sort(np.concatenate([data.rows["train"], data.rows["val"]]))
    rows = {"train": pool, "val": np.empty(0, np.int64), "test": data.rows["test"]}
    own = make_data(config, encoder, store=data.store, rows=rows)
    own.left_out = data.left_out
    own.excluded = data.excluded
    if data.calibration_fraction:
        own.calibration_rows = data.calibration_rows
    return own


@torch.inference_mode()
def _fit(
    model: HybridModel, data: CrystalDataModule, networks: Networks, *, embeds: bool, seed: int
) -> tuple[Prediction, Members]:
    """Fit the tabular part of a model; return the out-of-fold predictions, NaN where unknown, and the members."""
    rows = data.rows["train"]
    read = [model.read(batch.to(model.std.device)) for batch in data.batches(rows, model.encoder.graph)]
    descriptors = stacked([part for part, _ in read])
    embedding = np.concatenate([part for _, part in read]) if embeds else None
    part = TabularPart(descriptors.names, None if embedding is None else fit_projection(embedding), [])
    x = part.features(descriptors, embedding)
    groups = formula_groups(data.store.crystals, rows)
    rows_known: list[NDArray[np.int64]] = []
    fits: list[FittedStack] = []
    crystals, values = data.store.crystals.take(rows), data.train_targets()
    factors = model.factors(crystals)
    learned = values if factors is None else values * factors
    network = None if networks.out_of_fold is None else model.table_outputs(networks.out_of_fold, crystals)
    for place, target in enumerate(data.targets):
        true = learned[:, place]
        known = np.flatnonzero(~np.isnan(true))
        if len(known) < FEWEST or len(np.unique(groups[known])) < 2:
            raise DataError(
                f"{data.store.name}: {len(known)} crystals of {len(np.unique(groups[known]))} formulas have a value of "
                f"{target!r}; models on tables need {FEWEST} of two formulas, so use recipe=network"
            )
        others = {} if network is None else {NETWORK: network[place][known]}
        rows_known.append(known)
        fits.append(_fit_target(model, crystals.take(known), place, x[known], true[known], groups[known], others, seed))
    if networks.models:
        fits = _drop_networks_that_add_nothing(model, fits)
    model.tabular = replace(part, stacks=[fitted.stack for fitted in fits])
    return _out_of_fold(model, data, rows_known, fits, factors)


def _drop_networks_that_add_nothing(model: HybridModel, fits: list[FittedStack]) -> list[FittedStack]:
    """Remove the networks from the model and the stacks unless they lower the out-of-fold error."""
    alone = [fitted.without(NETWORK) for fitted in fits]
    with_them, without = (float(np.mean([fitted.error for fitted in own])) for own in (fits, alone))
    gain = 1 - with_them / without
    kept = gain >= WORTH_IT
    note(f"networks change the out-of-fold error by {-100 * gain:+.1f} % and are {'kept' if kept else 'left out'}")
    if not kept:
        model.networks = torch.nn.ModuleList()
    return fits if kept else alone


def _out_of_fold(
    model: HybridModel,
    data: CrystalDataModule,
    known: list[NDArray[np.int64]],
    fits: list[FittedStack],
    factors: NDArray[np.float64] | None,
) -> tuple[Prediction, Members]:
    estimates: list[Estimate] = []
    members: Members = {}
    true = data.train_targets()
    for place, (kind, rows, fitted) in enumerate(zip(model.types, known, fits, strict=True)):
        estimates.append(_spread_out(len(true), rows, kind.from_table(fitted.value, fitted.spread)))
        scale = np.ones(len(rows)) if factors is None else factors[rows, place]
        members[data.targets[place]] = {
            name: {
                "weight": fitted.stack.weights[name],
                "error": float(
                    kind.errors(kind.from_table(own, own).value.numpy() / scale, true[rows, place]).mean(),
                ),
            }
            for name, own in fitted.members.items()
        }
    return Prediction.of(estimates).divided(None if factors is None else torch.from_numpy(factors)), members


def _fit_target(
    model: HybridModel,
    crystals: Crystals,
    place: int,
    x: NDArray[np.float64],
    values: NDArray[np.float64],
    groups: NDArray[np.int64],
    others: dict[str, NDArray[np.float64]],
    seed: int,
) -> FittedStack:
    """Fit the stack of one target to the crystals with a value."""
    kind = model.types[place]
    y = kind.table_outputs(values)
    baseline = None
    if model.targets[place] in model.referenced:
        amounts = amounts_of(crystals)
        fractions = amounts / amounts.sum(axis=1, keepdims=True)

        def baseline(fitted: NDArray[np.int64]) -> NDArray[np.float64]:
            energies = fit_references(crystals.take(fitted), y[fitted, 0], total=False)
            return (fractions @ energies.of_element)[:, None]

        whole = fit_references(crystals, y[:, 0], total=False)
        model.references[place] = torch.from_numpy(whole.of_element)
    return fit_stack(x, y, groups, others=others, baseline=baseline, absolute=kind.classes is None, seed=seed)


def _spread_out(n: int, known: NDArray[np.int64], estimate: Estimate) -> Estimate:
    """Spread the estimates of known crystals over all n, with NaN for the others."""

    def whole(part: torch.Tensor | None) -> torch.Tensor | None:
        if part is None:
            return None
        full = part.new_full((n, *part.shape[1:]), torch.nan)
        full[torch.from_numpy(known)] = part
        return full

    return Estimate(*map(whole, estimate))  # type: ignore[arg-type]


def _export(
    model: HybridModel,
    info: dict[str, Any],
    config: TrainingConfig,
    data: CrystalDataModule,
    predicted: Prediction,
    folder: Path,
) -> None:
    """Write the model with its error statistics; add the metadata of its parts to ``info``."""
    held_out: HeldOut
    if len(data.calibration_rows):
        held_out = held_out_errors([model], data, data.calibration_rows)
    else:
        value, std, _ = predicted
        held_out = errors_of(model.types, value.numpy(), None if std is None else std.numpy(), data.train_targets())
    known, info["calibration"] = learn(model, data, held_out, folder / "plots")
    tensors, plain = model.tabular.to_file()
    info |= {"recipe": "hybrid" if len(model.networks) else "frozen", "networks": len(model.networks), "tabular": plain}
    state = {**model.state_dict(), **{f"{model_file.TABULAR}{name}": tensor for name, tensor in tensors.items()}}
    seen = seen_crystals(config.pretrained, data.store, data.rows["train"])
    model_file.write(folder / "model.safetensors", "property_model", {**state, **known.tensors()}, info, seen)


def _print_members(members: Members) -> None:
    for target, own in members.items():
        rows = [[TITLES[name], f"{of['weight']:.2f}", f"{of['error']:.4g}"] for name, of in own.items()]
        print_table(f"Members, {target}", ["", "weight", "out-of-fold error"], rows)
