"""Bases, layers, losses and sizes have the values that follow from their definitions."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.unfactorized import unfactorize
from conftest import PEROVSKITE, ROCKSALT, ROCKSALT_CUBE, TRICLINIC, Cell, cell, cells_of, put_together
from crysldnet.data.store import CrystalStore
from crysldnet.encoders.bases import ExponentialBasis, GaussianBasis
from crysldnet.encoders.layers import ComFormerConv, PairMLP
from crysldnet.encoders.pddformer import DistanceMixing, PDDFormer
from crysldnet.graphs.batch import CorruptionTargets, CrystalBatch, make_batch
from crysldnet.graphs.corruption import Corruption
from crysldnet.models.dit import DiT, sinusoids
from crysldnet.models.latent import Latent, Posterior
from crysldnet.models.objectives import Denoising, Published, masked_species

MASK_COUNTS = {1: 0, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2, 7: 3, 10: 3, 11: 4}
"""Atoms hidden of so many at a fraction of 0.3; the published loader drops crystals of one atom."""


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def meta(kind: type[nn.Module], **settings: object) -> nn.Module:
    """Make a module without memory for its weights."""
    with torch.device("meta"):
        return kind(**settings)


def doubles(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# fmt: off
BASES = [
    (ExponentialBasis(-4, 0, 256), -0.75 / 2.82, 238,
     {238: 0.999968, 237: 0.983009, 239: 0.985802, 255: 0.011007}, 14.13801),
    (ExponentialBasis(-4, 0, 256), -0.25, 239, {239: 0.999939}, 14.12676),
    (ExponentialBasis(0, 8, 128), 2.82, 45, {45: 0.996601, 44: 0.963574, 46: 0.908747}, 7.06207),
    (ExponentialBasis(-1, 1, 256), 0.5, 191, {191: 0.999510}, 20.01382),
    (ExponentialBasis(-1, 1, 256), 0.0, None, {127: 0.998041, 128: 0.998041}, None),
]
# fmt: on


@pytest.mark.parametrize(("basis", "x", "largest", "values", "total"), BASES)
def test_exponential_basis_has_its_golden_values(
    basis: ExponentialBasis, x: float, largest: int | None, values: dict[int, float], total: float | None
) -> None:
    """Computed in float64 from the definition, γ the inverse of the spacing."""
    for dtype in (torch.float64, torch.float32):
        found = basis(torch.tensor([x], dtype=dtype))[0]
        assert found.dtype == dtype
        assert largest is None or int(found.argmax()) == largest
        for index, value in values.items():
            assert found[index].item() == pytest.approx(value, abs=2e-6)
        assert total is None or found.sum().item() == pytest.approx(total, abs=2e-5)


def test_gaussian_basis_falls_to_exp_of_minus_half_one_spacing_away() -> None:
    basis = GaussianBasis(0.0, 8.0, 33)
    found = basis(doubles([1.0, 1.25, 0.75, 1.5]))[:, 4]
    torch.testing.assert_close(found, torch.exp(-0.5 * doubles([0.0, 1.0, 1.0, 4.0])), rtol=0, atol=1e-6)


SOURCE, TARGET = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 0, 1, 2])
NODES = doubles([[1, 0], [0, 1], [0.5, -0.5]])
EDGES = doubles([[0.5, -0.5], [0.25, 1], [0, 0.3], [-1, 0.2]])


def filled(module: nn.Module) -> nn.Module:
    """Set W[o, i] = 0.1 · (((o + 2 i) mod 5) − 2) and b[o] = 0.05 · ((o mod 3) + 1), norms as they begin."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            o, i = torch.meshgrid(*map(torch.arange, part.weight.shape), indexing="ij")
            part.weight.data = 0.1 * ((o + 2 * i) % 5 - 2).double()
            if part.bias is not None:
                part.bias.data = 0.05 * (torch.arange(len(part.bias)) % 3 + 1).double()
    return module.double().eval()


