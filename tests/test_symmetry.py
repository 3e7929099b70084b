"""What must not change under a symmetry doesn't, and what must change does.

Positions are rows: a rotation R takes x to x R and the lattice L to L R.
"""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from conftest import (
    PEROVSKITE,
    ROCKSALT,
    TRICLINIC,
    Cell,
    cells_of,
    put_together,
    random_triclinic,
    supercell,
)
from crysldnet.data.store import CrystalStore
from crysldnet.encoders.pddformer import PDDFormer
from crysldnet.graphs.batch import CrystalBatch, make_batch
from crysldnet.graphs.corruption import Corruption, DenoisingTargets
from crysldnet.models.dit import DiT
from crysldnet.models.head import PropertyHead, PropertyModel
from crysldnet.models.objectives import Denoising, Published

WIDTH = 16
CLOSE = {"rtol": 0.0, "atol": 1e-9}
FAR = 1e-3


@pytest.fixture(scope="module")
def cells(starter: CrystalStore) -> list[Cell]:
    """Real, ideal, triclinic and unreduced crystals, some atoms masked."""
    rng = np.random.default_rng(5)
    small = rng.permutation(np.flatnonzero(starter.crystals.sizes <= 12))[:12]
    triclinic = [random_triclinic(rng, n) for n in (2, 3, 5, 6)]
    unreduced = np.array([[1, 0, 0], [2, 1, 0], [-1, 3, 1]])
    skewed = TRICLINIC._replace(
        lattice=unreduced @ TRICLINIC.lattice, frac_coords=TRICLINIC.frac_coords @ np.linalg.inv(unreduced)
    )
    masked = triclinic[2]._replace(numbers=np.where(np.arange(5) < 2, 0, triclinic[2].numbers))
    return [*cells_of(starter, small), ROCKSALT, PEROVSKITE, TRICLINIC, skewed, *triclinic, masked]


def make_encoder(cells: list[Cell], variant: str) -> PDDFormer:
    """A small encoder whose batch statistics come from real crystals, in evaluation mode."""
    torch.manual_seed(0)
    encoder = PDDFormer(width=WIDTH, layers=3, k=12, n_distances=20, n_basis=64, variant=variant).double()
    with torch.no_grad():
        for _ in range(20):
            encoder(batch_of(cells, encoder))
    return encoder.eval()


@pytest.fixture(scope="module")
def encoder(cells: list[Cell]) -> PDDFormer:
    return make_encoder(cells, "corrected")


@pytest.fixture(scope="module")
def published(cells: list[Cell]) -> PDDFormer:
    return make_encoder(cells, "published")


def batch_of(cells: list[Cell], encoder: PDDFormer, undo: DenoisingTargets | None = None) -> CrystalBatch:
    return make_batch(put_together(cells), encoder.graph, undo=undo, dtype=torch.float64)


@torch.no_grad()
def features(cells: list[Cell], encoder: PDDFormer) -> Tensor:
    return encoder(batch_of(cells, encoder))


def assert_same(one: Tensor, other: Tensor) -> None:
    assert one.abs().max() > 0.1
    torch.testing.assert_close(one, other, **CLOSE)


def every_crystal_differs(one: Tensor, other: Tensor, cells: list[Cell]) -> bool:
    ends = np.cumsum([len(c.numbers) for c in cells])[:-1].tolist()
    return all(d.abs().max() > FAR for d in torch.tensor_split(one - other, ends))


def repeated(values: Tensor, cells: list[Cell], copies: int) -> Tensor:
    """The atoms' values as they stand in supercells of this many copies."""
    parts = values.split([len(c.numbers) for c in cells])
    return torch.cat([part.repeat(copies, 1) for part in parts])


def rotation(seed: int) -> NDArray[np.float64]:
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.linalg.det(q)


def transformed(cells: list[Cell], matrix: NDArray[np.float64]) -> list[Cell]:
    return [c._replace(lattice=c.lattice @ matrix) for c in cells]


def orders(cells: list[Cell], seed: int) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return [rng.permutation(len(c.numbers)) for c in cells]


def permuted(cells: list[Cell], order: list[NDArray[np.int64]]) -> list[Cell]:
    return [Cell(c.lattice, c.numbers[o], c.frac_coords[o]) for c, o in zip(cells, order, strict=True)]


def flat_order(order: list[NDArray[np.int64]]) -> Tensor:
    begin = np.cumsum([0, *map(len, order)])[:-1]
    return torch.from_numpy(np.concatenate([o + b for o, b in zip(order, begin, strict=True)]))


@pytest.mark.parametrize("seed", range(3))
def test_encoder_is_invariant_to_rotation(cells: list[Cell], encoder: PDDFormer, seed: int) -> None:
    assert_same(features(cells, encoder), features(transformed(cells, rotation(seed)), encoder))


