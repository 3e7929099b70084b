"""Which crystals to measure next: better than chance in simulated campaigns, spread out, and as a command."""

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from crysldnet import cli
from crysldnet.data.datasets import open_store
from crysldnet.descriptors import crystal_descriptors
from crysldnet.errors import ConfigError
from crysldnet.tools.suggest import choose, expected_improvement
from tiny import ENCODER, QUIET, subset

sklearn = pytest.importorskip("sklearn.ensemble")


def test_expected_improvement_is_the_mean_of_what_exceeds():
    drawn = np.random.default_rng(0).normal(1.0, 2.0, 1_000_000)
    exact = expected_improvement(np.array([1.0]), np.array([2.0]), 2.0)
    assert exact == pytest.approx(np.maximum(drawn - 2.0, 0.0).mean(), rel=0.01)


def test_alike_candidates_are_not_chosen_together():
    features = np.array([[0.0, 0.0], [0.01, 0.0], [5.0, 1.0], [0.0, 4.0]])
    mean, std = np.array([1.0, 0.99, 0.2, 0.1]), np.full(4, 1.0)
    assert [row for row, _ in choose(mean, std, features, 2, "learn", 0.0)][1] in (2, 3)
    first, second = choose(mean, std, features, 2, "maximize", 0.9)
    assert (first[0], second[0] == 1) == (0, False)
    assert [row for row, _ in choose(mean, std, features, 1, "minimize", 0.3)] == [3]


@pytest.mark.parametrize(
    ("name", "column"), [("matbench_jdft2d", "exfoliation_energy"), ("matbench_phonons", "last_phdos_peak")]
)
def test_a_campaign_finds_higher_values_than_chance(name, column):
    store = open_store(f"embedded:{name}")
    rows = np.arange(0, len(store), len(store) // 400)
    x, y = crystal_descriptors(store.crystals.take(rows)).values, store.numbers_of(column).astype(float)[rows]
    found: dict[str, list[float]] = {"chosen": [], "random": []}
    for seed in range(10):
        for way, values in found.items():
            rng = np.random.default_rng(seed)
            known = list(rng.permutation(len(y))[:20])
            for turn in range(4):
                rest = np.setdiff1d(np.arange(len(y)), known)
                if way == "random":
                    known += list(rng.permutation(rest)[:5])
                    continue
                trees = sklearn.ExtraTreesRegressor(20, random_state=turn).fit(x[known], y[known])
                each = np.array([tree.predict(x[rest]) for tree in trees.estimators_])
                rows = choose(each.mean(0), each.std(0), x[rest], 5, "maximize", y[known].max())
                known += [int(rest[row]) for row, _ in rows]
            values.append((y < y[known].max()).mean())
    better = np.array(found["chosen"]) - np.array(found["random"])
    assert better.mean() > 2 * better.std() / np.sqrt(len(better)), found


def test_the_command_writes_a_ranked_table(tmp_path, capsys):
    data = subset(tmp_path / "data.parquet", train=24, val=8, test=8)
    line = [*ENCODER, *QUIET, f"data.path={data}", "epochs=1", "min_steps=0", "baselines=false", f"runs={tmp_path}"]
    assert cli.run(["finetune", *line, "name=a"]) == 0
    words = ["suggest", f"model={tmp_path / 'finetune' / 'a'}", f"files={data}", "n=3", f"out={tmp_path / 'next.csv'}"]
    assert cli.run(words) == 0
    table = pyarrow.csv.read_csv(tmp_path / "next.csv").to_pydict()
    split = dict(zip(*pq.read_table(data, columns=["material_id", "split"]).to_pydict().values(), strict=True))
    assert table["rank"] == [1, 2, 3]
    assert {split[id_] for id_ in table["id"]} == {"test"}
    assert table["score"] == sorted(table["score"], reverse=True)
    assert "the best prediction of a candidate that the model has learned from" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="target: choose one of formation_energy_per_atom"):
        cli.run([*words, "target=gap"])