@pytest.mark.parametrize("factorized", [True, False])
def test_convolution_has_its_golden_output(factorized: bool) -> None:
    """Computed in float64 from the definition."""
    conv = filled(ComFormerConv(2))
    if not factorized:
        unfactorize(conv)
    expected = doubles([[1.346629, 0.745879], [0.713414, 1.391686], [1.002397, 0.514208]])
    torch.testing.assert_close(conv(NODES, EDGES, SOURCE, TARGET), expected, rtol=0, atol=1e-6)
    assert (conv(NODES, EDGES, TARGET, SOURCE) - expected).abs().max() > 1e-3


def test_distance_mixing_has_its_golden_output() -> None:
    """Computed in float64 from the definition."""
    a = doubles([[0.1, 0.2], [0.3, -0.4], [-0.2, 0.6]])
    h, a_next = filled(DistanceMixing(2, dropout=0.5))(NODES, a)
    expected = doubles([[1.048164, 0.099857], [0.048297, 1.098928], [0.548997, -0.400159]])
    torch.testing.assert_close(h, expected, rtol=0, atol=1e-6)
    assert torch.equal(a_next, a + NODES)


def random_graph(dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    target = torch.randint(0, 30, (400,)).sort().values
    nodes, pairs = torch.randn(30, width, dtype=dtype), torch.randn(400, width, dtype=dtype)
    return nodes.requires_grad_(), pairs.requires_grad_(), torch.randint(0, 30, (400,)), target


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_factorized_convolution_equals_the_published_one(dtype: torch.dtype, tolerance: float, training: bool) -> None:
    width = 32
    torch.manual_seed(1)
    conv = ComFormerConv(width).to(dtype).train(training)
    nodes, pairs, source, target = random_graph(dtype, width)
    weights = torch.randn(30, width, dtype=dtype) / 30
    results = []
    for factorized in (True, False):
        if not factorized:
            unfactorize(conv)
        out = conv(nodes, pairs, source, target)
        inputs = [nodes, pairs, *(p for p in conv.parameters())]
        results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for name, one, other in zip(["out", "h", "edge", *dict(conv.named_parameters())], *results, strict=True):
        assert (one - other).abs().max() < tolerance, name
        # A map before a norm with batch statistics: its bias has no gradient.
        assert one.abs().max() > 1e-4 or (training and name.endswith("bias")), name


def test_the_factorized_pair_map_really_depends_on_both_ends_and_the_edge() -> None:
    torch.manual_seed(2)
    pair = PairMLP(8, out=3).double()
    nodes, pairs, source, target = random_graph(torch.float64, 8)
    out = pair(nodes, nodes, pairs, source, target)
    assert out.shape == (400, 3)
    for changed in (
        pair(nodes + 1, nodes, pairs, source, target),
        pair(nodes, nodes + 1, pairs, source, target),
        pair(nodes, nodes, pairs + 1, source, target),
        pair(nodes, nodes, pairs, target, source),
    ):
        assert (changed - out).abs().max() > 1e-2


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_of_the_convolution_are_those_of_finite_differences(training: bool) -> None:
    torch.manual_seed(3)
    conv = ComFormerConv(3).double().train(training)
    nodes, pairs = torch.randn(4, 3).double().requires_grad_(), torch.randn(7, 3).double().requires_grad_()
    source, target = torch.tensor([1, 2, 0, 3, 0, 1, 2]), torch.tensor([0, 0, 1, 1, 2, 3, 3])
    assert torch.autograd.gradcheck(lambda h, e: conv(h, e, source, target), (nodes, pairs))


def softplus(x: NDArray) -> NDArray:
    return np.logaddexp(0, x)


def by_definition(encoder: PDDFormer, batch: CrystalBatch) -> NDArray:
    """PDDFormer in evaluation mode, written down from its equations, one edge at a time where there is a sum."""
    p = {name: value.numpy() for name, value in encoder.state_dict().items()}
    numbers, owner = batch.numbers.numpy(), batch.crystal.numpy()
    source, target = batch.edge_index.numpy()
    width = encoder.width

    def lin(name: str, x: NDArray) -> NDArray:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name: str, x: NDArray) -> NDArray:
        scale = p[f"{name}.weight"] / np.sqrt(p[f"{name}.running_var"] + 1e-5)
        return (x - p[f"{name}.running_mean"]) * scale + p[f"{name}.bias"]

    def mlp(name: str, x: NDArray) -> NDArray:
        x = lin(f"{name}.first", x)
        return lin(f"{name}.second", x / (1 + np.exp(-x)))

    weight = np.empty(len(numbers))
    for i, z in enumerate(numbers):
        mine = numbers[owner == owner[i]].astype(float)
        weight[i] = z / mine.sum() * (1 if encoder.weight_per_cell else (mine > 0).sum())
    a = lin("distances", np.column_stack([weight, batch.distances.numpy()]))
    h = lin("species", np.eye(119)[numbers])
    centers = np.linspace(-4, 0, encoder.edge.in_features)
    x = -0.75 / np.linalg.norm(batch.edge_vec.numpy(), axis=1, keepdims=True)
    e = softplus(lin("edge", np.exp(-((x - centers) ** 2) / (centers[1] - centers[0]))))
    for layer in range(len(encoder.convs)):
        c = f"convs.{layer}"
        q, k, v, eps = (lin(f"{c}.{m}", y) for m, y in (("query", h), ("key", h), ("value", h), ("edge", e)))
        keys = mlp(f"{c}.key_mlp", np.hstack([k[target], k[source], eps]))
        messages = mlp(f"{c}.message_mlp", np.hstack([v[target], v[source], eps]))
        gate = 1 / (1 + np.exp(-norm(f"{c}.edge_norm", q[target] * keys / np.sqrt(width))))
        total = np.zeros_like(h)
        for edge, i in enumerate(target):
            total[i] += messages[edge] * gate[edge]
        h = softplus(h + norm(f"{c}.node_norm", lin(f"{c}.output", total)))
        if layer + 1 < len(encoder.convs):
            m = f"mixing.{layer}"
            a = a + h
            u1, u2 = np.split(lin(f"{m}.expand", norm(f"{m}.norm", a)), 2, axis=1)
            h = h + lin(f"{m}.output", lin(f"{m}.gate", u1) * u2 * (1 + np.vectorize(math.erf)(u2 / np.sqrt(2))) / 2)
    return h