def test_encoder_sees_a_stretch(cells: list[Cell], encoder: PDDFormer) -> None:
    stretch = rotation(0) @ np.diag([1.0, 1.0, 1.1])
    assert every_crystal_differs(features(cells, encoder), features(transformed(cells, stretch), encoder), cells)


def test_encoder_is_invariant_to_reflection(cells: list[Cell], encoder: PDDFormer) -> None:
    expected = features(cells, encoder)
    for mirror in (np.diag([-1.0, 1, 1]), -np.eye(3), rotation(4) @ np.diag([1.0, 1, -1])):
        assert_same(expected, features(transformed(cells, mirror), encoder))


def test_encoder_sees_atoms_reflected_without_their_cell(cells: list[Cell], encoder: PDDFormer) -> None:
    generic = [c for c in cells if len(c.numbers) >= 3 and not np.allclose(np.mod(4 * c.frac_coords, 1), 0)][-3:]
    flipped = [c._replace(frac_coords=c.frac_coords * [-1, 1, 1]) for c in generic]
    assert every_crystal_differs(features(generic, encoder), features(flipped, encoder), generic)


def test_encoder_is_invariant_to_translation(cells: list[Cell], encoder: PDDFormer) -> None:
    shift = np.array([0.3217, -1.2345, 7.41])
    moved = [c._replace(frac_coords=c.frac_coords + shift @ np.linalg.inv(c.lattice)) for c in cells]
    assert_same(features(cells, encoder), features(moved, encoder))


def test_encoder_is_invariant_to_the_choice_of_origin(cells: list[Cell], encoder: PDDFormer) -> None:
    rng = np.random.default_rng(1)
    moved = [c._replace(frac_coords=np.mod(c.frac_coords + rng.random(3), 1.0)) for c in cells]
    assert_same(features(cells, encoder), features(moved, encoder))


def test_encoder_sees_one_atom_moved(cells: list[Cell], encoder: PDDFormer) -> None:
    several = [c for c in cells if len(c.numbers) > 1]
    moved = []
    for c in several:
        step = np.zeros((len(c.numbers), 3))
        step[0] = [0.11, -0.07, 0.13]
        moved.append(c._replace(frac_coords=c.frac_coords + step @ np.linalg.inv(c.lattice)))
    assert every_crystal_differs(features(several, encoder), features(moved, encoder), several)


def test_encoder_follows_the_order_of_atoms(cells: list[Cell], encoder: PDDFormer) -> None:
    expected, order = features(cells, encoder), orders(cells, 2)
    found = features(permuted(cells, order), encoder)
    assert_same(expected[flat_order(order)], found)
    assert (expected - found).abs().max() > FAR


def test_encoder_sees_two_species_exchanged(cells: list[Cell], encoder: PDDFormer) -> None:
    chosen = [c for c in cells if c.numbers[0] != c.numbers[-1]]
    exchanged = []
    for c in chosen:
        numbers = c.numbers.copy()
        numbers[[0, -1]] = numbers[[-1, 0]]
        exchanged.append(c._replace(numbers=numbers))
    assert len(chosen) > 5
    assert every_crystal_differs(features(chosen, encoder), features(exchanged, encoder), chosen)


def test_encoder_sees_a_changed_species_in_that_crystal_alone(cells: list[Cell], encoder: PDDFormer) -> None:
    changed = [*cells[:3], cells[3]._replace(numbers=np.array([79, *cells[3].numbers[1:]])), *cells[4:]]
    difference = (features(cells, encoder) - features(changed, encoder)).abs().amax(1)
    owner = torch.from_numpy(put_together(cells).crystal)
    assert cells[3].numbers[0] != 79
    assert difference[owner == 3].min() > 1e-4
    assert difference[owner != 3].max() < 1e-12


@pytest.mark.parametrize("repeats", [(2, 1, 1), (1, 2, 3)])
def test_clean_features_do_not_depend_on_the_choice_of_cell(
    cells: list[Cell], encoder: PDDFormer, repeats: tuple[int, int, int]
) -> None:
    larger = [supercell(c, repeats) for c in cells]
    assert_same(repeated(features(cells, encoder), cells, int(np.prod(repeats))), features(larger, encoder))


def test_clean_features_do_not_depend_on_the_basis_of_the_lattice(cells: list[Cell], encoder: PDDFormer) -> None:
    u = np.array([[2, 1, 0], [1, 1, 0], [-3, 2, 1]])
    skewed = [Cell(u @ c.lattice, c.numbers, c.frac_coords @ np.linalg.inv(u)) for c in cells]
    assert_same(features(cells, encoder), features(skewed, encoder))


