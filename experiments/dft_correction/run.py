"""Correct formation energies from DFT by measured enthalpies: 20 % and 80 % of them to learn from, the rest to test on.

python experiments/dft_correction/run.py --data FOLDER [--runs FOLDER] [--seeds N]

FOLDER holds mp_cgcnn_train.parquet and expt_formation_kingsbury.parquet. Runs that are complete are not run again, so
an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crysldnet import evidence
from crysldnet.data.datamodule import open_store
from crysldnet.data.elements import reduced_formula
from crysldnet.data.store import CrystalStore

HERE = Path(__file__).parent
MEASURED, COMPUTED, DIFFERENCE = (
    "expt_formation_enthalpy_per_atom",
    "dft_formation_energy_per_atom",
    "measured_minus_dft",
)
SHARES = (0.2, 0.8)
INNER = 0.15
"""Share of the rows to learn from that chooses the epoch."""
IMPLAUSIBLE = 5.0
"""eV/atom; formation energies beyond ± this are errors of the source."""
RIDGE = 1.0
"""Pseudo-count of the linear correction: an element seen in few crystals is corrected less."""
ENCODER = "encoder=neighbor_attention_small"
DFT_EPOCHS, EPOCHS, MIN_STEPS = 8, 25, 700


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


def write_dft(data: Path, measured: CrystalStore, path: Path) -> None:
    """Write the crystals with energies from DFT, none of a formula that was measured; a twentieth of them validates."""
    store = open_store(str(data / "mp_cgcnn_train.parquet"))
    names = formulas(store)
    energy = store.numbers_of("formation_energy_per_atom")
    rows = np.flatnonzero(~np.isin(names, formulas(measured)) & (np.abs(energy) <= IMPLAUSIBLE))
    held = np.random.default_rng(0).permutation(np.unique(names[rows]))
    held = held[: len(held) // 20]
    table = store.to_table().take(pa.array(rows))
    table = table.select([c for c in table.column_names if c != "split"])
    split = np.where(np.isin(names[rows], held), "val", "train")
    pq.write_table(table.append_column("split", pa.array(split)), path)


def write_measured(store: CrystalStore, share: float, seed: int, path: Path) -> dict[str, np.ndarray]:
    """Divide the measured crystals by formula; return the rows of train, val and test."""
    names = formulas(store)
    order = np.random.default_rng([seed, 1]).permutation(np.unique(names))
    learned = order[: round(share * len(order))]
    inner = learned[: round(INNER * len(learned))]
    split = np.where(np.isin(names, inner), "val", np.where(np.isin(names, learned), "train", "test"))
    table = store.to_table()
    table = table.select([c for c in table.column_names if c not in ("split", DIFFERENCE)])
    difference = store.numbers_of(MEASURED) - store.numbers_of(COMPUTED)
    field = pa.field(DIFFERENCE, pa.float64(), metadata={"unit": "eV/atom"})
    table = table.append_column(field, pa.array(difference)).append_column("split", pa.array(split))
    pq.write_table(table, path)
    return {name: np.flatnonzero(split == name) for name in ("train", "val", "test")}


def linear_correction(store: CrystalStore, rows: dict[str, np.ndarray]) -> float:
    """Return the test MAE of DFT and a correction of each element, by ridge regression on all rows to learn from."""
    learn = np.concatenate([rows["train"], rows["val"]])
    x, y = composition(store), store.numbers_of(MEASURED) - store.numbers_of(COMPUTED)
    weights = np.linalg.solve(x[learn].T @ x[learn] + RIDGE / len(learn) * np.eye(x.shape[1]), x[learn].T @ y[learn])
    return float(np.abs(y[rows["test"]] - x[rows["test"]] @ weights).mean())


def finetune(runs: Path, name: str, *arguments: str) -> dict:
    """Train one model."""
    return evidence.launch(runs, "finetune", name, "data=custom", "trainer.precision=bf16-mixed", *arguments)


def study(runs: Path, measured: CrystalStore, share: float, seed: int) -> dict[str, float]:
    """Return the test MAE of every way to use the measured values."""
    path = runs / "data" / f"measured_{share:g}_{seed}.parquet"
    rows = write_measured(measured, share, seed, path)
    dft = measured.numbers_of(COMPUTED)[rows["test"]]
    results = {
        "DFT as it is": float(np.abs(dft - measured.numbers_of(MEASURED)[rows["test"]]).mean()),
        "DFT, linear correction of each element": linear_correction(measured, rows),
    }
    ways = {
        "structure alone, from scratch": ("none", MEASURED),
        "structure alone, trained on DFT first": (str(runs / "finetune" / "dft"), MEASURED),
        "DFT, learned correction, from scratch": ("none", DIFFERENCE),
        "DFT, learned correction, trained on DFT first": (str(runs / "finetune" / "dft"), DIFFERENCE),
    }
    for place, (title, (pretrained, target)) in enumerate(ways.items()):
        result = finetune(
            runs,
            f"way{place}-{share:g}-seed{seed}",
            *([ENCODER] if pretrained == "none" else []),
            f"data.path={path}",
            f"data.targets=[{target}]",
            "data.split.by=column",
            f"pretrained={pretrained}",
            f"seed={seed}",
            f"epochs={EPOCHS}",
            f"min_steps={MIN_STEPS}",
        )
        results[title] = result["test/mae"]
    return results


def main() -> None:
    """Run everything; write results.json and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--runs", type=Path, default=Path("runs/dft_correction"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="divisions of the measured crystals")
    settings = parser.parse_args()
    runs = settings.runs
    (runs / "data").mkdir(parents=True, exist_ok=True)
    commit = evidence.current_commit(HERE)
    whole = open_store(str(settings.data / "expt_formation_kingsbury.parquet"))
    known = np.isfinite(whole.numbers_of(MEASURED)) & np.isfinite(whole.numbers_of(COMPUTED))
    measured = CrystalStore.from_table(whole.to_table().take(pa.array(np.flatnonzero(known))), whole.name)
    if not (runs / "data" / "dft.parquet").exists():
        write_dft(settings.data, measured, runs / "data" / "dft.parquet")
    finetune(
        runs,
        "dft",
        ENCODER,
        f"data.path={runs / 'data' / 'dft.parquet'}",
        "data.targets=[formation_energy_per_atom]",
        "data.split.by=column",
        f"epochs={DFT_EPOCHS}",
    )
    seeds = list(range(settings.seeds))
    records = []
    for share in SHARES:
        results = [study(runs, measured, share, seed) for seed in seeds]
        for title in results[0]:
            records.append(
                evidence.summarise(
                    [result[title] for result in results],
                    name=title,
                    metric=f"test MAE, {share:.0%} to learn from",
                    unit="eV/atom",
                    seeds=seeds,
                    data=f"{len(measured)} measured formation enthalpies",
                    command="python experiments/dft_correction/run.py --data FOLDER",
                    commit=commit,
                )
            )
    evidence.write(HERE, records)


if __name__ == "__main__":
    main()