@pytest.mark.parametrize("variant", ["corrected", "published"])
def test_encoder_computes_its_equations(starter: CrystalStore, variant: str) -> None:
    torch.manual_seed(4)
    encoder = PDDFormer(width=12, layers=4, k=9, n_distances=15, n_basis=33, variant=variant).double()
    masked = TRICLINIC._replace(numbers=np.array([0, 8]))
    cells = [*cells_of(starter, [3, 500, 1800]), ROCKSALT, PEROVSKITE, TRICLINIC, masked]
    batch = make_batch(put_together(cells), encoder.graph, dtype=torch.float64)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(10):
            encoder(batch)
        found = encoder.eval()(batch).numpy()
    expected = by_definition(encoder, batch)
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("variant", "repeated"), [("corrected", False), ("published", True)])
def test_the_default_encoder_asks_for_the_graph_of_the_paper(variant: str, repeated: bool) -> None:
    graph = meta(PDDFormer, variant=variant).graph
    assert (graph.k, graph.n_distances, graph.symmetric) == (25, 92, True)
    assert graph.repeat_self_images == repeated
    assert (graph.tolerance == 0) == repeated


def weights(c: Cell, variant: str) -> list[float]:
    encoder = PDDFormer(width=4, variant=variant)
    batch = make_batch(put_together([PEROVSKITE, c]), encoder.graph, dtype=torch.float64)
    distribution = encoder.distribution(batch)
    assert distribution.shape == (5 + len(c.numbers), 93)
    assert torch.equal(distribution[:, 1:], batch.distances)
    return distribution[5:, 0].tolist()


