"""The published encoders are those of the papers: sizes, graphs, bases and layers have the values of their definitions.

Golden values were computed in float64 from the published definitions by an independent implementation (NumPy, SciPy).
"""

import csv
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.unfactorized import unfactorize
from conftest import (
    COPPER,
    COPPER_CUBE,
    PEROVSKITE,
    ROCKSALT,
    ROCKSALT_CUBE,
    TRICLINIC,
    Cell,
    cell,
    cells_of,
    put_together,
)
from crysldnet.data.store import CrystalStore
from crysldnet.encoders import elements
from crysldnet.encoders.bases import (
    ExponentialNormalBasis,
    GaussianBasis,
    MultiquadricBasis,
    cosine_cutoff,
    harmonics,
)
from crysldnet.encoders.cgcnn import CGCNN, CGCNNConv
from crysldnet.encoders.cogn import CoGN
from crysldnet.encoders.ecomformer import EComFormer
from crysldnet.encoders.elements import cgcnn_table, pubchem_table
from crysldnet.encoders.icomformer import AngleLayer
from crysldnet.encoders.layers import GatedConv
from crysldnet.encoders.matformer import Matformer, MatformerConv
from crysldnet.encoders.potnet import PotNet
from crysldnet.graphs.batch import make_batch
from crysldnet.graphs.geometry import inverse, random_rotations
from crysldnet.graphs.lattice_edges import frames
from crysldnet.graphs.potentials import lattice_sums
from crysldnet.models.head import PropertyHead
from encoders import CLASSES, PUBLISHED, batch_of, every_crystal_differs, features, settled, small
from test_encoder_golden import EDGES, NODES, SOURCE, TARGET, doubles, filled, meta, size

HEADS: dict[str, dict[str, object]] = {
    "cartnet": {"width": 256, "readout": "atoms", "hidden": 128},
    "cgcnn": {"width": 64, "hidden": 128},
    "cogn": {"width": 128, "layers": 0},
    "ecomformer": {"width": 256},
    "icomformer": {"width": 256},
    "matformer": {"width": 128},
    "potnet": {"width": 256},
}
SIZES = {
    "cartnet": (2_497_281, 2_497_281),
    "cgcnn": (80_833, 80_833),
    "cogn": (697_601, 697_601),
    "ecomformer": (5_583_809, 5_583_809),
    "icomformer": (4_966_497, 4_892_417),
    "matformer": (2_880_641, 2_782_849),
    "potnet": (1_751_809, 1_751_809),
}
"""With the published head, in the published variant and without what is never used."""


@pytest.mark.parametrize("name", SIZES)
def test_encoder_and_head_have_the_published_number_of_parameters(name: str) -> None:
    head = size(meta(PropertyHead, outputs=1, **HEADS[name]))
    published, clean = (size(CLASSES[name](variant=variant)) for variant in ("published", "corrected"))
    assert (published + head, clean + head) == SIZES[name]


def test_the_paper_size_of_ecomformer_has_12_million_parameters() -> None:
    assert size(EComFormer(scalars=128)) + size(meta(PropertyHead, outputs=1, width=256)) == 12_459_137


EDGE_COUNTS = {
    "matformer": (72, 240, 30, 96),
    "icomformer": (76, 256, 84, 192),
    "pddformer": (76, 208, 84, 192),
    "potnet": (60, 144, 36, 96),
    "cartnet": (52, 208, 42, 168),
    "cogn": (52, 52, 42, 42),
    "cgcnn": (24, 96, 12, 48),
}
"""Rocksalt of 2 and 8 atoms, copper of 1 and 4, shells complete within 1e-8 Å; coGN on the asymmetric unit."""


@pytest.mark.parametrize("name", EDGE_COUNTS)
def test_published_graphs_have_the_published_number_of_edges(name: str) -> None:
    graph = replace(CLASSES[name](variant="published").graph, tolerance=0.0 if name == "cgcnn" else 1e-8)
    cells = (ROCKSALT, ROCKSALT_CUBE, COPPER, COPPER_CUBE)
    assert tuple(len(graph.build(put_together([c])).neighbors.source) for c in cells) == EDGE_COUNTS[name]


