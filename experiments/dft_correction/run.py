"""Correct formation energies from DFT by measured enthalpies: 20 % and 80 % of them to learn from, the rest to test on.

python -m experiments.dft_correction.run data=FOLDER [key=value …]

The keys are those of config.yaml beside this file. Runs that are complete are not run again, so an interrupted study
goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crysldnet.data.datamodule import open_store
from crysldnet.data.elements import reduced_formula
from crysldnet.data.store import CrystalStore
from experiments import evidence

HERE = Path(__file__).parent
DIFFERENCE = "measured_minus_dft"
LEARNED_DFT = "pretrained=trained_on_dft"


@dataclass(frozen=True)
class Computed:
    """Crystals with a formation energy from DFT."""

    file: str
    target: str


@dataclass(frozen=True)
class Measured:
    """Crystals with a measured value, and the name of the value from DFT beside it."""

    file: str
    target: str
    dft: str


@dataclass(frozen=True)
class Settings:
    """See config.yaml."""

    data: str
    dft: Computed
    measured: Measured
    runs: str
    out: str | None
    seeds: list[int]
    shares: list[float]
    inner: float
    plausible: float
    ridge: float
    encoder: str
    dft_training: list[str]
    networks: list[str]
    only: list[str] | None
    ways: dict[str, list[str]]


def formulas(store: CrystalStore) -> np.ndarray:
    """Return the reduced formula of every crystal."""
    crystals = store.crystals
    return np.array(
        [reduced_formula(crystals.numbers[a:b]) for a, b in zip(crystals.ptr, crystals.ptr[1:], strict=False)]
    )


def composition(store: CrystalStore) -> np.ndarray:
    """Return [n, 119] fractions of the elements in every crystal."""
    crystals = store.crystals
    made = np.zeros((len(store), 119))
    np.add.at(made, (crystals.crystal, crystals.numbers), 1.0)
    return made / made.sum(1, keepdims=True)


@dataclass(frozen=True)
class Study:
    """The settings, and the crystals that have both a measured value and one from DFT.

    Attributes:
        settings: of the study.
        crystals: with ``measured`` and ``dft``, [n] each, in eV/atom.
    """

    settings: Settings
    crystals: CrystalStore
    measured: np.ndarray
    dft: np.ndarray

    @classmethod
    def of(cls, settings: Settings) -> Study:
        """Open the measured crystals."""
        whole = open_store(settings.measured.file)
        measured, dft = whole.numbers_of(settings.measured.target), whole.numbers_of(settings.measured.dft)
        known = np.flatnonzero(np.isfinite(measured) & np.isfinite(dft))
        crystals = CrystalStore.from_table(whole.to_table().take(pa.array(known)), whole.name)
        return cls(settings, crystals, measured[known], dft[known])

    @property
    def runs(self) -> Path:
        """Folder of the runs."""
        return Path(self.settings.runs)

    def write_dft(self, path: Path) -> None:
        """Write the crystals from DFT, none of a formula that was measured; a twentieth of their formulas validates."""
        store = open_store(self.settings.dft.file)
        names = formulas(store)
        energy = store.numbers_of(self.settings.dft.target)
        rows = np.flatnonzero(~np.isin(names, formulas(self.crystals)) & (np.abs(energy) <= self.settings.plausible))
        held = np.random.default_rng(0).permutation(np.unique(names[rows]))
        held = held[: len(held) // 20]
        table = store.to_table().take(pa.array(rows))
        table = table.select([c for c in table.column_names if c != "split"])
        split = np.where(np.isin(names[rows], held), "val", "train")
        pq.write_table(table.append_column("split", pa.array(split)), path)

    def write_measured(self, share: float, seed: int, path: Path) -> dict[str, np.ndarray]:
        """Divide the measured crystals by formula; return the rows of train, val and test."""
        names = formulas(self.crystals)
        order = np.random.default_rng([seed, 1]).permutation(np.unique(names))
        learned = order[: round(share * len(order))]
        inner = learned[: round(self.settings.inner * len(learned))]
        split = np.where(np.isin(names, inner), "val", np.where(np.isin(names, learned), "train", "test"))
        table = self.crystals.to_table()
        table = table.select([c for c in table.column_names if c not in ("split", DIFFERENCE)])
        field = pa.field(DIFFERENCE, pa.float64(), metadata={"unit": "eV/atom"})
        table = table.append_column(field, pa.array(self.measured - self.dft))
        pq.write_table(table.append_column("split", pa.array(split)), path)
        return {name: np.flatnonzero(split == name) for name in ("train", "val", "test")}

    def linear_correction(self, rows: dict[str, np.ndarray]) -> float:
        """Return the test MAE of DFT, corrected by a ridge regression on the fractions of the elements."""
        learn = np.concatenate([rows["train"], rows["val"]])
        x, y = composition(self.crystals), self.measured - self.dft
        penalty = self.settings.ridge / len(learn) * np.eye(x.shape[1])
        weights = np.linalg.solve(x[learn].T @ x[learn] + penalty, x[learn].T @ y[learn])
        return float(np.abs(y[rows["test"]] - x[rows["test"]] @ weights).mean())

    def finetune(self, name: str, path: Path, target: str, *arguments: str) -> dict:
        """Train one model on the split that stands in a file."""
        return evidence.launch(
            self.runs,
            "finetune",
            name,
            "data=custom",
            f"data.path={path}",
            f"data.targets=[{target}]",
            "data.split.by=column",
            *arguments,
        )

    def learn_dft(self) -> Path:
        """Train the model that the others start from; return its run."""
        path = self.runs / "data" / "dft.parquet"
        if not path.exists():
            self.write_dft(path)
        settings = self.settings
        bf16 = "trainer.precision=bf16-mixed"
        own = ["recipe=network", "pretrained=none", f"encoder={settings.encoder}", bf16, *settings.dft_training]
        self.finetune("dft", path, settings.dft.target, *own)
        return self.runs / "finetune" / "dft"

    def errors(self, chosen: dict[str, list[str]], share: float, seed: int) -> dict[str, float]:
        """Return the test MAE of DFT, of its linear correction, and of the ways that were chosen."""
        path = self.runs / "data" / f"measured_{share:g}_{seed}.parquet"
        rows = self.write_measured(share, seed, path)
        results = {
            "DFT as it is": float(np.abs(self.dft - self.measured)[rows["test"]].mean()),
            "DFT, linear correction of each element": self.linear_correction(rows),
        }
        for title, (learned, *way) in chosen.items():
            name = f"way{[*self.settings.ways].index(title)}-{share:g}-seed{seed}"
            target = self.settings.measured.target if learned == "measured" else DIFFERENCE
            own = [f"pretrained={self.learn_dft()}" if word == LEARNED_DFT else word for word in way]
            own += [f"encoder={self.settings.encoder}"] if "pretrained=none" in own else []
            own += self.settings.networks if "recipe=network" in own else []
            results[title] = self.finetune(name, path, target, f"seed={seed}", "baselines=false", *own)["test/mae"]
        return results


def main() -> None:
    """Run everything; write results.json and the table."""
    settings = evidence.settings(Settings, HERE, __doc__ or "", {"runs", "out", "seeds", "shares", "only", "ways"})
    out = Path(settings.out or HERE)
    kept = out / "results.json"
    study = Study.of(settings)
    (study.runs / "data").mkdir(parents=True, exist_ok=True)
    known = {
        "unit": "eV/atom",
        "seeds": settings.seeds,
        "data": f"{len(study.crystals)} measured formation enthalpies",
        "command": "python -m experiments.dft_correction.run data=FOLDER",
        "commit": evidence.current_commit(HERE),
    }
    for name, (learned, *_) in settings.ways.items():
        if learned not in ("measured", "difference"):
            raise SystemExit(f"ways: {name!r} begins with {learned!r}; put measured or difference there")
    chosen = {name: way for name, way in settings.ways.items() if settings.only is None or name in settings.only}
    before = {(r.name, r.metric): r for r in (evidence.read(kept) if kept.exists() else [])}
    records = []
    for share in settings.shares:
        results = [study.errors(chosen, share, seed) for seed in settings.seeds]
        metric = f"test MAE, {share:.0%} to learn from"
        for title in [*results[0], *(title for title in settings.ways if title not in chosen)]:
            if title in results[0]:
                errors = [result[title] for result in results]
                records.append(evidence.summarise(errors, name=title, metric=metric, **known))
            elif (title, metric) in before:
                records.append(before[title, metric])
    out.mkdir(parents=True, exist_ok=True)
    evidence.write(out, records)


if __name__ == "__main__":
    main()