def test_weights_of_atoms_have_their_golden_values() -> None:
    """Z / ΣZ of rocksalt: 11/28 and 17/28 in the primitive cell, a quarter of that in the cube."""
    assert weights(ROCKSALT, "published") == pytest.approx([0.392857, 0.607143], abs=1e-6)
    assert weights(ROCKSALT_CUBE, "published") == pytest.approx([0.098214] * 4 + [0.151786] * 4, abs=1e-6)
    assert weights(ROCKSALT, "corrected") == pytest.approx([22 / 28, 34 / 28], abs=1e-12)
    assert weights(ROCKSALT_CUBE, "corrected") == pytest.approx([22 / 28] * 4 + [34 / 28] * 4, abs=1e-12)


@pytest.mark.parametrize("variant", ["corrected", "published"])
def test_masked_atoms_have_no_weight_and_are_left_out_of_the_sum(variant: str) -> None:
    assert weights(ROCKSALT._replace(numbers=np.array([0, 17])), variant) == [0, 1]
    assert weights(ROCKSALT._replace(numbers=np.array([0, 0])), variant) == [0, 0]


def test_sizes_are_those_of_the_published_model() -> None:
    """Exact counts from the layers' shapes; 4 497 539 is used in pretraining."""
    encoder = meta(PDDFormer)
    assert size(encoder) == size(meta(PDDFormer, variant="published")) == 4_332_800
    assert {size(conv) for conv in encoder.convs} == {855_296}
    assert {size(mix) for mix in encoder.mixing} == {263_680}
    posterior = meta(Posterior, width=256, latent_dim=256)
    objective = meta(Published, latent_dim=256, corruption=Corruption())
    assert size(posterior) == 131_072
    assert (size(objective.species), size(objective.coordinates), size(objective.lattice)) == (30_583, 771, 2_313)
    assert size(encoder) + size(posterior) + size(objective) == 4_497_539


def test_the_denoiser_has_the_published_size() -> None:
    """Of the released 130 082 560 parameters, 178 944 stand in label tables that are never read."""
    denoiser = meta(DiT, latent_dim=256)
    assert {size(block) for block in denoiser.blocks} == {10_628_352}
    assert size(denoiser) == 129_903_616 == 130_082_560 - 178_944


def test_a_new_denoiser_predicts_zero_until_its_last_maps_are_trained() -> None:
    torch.manual_seed(0)
    denoiser = DiT(latent_dim=5, width=24, layers=2, heads=2)
    z, t, valid = torch.randn(2, 4, 5), torch.rand(2), torch.ones(2, 4, dtype=torch.bool)
    assert (denoiser(z, t, valid) == 0).all()
    assert denoiser.input.weight.abs().min() > 0
    nn.init.normal_(denoiser.output.weight)
    assert denoiser(z, t, valid).abs().max() > 0.1


def test_kl_has_its_golden_values() -> None:
    """½ (μ² + s² − 1 − log s²) is 0.5 at μ = 1, s = 1; the sum over channels is averaged over atoms."""
    ones = Latent(torch.ones(5, 8), torch.zeros(5, 8), torch.zeros(5, 8))
    assert Posterior.kl(ones).item() == pytest.approx(4.0)
    assert Posterior.kl(Latent(*(torch.zeros(5, 8),) * 3)).item() == 0
    wide = Latent(torch.zeros(3, 1), torch.full((3, 1), 2.0), torch.zeros(3, 1))
    assert Posterior.kl(wide).item() == pytest.approx((np.exp(2) - 3) / 2, rel=1e-6)