def test_potnet_has_every_ordered_pair_besides() -> None:
    for crystal, pairs in ((ROCKSALT, 4), (ROCKSALT_CUBE, 64), (COPPER, 1), (COPPER_CUBE, 16)):
        batch = make_batch(put_together([crystal]), PotNet().graph)
        assert batch.pairs is not None
        assert len(set(map(tuple, batch.pairs.T.tolist()))) == pairs == batch.pairs.shape[1]


def test_cogn_on_all_atoms_has_the_edges_of_the_full_cell() -> None:
    counts = [len(CoGN().graph.build(put_together([c])).neighbors.source) for c in (ROCKSALT, ROCKSALT_CUBE, COPPER)]
    assert counts == [52, 208, 42]


# fmt: off
BASES = [
    (GaussianBasis(-4, 4, 256, 1.0), -0.75 / 2.82, {119: 0.999489, 118: 0.351437, 120: 0.384697}, 1.77264),
    (MultiquadricBasis(-4, 4, 64), 0.3, {0: 33.877262, 63: 29.154655, 34: 1.009409}, None),
    (GaussianBasis(0, 8, 41, 1.0), 2.82, {13: 0.298197, 14: 0.990050, 15: 0.444858}, None),
    (GaussianBasis(0.25, 8, 32, 0.125), 2.82, {10: 0.990248, 11: 0.937255}, 5.013256),
    (ExponentialNormalBasis(5.0, 64), 2.82,
     {0: 0.021994, 1: 0.095875, 2: 0.249470, 3: 0.387466, 4: 0.359214, 5: 0.198783}, 1.393043),
]
# fmt: on


@pytest.mark.parametrize(("basis", "x", "values", "total"), BASES, ids=["potnet", "multi", "cgcnn", "cogn", "normal"])
def test_bases_have_their_golden_values(
    basis: nn.Module, x: float, values: dict[int, float], total: float | None
) -> None:
    found = basis(doubles([x]))[0]
    for index, value in values.items():
        assert found[index].item() == pytest.approx(value, abs=2e-6)
    assert total is None or found.sum().item() == pytest.approx(total, abs=2e-5)


def test_bases_hold_no_subnormal_number() -> None:
    length = torch.linspace(0.5, 12.0, 500)
    for basis, *_ in BASES:
        found = basis(length).abs()
        assert found[found > 0].min() > 1e-30


def test_cosine_cutoff_has_its_golden_value_and_ends() -> None:
    assert cosine_cutoff(doubles([2.82]), 5.0).item() == pytest.approx(0.400145, abs=1e-6)
    assert cosine_cutoff(doubles([5.0, 7.0]), 5.0).tolist() == [0.0, 0.0]


def test_harmonics_have_their_golden_values() -> None:
    y1, y2 = harmonics(doubles([1, 2, 2]) / 3.0)
    torch.testing.assert_close(y1, doubles([0.577350, 1.154701, 1.154701]), rtol=0, atol=1e-6)
    torch.testing.assert_close(y2, doubles([0.860663, 0.860663, 0.372678, 1.721326, 0.645497]), rtol=0, atol=1e-6)
    a1, a2 = harmonics(doubles([[1, 0, 0], [math.sqrt(0.5), math.sqrt(0.5), 0]]))
    assert (a1[0] @ a1[1]).item() == pytest.approx(2.121320, abs=1e-6)
    assert (a2[0] @ a2[1]).item() == pytest.approx(1.25, abs=1e-6)
    assert (a1.square().sum(1) - 3).abs().max() < 1e-12
    assert (a2.square().sum(1) - 5).abs().max() < 1e-12


def sums(a: float, shift: float, published: bool) -> np.ndarray:
    pair = np.array([[0.0, 0, 0], [shift] * 3])
    return lattice_sums(np.eye(3)[None] * a, pair, np.array([0, 2]), published=published).sums


