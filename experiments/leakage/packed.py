"""What is lost when the fingerprints of what a model has seen are packed into 8 bytes a crystal.

python -m experiments.leakage.packed --data FOLDER

FOLDER holds the Parquet files that PAIRS names.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from crysldnet.data.datasets import open_store
from crysldnet.data.fingerprint import POSSIBLE, SIMILAR, Fingerprints, candidates, overlap
from crysldnet.data.matching import Matcher
from crysldnet.data.store import CrystalStore
from experiments import evidence

HERE = Path(__file__).parent
COMMAND = "python -m experiments.leakage.packed --data FOLDER"
PAIRS = [
    ("mp_cgcnn_train", "mp_20_val"),
    ("mp_cgcnn_train", "matbench_phonons"),
    ("mp_cgcnn_train", "jarvis_dft_3d_part"),
    ("mp_cgcnn_train", "mp_cgcnn_val"),
    ("mp_cgcnn_train", "unlabelled_oqmd_lemat"),
    ("perov_5_train", "perov_5_val"),
]


def compare(tested: Fingerprints, seen: Fingerprints) -> dict[str, tuple[int, int]]:
    """Return what 42 bytes and what 8 bytes a crystal count as shared."""
    packed = overlap(tested.packed(), seen.packed())
    exact = {
        "formulas": int(np.isin(tested.formulas, seen.formulas).sum()),
        "ids": int(np.isin(tested.ids, seen.ids).sum()),
        "similar": len(np.unique(candidates(tested, seen, SIMILAR)[:, 0])),
    }
    return {name: (exact[name], packed[name]) for name in exact}


def differences(tested: CrystalStore, seen: CrystalStore) -> tuple[int, int]:
    """Count similar crystals that packed fingerprints miss, and those they add that StructureMatcher calls the same."""
    a, b = Fingerprints.of(tested), Fingerprints.of(seen)
    packed_a, packed_b = a.packed(), b.packed()
    similar = np.unique(candidates(a, b, SIMILAR)[:, 0])
    missed = len(similar) - overlap(packed_a[similar], packed_b)["similar"]
    matcher = Matcher(tested.crystals, seen.crystals)
    same = set()
    for i, j in candidates(a, b, POSSIBLE).tolist():
        if i not in same and i not in similar and overlap(packed_a[[i]], packed_b)["similar"] and matcher(i, j):
            same.add(i)
    return missed, len(same)


def main() -> None:
    """Compare every pair of sets, write results.json and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="folder of the Parquet files")
    folder = parser.parse_args().data
    commit = evidence.current_commit(HERE)
    records: list[evidence.Record] = []

    def record(name: str, metric: str, value: float, data: str) -> None:
        records.append(
            evidence.summarise(
                [value], name=name, metric=metric, unit="crystals", seeds=[], data=data, command=COMMAND, commit=commit
            )
        )

    for pair in PAIRS:
        seen, tested = (open_store(str(folder / f"{name}.parquet")) for name in pair)
        title, data = " → ".join(pair), f"{len(tested):,} test crystals, against {len(seen):,}"
        for by, (exact, packed) in compare(Fingerprints.of(tested), Fingerprints.of(seen)).items():
            record(title, f"{by}, exactly", exact, data)
            record(title, f"{by}, packed", packed, data)
        missed, same = differences(tested, seen)
        record(title, "similar, missed by packed", missed, data)
        record(title, "similar, added by packed and the same structure", same, data)
    evidence.write(HERE, records)
    print(evidence.table_by_name(records))


if __name__ == "__main__":
    main()