def test_kl_is_that_of_the_distributions() -> None:
    torch.manual_seed(1)
    mean, log_variance = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    standard = torch.distributions.Normal(torch.zeros(6, 4).double(), torch.ones(6, 4).double())
    expected = torch.distributions.kl_divergence(normal, standard).sum(1).mean()
    torch.testing.assert_close(Posterior.kl(Latent(mean, log_variance, mean)), expected)


def test_the_posterior_maps_to_the_mean_first_and_samples_with_its_variance() -> None:
    torch.manual_seed(2)
    posterior = Posterior(width=3, latent_dim=2, normalize=False).double()
    features = torch.randn(1, 3).double().expand(20_000, 3)
    latent = posterior(features)
    torch.testing.assert_close(latent.mean, features @ posterior.map.weight[:2].T)
    torch.testing.assert_close(latent.log_variance, features @ posterior.map.weight[2:].T)
    torch.testing.assert_close(latent.sample.mean(0), latent.mean[0], rtol=0, atol=0.05)
    torch.testing.assert_close(latent.sample.var(0), latent.log_variance[0].exp(), rtol=0.05, atol=0)
    far = posterior(1e6 * features[:2]).log_variance
    assert set(far.flatten().tolist()) <= {-30.0, 20.0}


def test_sinusoids_of_the_time_have_their_golden_values() -> None:
    """Components 0, 64 and 128 at t = 0.5: cos ½, cos 0.005, sin ½."""
    found = sinusoids(doubles([0.5]), 128, 10_000.0)
    assert found.shape == (1, 256)
    assert found[0, [0, 64, 128]].tolist() == pytest.approx([0.877583, 0.999988, 0.479426], abs=1e-6)
    assert found[0, 192].item() == pytest.approx(np.sin(0.005), abs=1e-9)


@pytest.mark.parametrize(("atoms", "hidden"), MASK_COUNTS.items())
def test_the_number_of_masked_atoms_is_the_published_one(atoms: int, hidden: int) -> None:
    c = cell(np.eye(3) * 9, np.arange(1, atoms + 1), np.linspace(0, 0.9, 3 * atoms))
    crystals = put_together([c, PEROVSKITE, c])
    found = set()
    for seed in range(20):
        corrupted, undo = Corruption(mask_fraction=0.3).apply(crystals, np.random.default_rng(seed))
        assert undo.masked[:atoms].sum() == undo.masked[atoms + 5 :].sum() == hidden
        assert undo.masked[atoms : atoms + 5].sum() == 2
        assert np.array_equal(corrupted.numbers == 0, undo.masked)
        found |= set(np.flatnonzero(undo.masked[:atoms]))
    assert found == (set(range(atoms)) if hidden else set())


def test_only_masked_atoms_enter_the_species_loss() -> None:
    torch.manual_seed(3)
    logits, numbers = torch.randn(6, 119).double(), torch.tensor([3, 8, 8, 26, 1, 92])
    masked = torch.tensor([True, False, False, True, False, True])
    undo = CorruptionTargets(numbers, masked, torch.zeros(6, 3), torch.zeros(1, 3, 3), torch.zeros(1, 2))
    logits[3, 26] = 50.0
    loss, measures = masked_species(logits, undo)
    expected = -torch.log_softmax(logits, 1)[[0, 3, 5], [3, 26, 92]].mean()
    torch.testing.assert_close(loss, expected)
    assert measures["masked_accuracy"] == (1.0, 3.0)
    changed = logits.clone()
    changed[~masked] += torch.randn(3, 119)
    torch.testing.assert_close(masked_species(changed, undo)[0], loss)
    none = CorruptionTargets(numbers, torch.zeros(6, dtype=torch.bool), undo.displacement, undo.strain, undo.levels)
    assert masked_species(logits, none)[0].item() == 0