def test_published_features_depend_on_the_choice_of_cell(cells: list[Cell], published: PDDFormer) -> None:
    several = [c for c in cells if len(c.numbers) > 1 and c.numbers.min() > 0]
    larger = [supercell(c, (2, 1, 1)) for c in several]
    expected = repeated(features(several, published), several, 2)
    assert every_crystal_differs(expected, features(larger, published), larger)


def test_clean_features_see_a_changed_atom_in_the_supercell(cells: list[Cell], encoder: PDDFormer) -> None:
    larger = [supercell(c, (2, 1, 1)) for c in cells]
    changed = [c._replace(numbers=np.array([83, *c.numbers[1:]])) for c in larger]
    assert every_crystal_differs(features(larger, encoder), features(changed, encoder), larger)


def test_features_in_single_precision_do_not_depend_on_the_rest_of_the_batch(starter: CrystalStore) -> None:
    torch.manual_seed(1)
    encoder = PDDFormer(width=32, n_basis=64)
    rows = np.random.default_rng(3).choice(len(starter), 64, replace=False)

    @torch.no_grad()
    def encode(some: NDArray[np.int64]) -> Tensor:
        return encoder(make_batch(starter.crystals.take(some), encoder.graph))

    for _ in range(3):
        encode(rows)
    encoder.eval()
    together = encode(rows)
    owner = np.repeat(np.arange(64), starter.crystals.sizes[rows])
    for b in range(0, 64, 5):
        alone = encode(rows[b : b + 1])
        torch.testing.assert_close(together[torch.from_numpy(owner == b)], alone, rtol=1e-5, atol=1e-5)


def test_predictions_of_a_supercell_are_equal_or_twice_as_large(cells: list[Cell], encoder: PDDFormer) -> None:
    larger = [supercell(c, (2, 1, 1)) for c in cells]
    for readout, factor in (("mean", 1.0), ("sum", 2.0)):
        torch.manual_seed(0)
        head = PropertyHead(width=WIDTH, outputs=2, readout=readout)
        model = PropertyModel(encoder=encoder, head=head, targets=["a", "b"], units=["", ""]).double().eval()
        model.mean.fill_(3.0)
        model.std.fill_(2.0)
        with torch.no_grad():
            small, large = model(batch_of(cells, encoder)), model(batch_of(larger, encoder))
        assert small.std() > FAR
        torch.testing.assert_close(large, factor * small, **CLOSE)


@pytest.fixture(scope="module")
def denoising() -> Denoising:
    torch.manual_seed(2)
    return Denoising(latent_dim=WIDTH, hidden=24, corruption=Corruption(displacement=0.1, strain=0.03)).double()


@torch.no_grad()
def undone(cells: list[Cell], encoder: PDDFormer, denoising: Denoising) -> tuple[Tensor, Tensor]:
    batch = batch_of(cells, encoder)
    return denoising.undo_geometry(encoder(batch), batch)


@pytest.mark.parametrize("mirror", [1.0, -1.0], ids=["rotation", "reflection"])
def test_displacement_and_strain_turn_with_the_crystal(
    cells: list[Cell], encoder: PDDFormer, denoising: Denoising, mirror: float
) -> None:
    matrix = rotation(7) @ np.diag([1, 1, mirror])
    displacement, strain = undone(cells, encoder, denoising)
    turned_displacement, turned_strain = undone(transformed(cells, matrix), encoder, denoising)
    r = torch.from_numpy(matrix)
    torch.testing.assert_close(turned_displacement, displacement @ r, **CLOSE)
    torch.testing.assert_close(turned_strain, r.T @ strain @ r, **CLOSE)
    assert displacement.norm(dim=1).max() > FAR
    assert (turned_displacement - displacement).abs().max() > FAR
    assert (turned_strain - strain).abs().max() > 1e-4
    assert (turned_strain - r @ strain @ r.T).abs().max() > 1e-4


def test_strain_is_symmetric_and_differs_between_crystals(
    cells: list[Cell], encoder: PDDFormer, denoising: Denoising
) -> None:
    strain = undone(cells, encoder, denoising)[1]
    torch.testing.assert_close(strain, strain.transpose(1, 2), **CLOSE)
    assert strain.std(dim=0).max() > 1e-4


