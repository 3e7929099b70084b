"""Measure whether a distance in the latent space finds large errors, and whether intervals hold on test crystals."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray

import crysldnet
from crysldnet.data.datasets import open_store
from crysldnet.data.split import Split
from crysldnet.inference import Predictor
from crysldnet.readers.stream import StreamSettings
from experiments import evidence

FOLDER = Path(__file__).parent
COMMAND = "python -m experiments.uncertainty.run"
TARGET = "formation_energy_per_atom"
SEEDS = [0, 1]
SETTINGS = ["encoder=cgcnn", "optimizer.lr=0.004", "epochs=6", "min_steps=0", f"data.targets=[{TARGET}]"]
LEVEL = 0.9
SPLITS = range(8)
"""Seeds of the splits that coverage is measured over; also of the weights."""
SHARES = {"calibrated on the crystals that chose the epoch": 0.0, "calibrated on half of them, kept apart": 0.5}

Distance = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def distances(train: NDArray[np.float64]) -> dict[str, Distance]:
    """Return ways to tell how far features are from those of the training crystals [n, D]."""
    mean, values, vectors = train.mean(axis=0), *np.linalg.eigh(np.cov(train.T))
    whiten = vectors / np.sqrt(values + 1e-3 * values.mean())
    some = train[np.random.default_rng(0).permutation(len(train))[:1024]]

    def nearest(x: NDArray[np.float64], scale: NDArray[np.float64] | float) -> NDArray[np.float64]:
        apart = torch.cdist(torch.from_numpy(x / scale), torch.from_numpy(some / scale))
        return apart.topk(5, largest=False).values.mean(dim=1).numpy()

    return {
        "Mahalanobis": lambda x: np.linalg.norm((x - mean) @ whiten, axis=1),
        "5 nearest": lambda x: nearest(x, 1.0),
        "5 nearest, whitened": lambda x: nearest(x @ whiten, 1e-9 + (some @ whiten).std(axis=0).mean()),
        "5 nearest, each dimension over its spread": lambda x: nearest(x, some.std(axis=0) + 1e-9),
    }


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return Spearman's coefficient of values without ties."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def coverage(runs: Path, commit: str) -> list[evidence.Record]:
    """Train one model on each of several splits; return how many test crystals the intervals held."""
    store = open_store("embedded:mp_starter")
    y, records = store.numbers_of(TARGET), []
    for name, share in SHARES.items():
        found: dict[float, list[float]] = {0.5: [], 0.8: [], LEVEL: []}
        for seed in SPLITS:
            split = Split(by="formula", fractions=[0.6, 0.2, 0.2], seed=seed)
            drawn = ["data.split.by=formula", "data.split.fractions=[0.6,0.2,0.2]", f"data.split.seed={seed}"]
            run = f"apart_{share:g}_{seed}".replace(".", "_")
            kept = f"data.calibration_fraction={share:g}"
            evidence.launch(runs, "finetune", run, *SETTINGS, *drawn, f"seed={seed}", kept)
            test = split.rows(store)["test"]
            model = crysldnet.load(runs / "finetune" / run, device="cpu")
            for level, held in found.items():
                made = model.predict(store.crystals.take(test), interval=level, settings=StreamSettings(batch_size=256))
                held.append(100 * float(((made.low[:, 0] <= y[test]) & (y[test] <= made.high[:, 0])).mean()))
        records += [
            evidence.summarise(
                held,
                name=name,
                metric=f"test crystals inside intervals of {level:.0%}".replace("%", " %"),
                unit="%",
                seeds=list(SPLITS),
                data=f"embedded:mp_starter, {TARGET}, splits by formula of 60, 20 and 20 %",
                command=COMMAND,
                commit=commit,
            )
            for level, held in found.items()
        ]
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/uncertainty"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    evidence.launch(arguments.runs, "finetune", "ensemble", *SETTINGS, f"ensemble={len(SEEDS)}")
    run = arguments.runs / "finetune" / "ensemble"
    store = open_store("embedded:mp_starter")
    splits, y = store.texts_of("split"), store.numbers_of(TARGET)
    train, test = (np.flatnonzero(splits == name) for name in ("train", "test"))
    data = f"embedded:mp_starter, {TARGET}, {len(train):,} training and {len(test):,} test crystals"
    about = {"data": data, "command": COMMAND, "commit": evidence.current_commit(FOLDER)}
    records = []

    def record(values: list[float], name: str, metric: str, unit: str) -> None:
        seeds = SEEDS if len(values) == len(SEEDS) else []
        records.append(evidence.summarise(values, name=name, metric=metric, unit=unit, seeds=seeds, **about))

    settings = StreamSettings(batch_size=256)
    members = [crysldnet.load(run / f"member_{i}", device="cpu") for i in range(len(SEEDS))]
    ranks: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    widths, inside = [], []
    for member in members:
        features = [_features(member, store.crystals.take(rows), settings) for rows in (train, test)]
        found = member.predict(store.crystals.take(test), interval=LEVEL, settings=settings)
        error = np.abs(found.values[:, 0] - y[test])
        for name, distance in distances(features[0]).items():
            far = distance(features[1])
            farthest = far >= np.quantile(far, 0.9)
            ranks.setdefault(name, []).append(rank_correlation(far, error))
            ratios.setdefault(name, []).append(float(error[farthest].mean() / error[~farthest].mean()))
        widths.append(float((found.high - found.low)[:, 0].mean()))
        inside.append(100 * float(((found.low[:, 0] <= y[test]) & (y[test] <= found.high[:, 0])).mean()))
    for name in ranks:
        record(ranks[name], name, "rank correlation with the error", "1")
        record(ratios[name], name, "error of the farthest tenth over that of the others", "1")
    whole = crysldnet.load(run, device="cpu")
    found = whole.predict(store.crystals.take(test), interval=LEVEL, settings=settings)
    error = np.abs(found.values[:, 0] - y[test])
    assert whole.knowledge is not None
    known = whole.knowledge.calibration.targets[0]
    bare = np.sqrt(np.maximum((found.std[:, 0] / known.scale) ** 2 - known.floor**2, 0.0))
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    half = {
        "ensemble, standard deviation as it is": z * bare,
        "ensemble, standard deviation scaled": z * found.std[:, 0],
        "ensemble, conformal": (found.high - found.low)[:, 0] / 2,
    }
    record(inside, "one model, conformal", "test crystals inside intervals of 90 %", "%")
    record(widths, "one model, conformal", "mean width", "eV/atom")
    for name, width in half.items():
        record([100 * float((error <= width).mean())], name, "test crystals inside intervals of 90 %", "%")
        record([2 * float(width.mean())], name, "mean width", "eV/atom")
    evidence.write(FOLDER, [*records, *coverage(arguments.runs, about["commit"])])


def _features(model: Predictor, crystals: object, settings: StreamSettings) -> NDArray[np.float64]:
    return model.embed(crystals, settings=settings).features.astype(np.float64)


if __name__ == "__main__":
    main()