def test_lattice_sums_have_their_golden_values() -> None:
    for published in (True, False):
        own, other = sums(1.0, 0.5, published)[:2]
        np.testing.assert_allclose(own[:2], [-2.837297, 8.401924], atol=2e-6)
        np.testing.assert_allclose(other[:2], [-0.801938, 20.643805], atol=3e-6)
        assert own[2] == pytest.approx(1.586154, abs=1e-6)
        assert sums(2.0, 0.5, published)[0, 0] == pytest.approx(-1.418649, abs=1e-6)
    # The Madelung constant of CsCl, referred to the lattice constant (C. Kittel): the complete sums have all digits.
    own, other = sums(1.0, 0.5, published=False)[:2]
    assert other[0] - own[0] == pytest.approx(2.035361509, abs=1e-9)
    assert sums(2.0, 0.0, published=True)[0, 2] == pytest.approx(1.125141, abs=1e-6)
    assert sums(2.0, 0.0, published=False)[0, 2] == pytest.approx(1.017679, abs=1e-6)


def test_london_and_pauli_sums_agree_with_direct_summation() -> None:
    rng = np.random.default_rng(0)
    lattice = TRICLINIC.lattice
    frac = rng.random((3, 3))
    found = lattice_sums(lattice[None], frac, np.array([0, 3]), published=False)
    n = np.stack(np.meshgrid(*[np.arange(-14, 15)] * 3, indexing="ij"), -1).reshape(-1, 3)
    for source, target, (_, london, pauli) in zip(found.source, found.target, found.sums, strict=True):
        r = np.linalg.norm((frac[source] - frac[target] + n) @ lattice, axis=1)
        assert pauli == pytest.approx(np.exp(-3.0 * r).sum(), abs=1e-9)
        assert london == pytest.approx((r[r > 1e-6] ** -6.0).sum(), abs=3e-6)  # the tail beyond 42 Å is 1.4e-6


def test_complete_lattice_sums_do_not_depend_on_the_basis_and_the_published_ones_do() -> None:
    skew = np.array([[1, 0, 0], [4, 1, 0], [-3, 5, 1]])
    frac = TRICLINIC.frac_coords
    ptr = np.array([0, 2])
    for published, close in ((False, True), (True, False)):
        one = lattice_sums(TRICLINIC.lattice[None], frac, ptr, published=published).sums
        other = lattice_sums((skew @ TRICLINIC.lattice)[None], frac @ np.linalg.inv(skew), ptr, published=published)
        assert np.allclose(one, other.sums, atol=1e-8) == close


def test_frames_have_their_golden_vectors() -> None:
    skewed = np.array([[3, 0, 0], [7.2, 3.4, 0], [-0.1, 11.1, 4.1]])
    lattices = np.stack([TRICLINIC.lattice, skewed, TRICLINIC.lattice * [-1, 1, 1], np.eye(3)])
    for tolerance in (0.0, 1e-4):
        found = frames(lattices, tolerance)
        assert found[0].tolist() == [[-1, 0, 0], [0, -1, 0], [0, 0, 1]]
        assert found[1].tolist() == [[-1, 0, 0], [2, -1, 0], [7, -3, 1]]
        np.testing.assert_allclose(found[0] @ lattices[0], found[1] @ lattices[1], atol=1e-12)
        mirrored = [[-3, 0, 0], [-1.2, 3.4, 0], [-0.7, -0.9, -4.1]]
        np.testing.assert_allclose(found[2] @ lattices[2], mirrored, atol=1e-12)
        assert np.linalg.det(found @ lattices).min() > 0
    vectors = found[0] @ lattices[0]
    r = np.array([1.0, 2, 2])
    cosines = vectors @ r / np.linalg.norm(vectors, axis=1) / 3.0
    np.testing.assert_allclose(cosines, [-0.333333, -0.739600, 0.728455], atol=1e-6)