def test_the_published_objective_reads_raw_coordinates_and_the_transposed_lattice() -> None:
    torch.manual_seed(4)
    objective = Published(latent_dim=4, corruption=Corruption(mask_fraction=0.5)).double()
    crystals, undo = objective.corruption.apply(put_together([TRICLINIC, PEROVSKITE]), np.random.default_rng(0))
    batch = make_batch(crystals, PDDFormer(width=4).graph, undo=undo, dtype=torch.float64)
    z = torch.randn(7, 4).double()
    terms = objective(z, batch).terms
    positions = torch.cat([doubles(TRICLINIC.positions), doubles(PEROVSKITE.positions)])
    assert terms["coordinates"].item() == pytest.approx((objective.coordinates(z) - positions).abs().mean().item())
    pooled = objective.lattice(torch.stack([z[:2].mean(0), z[2:].mean(0)])).view(2, 3, 3)
    transposed = doubles(np.stack([TRICLINIC.lattice.T, PEROVSKITE.lattice.T]))
    assert terms["lattice"].item() == pytest.approx((pooled - transposed).abs().mean().item())


def test_denoising_computes_its_equations(starter: CrystalStore) -> None:
    """Displacement, strain, their losses and the error of the lattice, written down from the definitions."""
    torch.manual_seed(5)
    objective = Denoising(
        latent_dim=4, hidden=6, corruption=Corruption(displacement=0.2, strain=0.04), strain_weight=3.0
    ).double()
    clean = put_together([*cells_of(starter, [3, 500]), TRICLINIC, PEROVSKITE])
    crystals, undo = objective.corruption.apply(clean, np.random.default_rng(0))
    batch = make_batch(crystals, PDDFormer(width=4, k=5).graph, undo=undo, dtype=torch.float64)
    z = torch.randn(len(clean.numbers), 4).double()
    with torch.no_grad():
        found = objective(z, batch)
        displacement, strain = objective.undo_geometry(z, batch)
        node = objective.node(z)
        lengths = batch.edge_vec.norm(dim=1)
        gauss = torch.exp(-0.5 * ((lengths[:, None] - torch.linspace(0, 8, 32).double()) / (8 / 31)) ** 2)
        unfactorize(objective)
        coefficients = objective.pair(node, node, objective.edge(gauss), *batch.edge_index).numpy()
    moves: list[list[NDArray]] = [[] for _ in clean.numbers]
    strains: list[list[NDArray]] = [[] for _ in clean.sizes]
    for (u, s, p), vector, target in zip(coefficients, batch.edge_vec.numpy(), batch.edge_index[1], strict=True):
        unit = vector / np.linalg.norm(vector)
        moves[target].append(u * unit)
        strains[batch.crystal[target]].append(s * np.outer(unit, unit) + p * np.eye(3))
    expected_moves = 0.2 * np.array([np.mean(own, axis=0) for own in moves])
    expected_strains = 0.04 * np.array([np.mean(own, axis=0) for own in strains])
    np.testing.assert_allclose(displacement, expected_moves, atol=1e-7)
    np.testing.assert_allclose(strain, expected_strains, atol=1e-7)
    move_loss = np.mean(((expected_moves - undo.displacement) / 0.2) ** 2)
    strain_loss = 3 * np.mean(((expected_strains - undo.strain) / 0.04) ** 2)
    assert found.terms["displacement"].item() == pytest.approx(move_loss, rel=1e-5)
    assert found.terms["strain"].item() == pytest.approx(strain_loss, rel=1e-5)
    lengths_now, lengths_before = (np.linalg.norm(c.lattice, axis=2) for c in (crystals, clean))
    total, count = found.measures["lattice_length_error_baseline"]
    assert (total / count).item() == pytest.approx(np.abs(lengths_now - lengths_before).mean())
    back = crystals.lattice @ np.linalg.inv(np.eye(3) + expected_strains)
    total, count = found.measures["lattice_length_error"]
    assert (total / count).item() == pytest.approx(np.abs(np.linalg.norm(back, axis=2) - lengths_before).mean(), 1e-5)
