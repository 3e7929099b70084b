"""What pretraining sets share with test sets, and what the filter before the structure matcher loses and saves.

python -m experiments.leakage.run --data FOLDER

FOLDER holds mp_cgcnn_train.parquet, mp_20_val.parquet, matbench_jdft2d.parquet, matbench_phonons.parquet and
jarvis_dft_3d_part.parquet.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from crysldnet.data.datasets import open_store
from crysldnet.data.elements import formulas_of
from crysldnet.data.fingerprint import POSSIBLE, SIMILAR, Fingerprints, Tolerance, candidates
from crysldnet.data.matching import Matcher
from crysldnet.data.schema import table_from_crystals
from crysldnet.data.store import CrystalStore
from crysldnet.graphs.crystals import Crystals
from crysldnet.tools.datacheck.audit import Shared, audit
from experiments import evidence

HERE = Path(__file__).parent
COMMAND = "python -m experiments.leakage.run --data FOLDER"
ANY = Tolerance(np.inf, np.inf)
MAX_ATOMS, MAX_ATOMS_OF_COPIES = 60, 20
STRAIN, DISPLACEMENT = 0.02, 0.05


def audits(folder: Path) -> list[Shared]:
    """Compare every pair of sets that the question names."""
    train = str(folder / "mp_cgcnn_train.parquet")
    tests = [str(folder / f"{name}.parquet") for name in ("matbench_jdft2d", "matbench_phonons", "mp_20_val")]
    return [audit("embedded:mp_starter@train", "embedded:mp_starter@test"), *(audit(train, test) for test in tests)]


def judge(a: CrystalStore, b: CrystalStore) -> dict[str, float]:
    """Hand every pair of one formula to the matcher, and count what each tolerance keeps."""
    fingerprints = Fingerprints.of(a), Fingerprints.of(b)
    pairs = candidates(*fingerprints, ANY)
    small = (a.crystals.sizes[pairs[:, 0]] <= MAX_ATOMS) & (b.crystals.sizes[pairs[:, 1]] <= MAX_ATOMS)
    pairs = pairs[small]
    matcher = Matcher(a.crystals, b.crystals)
    started = time.process_time()
    match = np.array([matcher(i, j) for i, j in pairs.tolist()], bool)
    seconds = time.process_time() - started
    kept = {}
    for name, tolerance in (("possible", POSSIBLE), ("similar", SIMILAR)):
        inside = {tuple(pair) for pair in candidates(*fingerprints, tolerance).tolist()}
        kept[name] = np.array([tuple(pair) in inside for pair in pairs.tolist()], bool)
    return {
        "pairs": len(pairs),
        "matches": int(match.sum()),
        "lost": int((match & ~kept["possible"]).sum()),
        "spared": float((~kept["possible"] & ~match).sum() / (~match).sum()),
        "recall": float((match & kept["similar"]).sum() / match.sum()),
        "precision": float((match & kept["similar"]).sum() / kept["similar"].sum()),
        "speed": len(pairs) / seconds,
    }


def disturbed(crystals: Crystals, seed: int) -> Crystals:
    """Strain every cell and displace every atom."""
    rng = np.random.default_rng(seed)
    strain = rng.normal(0, STRAIN, (len(crystals), 3, 3))
    lattice = crystals.lattice @ (np.eye(3) + (strain + strain.transpose(0, 2, 1)) / 2)
    shift = rng.normal(0, DISPLACEMENT, (len(crystals.numbers), 3))
    moved = np.einsum("ni,nij->nj", shift, np.linalg.inv(lattice)[crystals.crystal])
    return Crystals(lattice, crystals.ptr, crystals.numbers, crystals.frac_coords + moved.astype(np.float32))


def copies() -> tuple[int, int, int]:
    """Compare small embedded crystals with disturbed copies: how many, how many match, how many of these are lost."""
    store = open_store("embedded:mp_starter")
    crystals = store.crystals.take(np.flatnonzero(store.crystals.sizes <= MAX_ATOMS_OF_COPIES))
    other = disturbed(crystals, seed=0)
    matcher = Matcher(crystals, other)
    match = [i for i in range(len(crystals)) if matcher(i, i)]
    sets = [_store(c) for c in (crystals, other)]
    near = {tuple(pair) for pair in candidates(*(Fingerprints.of(s) for s in sets), POSSIBLE).tolist()}
    return len(crystals), len(match), sum((i, i) not in near for i in match)


def _store(crystals: Crystals) -> CrystalStore:
    return CrystalStore.from_table(table_from_crystals(crystals, [str(i) for i in range(len(crystals))], {}, {}, {}))


def speed(store: CrystalStore) -> tuple[float, float]:
    """Return fingerprints and formulas a second, after a first round that compiles."""
    rows = np.arange(len(store))
    Fingerprints.of(store, rows[:100])
    started = time.process_time()
    Fingerprints.of(store, rows)
    middle = time.process_time()
    formulas_of(store.crystals)
    return len(rows) / (middle - started), len(rows) / (time.process_time() - middle)


def main() -> None:
    """Run everything and write results.json and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="folder of the Parquet files")
    folder = parser.parse_args().data
    commit = evidence.current_commit(HERE)
    records: list[evidence.Record] = []

    def record(name: str, metric: str, value: float, unit: str, data: str) -> None:
        records.append(
            evidence.summarise(
                [value], name=name, metric=metric, unit=unit, seeds=[], data=data, command=COMMAND, commit=commit
            )
        )

    for shared in audits(folder):
        train, test = (Path(name).name.removesuffix(".parquet") for name in (shared.train, shared.test))
        for by in ("ids", "formulas", "structures"):
            found = len(getattr(shared, by))
            share = f"{100 * found / shared.test_crystals:.1f} % of {shared.test_crystals:,} test crystals"
            data = f"{share}, against {shared.train_crystals:,}"
            record(f"{train} → {test}", f"test crystals shared by {by.removesuffix('s')}", found, "crystals", data)
    train_store = open_store(str(folder / "mp_cgcnn_train.parquet"))
    for name in ("mp_20_val", "matbench_phonons", "jarvis_dft_3d_part"):
        counts = judge(train_store, open_store(str(folder / f"{name}.parquet")))
        data = f"{counts['pairs']:,} pairs of one formula, {counts['matches']:,} matches"
        title = f"filter, mp_cgcnn_train and {name}"
        record(title, "matches lost by the filter", counts["lost"], "pairs", data)
        record(title, "other pairs that the matcher is spared", 100 * counts["spared"], "%", data)
        record(title, "similar: recall of matches", 100 * counts["recall"], "%", data)
        record(title, "similar: precision", 100 * counts["precision"], "%", data)
        record(title, "StructureMatcher, both ways", counts["speed"], "pairs per CPU second", data)
    total, matching, lost = copies()
    data = f"{total:,} crystals of mp_starter, {matching:,} match their copy"
    record("filter, disturbed copies", "matches lost by the filter", lost, "pairs", data)
    fingerprints, formulas = speed(train_store)
    record("speed", "fingerprints", fingerprints, "crystals per CPU second", "mp_cgcnn_train")
    record("speed", "reduced formulas", formulas, "crystals per CPU second", "mp_cgcnn_train")
    evidence.write(HERE, records)


if __name__ == "__main__":
    main()