def test_frames_are_found_in_long_and_in_skewed_cells_without_listing_all_vectors_as_long() -> None:
    """A list up to the longest edge would hold 4 · 10⁷ vectors of the first cell."""
    long = np.diag([2.5, 2.5, 9000.0])
    expected = [[-1, 0, 0], [0, -1, 0], [0, 0, 1]]
    skew = np.array([[1, 0, 0], [900, 1, 0], [-70, 300, 1]])
    found = frames(np.stack([long, skew @ long, skew @ TRICLINIC.lattice]), 1e-4)
    assert np.linalg.norm(found[0] @ long, axis=1).tolist() == [2.5, 2.5, 9000.0]
    np.testing.assert_allclose(np.linalg.norm(found[1] @ skew @ long, axis=1), [2.5, 2.5, 9000.0], rtol=1e-12)
    np.testing.assert_allclose(found[2] @ skew @ TRICLINIC.lattice, expected @ TRICLINIC.lattice, atol=1e-9)


@pytest.mark.parametrize("name", CLASSES)
def test_a_cell_with_one_very_long_edge_costs_no_more_than_others(name: str) -> None:
    graph = small(name).graph
    one, long = (put_together([cell(np.diag([2.5, 2.5, c]), [6], [[0, 0, 0]])]) for c in (3.0, 9000.0))
    graph.build(one)
    start = time.process_time()
    found = graph.build(long)
    assert time.process_time() - start < 0.5
    assert len(found.neighbors.source) >= 6


# fmt: off
LAYERS = {
    "matformer": ([[-0.173963, 0.308916], [-0.015294, 0.826126], [-0.073432, 0.306489]]),
    "cartnet": ([[1.007579, 0.010551], [0.001197, 1.017027], [0.511479, -0.480111]]),
    "potnet": ([[1.043547, 0.060448], [0.018871, 1.094199], [0.525097, 0.0]]),
    "cgcnn": ([[1.553225, 0.944732], [1.243563, 1.795916], [1.232215, 0.617882]]),
}
CARTNET_EDGES = [[0.827599, -0.158991], [0.429962, 1.182613], [0.048582, 0.350039], [-0.536669, 0.670977]]
ANGLE_EDGES = [[1.061369, 0.602062], [0.904970, 1.547964], [0.763538, 1.043069], [0.351358, 0.979213]]
# fmt: on


def layer_output(name: str, layer: nn.Module) -> Tensor:
    if name == "cartnet":
        envelope = cosine_cutoff(doubles([2, 3, 4, 1]), 5.0).unsqueeze(-1)
        nodes, gate = layer(NODES, EDGES, SOURCE, TARGET, envelope)
        torch.testing.assert_close(EDGES + gate, doubles(CARTNET_EDGES), rtol=0, atol=1e-6)
        return nodes
    out = layer(NODES, EDGES, SOURCE, TARGET)
    return out[0] if name == "potnet" else out