def test_displacement_vanishes_by_symmetry_and_follows_order_and_cell(
    cells: list[Cell], encoder: PDDFormer, denoising: Denoising
) -> None:
    displacement, strain = undone(cells, encoder, denoising)
    order = orders(cells, 3)
    moved = [c._replace(frac_coords=c.frac_coords + 0.271) for c in permuted(cells, order)]
    found, found_strain = undone(moved, encoder, denoising)
    torch.testing.assert_close(found, displacement[flat_order(order)], **CLOSE)
    torch.testing.assert_close(found_strain, strain, **CLOSE)
    larger = [supercell(c, (2, 1, 1)) for c in cells]
    found, found_strain = undone(larger, encoder, denoising)
    torch.testing.assert_close(found, repeated(displacement, cells, 2), **CLOSE)
    torch.testing.assert_close(found_strain, strain, **CLOSE)
    ideal, ideal_strain = undone([ROCKSALT, PEROVSKITE], encoder, denoising)
    assert ideal.abs().max() < 1e-12
    sphere = torch.diagonal(ideal_strain, dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(3)
    torch.testing.assert_close(ideal_strain, sphere, **CLOSE)


def test_only_the_published_objective_changes_under_rotation(
    cells: list[Cell], encoder: PDDFormer, denoising: Denoising
) -> None:
    """The corruption turns with the crystal, so a loss that can be brought to zero must stay as it is."""
    corrupted, undo = denoising.corruption.apply(put_together(cells), np.random.default_rng(0))
    ends = corrupted.ptr[1:-1]
    parts = zip(
        corrupted.lattice, np.split(corrupted.numbers, ends), np.split(corrupted.frac_coords, ends), strict=True
    )
    before, r = [Cell(*part) for part in parts], rotation(8)
    turned_undo = undo._replace(displacement=undo.displacement @ r, strain=r.T @ undo.strain @ r)
    first, second = batch_of(before, encoder, undo), batch_of(transformed(before, r), encoder, turned_undo)
    torch.manual_seed(0)
    published = Published(latent_dim=WIDTH, corruption=Corruption()).double()
    with torch.no_grad():
        z = encoder(first)
        own, turned = denoising(z, first), denoising(encoder(second), second)
        theirs, theirs_turned = published(z, first).terms, published(z, second).terms
    assert set(own.terms) == {"species", "displacement", "strain"}
    for name, value in own.terms.items():
        torch.testing.assert_close(turned.terms[name], value, **CLOSE)
    for name, (total, _) in own.measures.items():
        torch.testing.assert_close(turned.measures[name][0], total, rtol=0, atol=1e-6)
    assert (theirs["coordinates"] - theirs_turned["coordinates"]).abs() > FAR
    assert (theirs["lattice"] - theirs_turned["lattice"]).abs() > FAR


def make_dit(positional: str) -> DiT:
    """A small transformer with no map left at zero, as they are at the start of training."""
    torch.manual_seed(3)
    dit = DiT(latent_dim=6, width=24, layers=2, heads=3, positional=positional).double().eval()
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return dit


@pytest.fixture(scope="module")
def noisy() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(4)
    sizes = torch.tensor([7, 3, 1, 5])
    return torch.randn(4, 7, 6).double(), torch.rand(4).double(), torch.arange(7) < sizes[:, None]


@pytest.mark.parametrize("gradient", [False, True], ids=["no gradient", "gradient"])
def test_denoiser_without_positions_follows_the_order_of_atoms(noisy: tuple[Tensor, ...], gradient: bool) -> None:
    z, t, valid = noisy
    order = torch.tensor([4, 2, 6, 0, 5, 1, 3])
    with torch.set_grad_enabled(gradient):
        without, with_index = make_dit("none"), make_dit("index")
        out = without(z, t, valid)
        torch.testing.assert_close(without(z[:, order], t, valid[:, order]), out[:, order], **CLOSE)
        assert out.std() > 0.1
        changed = with_index(z[:1, order], t[:1], valid[:1, order]) - with_index(z, t, valid)[:1, order]
    assert changed.abs().max() > FAR


@pytest.mark.parametrize("positional", ["none", "index"])
@pytest.mark.parametrize("gradient", [False, True], ids=["no gradient", "gradient"])
def test_denoiser_does_not_see_padding_or_other_crystals(
    noisy: tuple[Tensor, ...], positional: str, gradient: bool
) -> None:
    z, t, valid = noisy
    dit = make_dit(positional)
    with torch.set_grad_enabled(gradient):
        together = dit(z, t, valid)
        for b, n in enumerate(valid.sum(1).tolist()):
            alone = dit(z[b : b + 1, :n], t[b : b + 1], valid[b : b + 1, :n])
            torch.testing.assert_close(together[b, :n], alone[0], **CLOSE)
            assert (together[b, n:] == 0).all()
        open_ = dit(z, t, torch.ones_like(valid))
    assert (open_[1, :3] - together[1, :3]).abs().max() > FAR


def test_denoiser_sees_the_time(noisy: tuple[Tensor, ...]) -> None:
    z, t, valid = noisy
    dit = make_dit("none")
    with torch.no_grad():
        assert (dit(z, t, valid) - dit(z, t + 0.01, valid)).abs().amax(dim=(1, 2)).min() > FAR