@pytest.mark.parametrize("factorized", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_their_golden_output(name: str, factorized: bool) -> None:
    layers = {
        "matformer": MatformerConv(2, 2),
        "cartnet": GatedConv(2, "silu"),
        "potnet": GatedConv(2, "relu"),
        "cgcnn": CGCNNConv(2, 2),
    }
    layer = filled(layers[name])
    if not factorized:
        unfactorize(layer)
    torch.testing.assert_close(layer_output(name, layer), doubles(LAYERS[name]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("factorized", [True, False])
def test_angle_layer_has_its_golden_output(factorized: bool) -> None:
    layer = filled(AngleLayer(2))
    if not factorized:
        unfactorize(layer)
    lengths = doubles([[[0.2, -0.1]], [[0.4, 0.3]], [[-0.5, 0.1]]])
    angles = torch.stack([0.5 * EDGES, 0.2 * EDGES + 0.1, -EDGES])
    found = layer(EDGES, lengths, angles, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(found, doubles(ANGLE_EDGES), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def real(starter: CrystalStore) -> list[Cell]:
    rng = np.random.default_rng(2)
    rows = rng.permutation(np.flatnonzero(starter.crystals.sizes <= 10))[:24]
    return [*cells_of(starter, rows), ROCKSALT, PEROVSKITE, TRICLINIC]


@pytest.mark.parametrize("variant", ["corrected", "published"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_factorized_encoder_equals_the_unfactorized_formula(name: str, variant: str, real: list[Cell]) -> None:
    """In training mode, batch statistics included: output and every gradient, in double and single precision."""
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        encoder = small(name, variant=variant).to(dtype)
        for part in encoder.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        if name == "cartnet":
            encoder.augment = False
        batch = batch_of(real, encoder, dtype)
        results = []
        for factorized in (True, False):
            if not factorized:
                unfactorize(encoder)
            out = encoder(batch)
            used = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
            grads = torch.autograd.grad(out.square().mean(), list(used.values()), allow_unused=True)
            results.append((out, dict(zip(used, grads, strict=True))))
        scale = results[0][0].abs().max().clamp_min(1.0)
        assert (results[0][0] - results[1][0]).abs().max() < tolerance * scale
        if dtype == torch.float64:
            for key, grad in results[0][1].items():
                assert grad is not None, f"{key} isn't used"
                torch.testing.assert_close(grad, results[1][1][key], rtol=1e-7, atol=1e-10)


SHEAR = np.array([[0, 1, 2], [1, 0, 4], [2, 4, 0]])
SWITCHES = {
    "cgcnn": ROCKSALT,
    "matformer": COPPER,
    "icomformer": COPPER,
    "ecomformer": COPPER,
    "pddformer": COPPER,
    "potnet": TRICLINIC,
    # A shear by a millionth splits the third shell, and the 24th neighbor lies in it.
    "cogn": ROCKSALT._replace(lattice=ROCKSALT.lattice @ (np.eye(3) + 1e-6 * SHEAR)),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_published_and_clean_variants_differ_with_the_same_weights(name: str, real: list[Cell]) -> None:
    """Self-images twice, ties cut, lattice sums truncated: each shows."""
    cell = SWITCHES[name]
    clean = settled(small(name), real)
    published = small(name, variant="published").double().eval()
    published.load_state_dict(clean.state_dict(), strict=False)
    assert every_crystal_differs(features([cell], clean), features([cell], published), [cell], far=1e-5)


def test_lanthanum_and_cerium_look_alike_in_the_table_of_cgcnn_and_not_in_that_of_cogn() -> None:
    table = cgcnn_table()
    assert table.shape == (119, 92)
    assert len(np.unique(table[1:101], axis=0)) == 92
    assert sorted(np.flatnonzero(table.sum(0) == 0)) == [69, 71]
    assert (table[57] == table[58]).all()
    assert not table[0].any()
    assert (table[101:104] == table[100]).all()
    own = pubchem_table()
    assert not (own[57] == own[58]).all()
    np.testing.assert_allclose(own[1:, :4].mean(0), 0.0, atol=1e-6)
    np.testing.assert_allclose(own[1:, :4].std(0, ddof=1), 1.0, atol=1e-6)


def test_every_oxidation_state_has_a_slot_of_its_own() -> None:
    states = pubchem_table()[:, 4:]
    rows = list(csv.DictReader((Path(elements.__file__).parent / "tables" / "pubchem_elements.csv").open()))
    assert [int(n) for n in states[1:].sum(1)] == [len(set(row["oxidation_states"].split())) for row in rows]
    assert states[25, [0, 13, 11]].tolist() == [1.0, 0.0, 1.0]  # manganese has +7 and +4, and no +6


def test_sparse_crystals_lose_their_lattice_edges_in_published_matformer_alone() -> None:
    sparse = COPPER._replace(lattice=COPPER.lattice * 3.5)  # its 12 nearest are 8.9 Å away
    for factor, variant, extra in ((1.0, "published", 6), (3.5, "published", 0), (3.5, "corrected", 6)):
        graph = Matformer(variant=variant, lattice_edges=True).graph
        without = Matformer(variant=variant, lattice_edges=False).graph
        cell = sparse if factor > 1 else COPPER
        with_edges, plain = (len(g.build(put_together([cell])).neighbors.source) for g in (graph, without))
        assert with_edges - plain == extra, (factor, variant)


def test_published_cgcnn_has_twelve_edges_an_atom_and_pads_beyond_eight_angstrom() -> None:
    far = COPPER._replace(lattice=np.eye(3) * 7.0)  # six neighbors at 7 Å, twelve at 9.9 Å
    batch = make_batch(put_together([PEROVSKITE, far]), CGCNN(variant="published").graph)
    assert torch.bincount(batch.edge_index[1]).tolist() == [12] * 6
    lengths = batch.edge_vec.norm(dim=1)[-12:].sort().values
    torch.testing.assert_close(lengths, torch.tensor([7.0] * 6 + [9.0] * 6), rtol=0, atol=1e-5)
    assert batch.edge_index[0, -12:].tolist() == [5] * 12
    assert len(make_batch(put_together([far]), CGCNN().graph).edge_vec) == 18


@pytest.mark.parametrize("cell", [ROCKSALT_CUBE, PEROVSKITE, COPPER_CUBE], ids=["rocksalt", "perovskite", "copper"])
def test_the_asymmetric_unit_gives_all_atoms_the_features_of_the_full_cell(cell: Cell, real: list[Cell]) -> None:
    clean = settled(small("cogn"), real)
    reduced = small("cogn", asymmetric_unit=True).double().eval()
    reduced.load_state_dict(clean.state_dict())
    batch = batch_of([cell], reduced)
    assert len(batch.edge_vec) < len(batch_of([cell], clean).edge_vec)
    torch.testing.assert_close(features([cell], reduced), features([cell], clean), rtol=0, atol=1e-9)
    assert features([cell], clean).std() > 1e-3


def test_the_asymmetric_unit_keeps_masked_and_visible_atoms_apart() -> None:
    hidden = ROCKSALT_CUBE._replace(numbers=np.array([0, *ROCKSALT_CUBE.numbers[1:]]))
    representative = batch_of([hidden], small("cogn", asymmetric_unit=True)).representative
    assert representative is not None
    assert (representative[1:] != 0).all()


@pytest.mark.parametrize("activation", ["softplus", "shifted_softplus"])
def test_published_heads_compute_their_formula(activation: str) -> None:
    torch.manual_seed(0)
    head = PropertyHead(
        width=6, outputs=2, hidden=10, activation=activation, activate_first=activation == "softplus"
    ).double()
    x = torch.randn(5, 6).double()
    pooled = torch.stack([x[:2].mean(0), x[2:].mean(0)])
    shift = 0.0 if activation == "softplus" else math.log(2.0)
    first = torch.log1p(pooled.exp()) if activation == "softplus" else pooled
    hidden = torch.log1p(head.mlp[0](first).exp()) - shift
    torch.testing.assert_close(head(pooled, torch.tensor([0, 0, 1, 1, 1]), 2), head.mlp[-1](hidden))


def test_atoms_readout_takes_the_mean_after_the_head() -> None:
    torch.manual_seed(0)
    head = PropertyHead(width=6, outputs=2, readout="atoms").double()
    x = torch.randn(5, 6).double()
    expected = torch.stack([head.mlp(x[:2]).mean(0), head.mlp(x[2:]).mean(0)])
    torch.testing.assert_close(head(x, torch.tensor([0, 0, 1, 1, 1]), 2), expected)
    head.readout = "mean"
    pooled = torch.stack([x[:2].mean(0), x[2:].mean(0)])
    assert (head(pooled, torch.tensor([0, 0, 1, 1, 1]), 2) - expected).abs().max() > 1e-4


def test_random_rotations_are_rotations_and_uniform() -> None:
    torch.manual_seed(0)
    turns = random_rotations(20_000, like=torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(turns @ turns.transpose(1, 2), torch.eye(3).double().expand_as(turns))
    torch.testing.assert_close(torch.linalg.det(turns), torch.ones(20_000).double())
    assert turns.mean(0).abs().max() < 0.02
    # Uniform over rotations, the cosine of the angle has the mean −1/2 (E tr R = 0 and tr R = 1 + 2 cos).
    assert abs(float((torch.diagonal(turns, dim1=1, dim2=2).sum(1) - 1).mean()) / 2 + 0.5) < 0.02
    for column in turns[:, :, 0].T:  # a coordinate of a point uniform on the sphere is uniform in [−1, 1]
        assert abs(float(column.square().mean()) - 1 / 3) < 0.01


def test_inverses_by_cofactors_are_inverses() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(50, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(inverse(matrices), torch.linalg.inv(matrices))
