"""Additive contributions of atoms and descriptors to a prediction.

A prediction is compared with the one for an average training crystal, the reference.

Networks: integrated gradients (Sundararajan et al., arXiv 1703.01365) along the straight line from the mean features of
the training atoms to those of the crystal, φ = (z − z⁰) ∫ ∂f/∂z(z⁰ + α (z − z⁰)) dα. The contribution of a mean over
atoms is divided by each atom's difference from the reference, that of a standard deviation by its squared distance
from the mean. With the readouts ``atoms`` and ``sum`` this is exactly what each atom adds to the output.

Tabular members: Shapley values of the columns, each changed from the training mean to its value (Strumbelj and
Kononenko, Knowl. Inf. Syst. 41, 647, 2014), over pairs of a random order and its reverse. The embedding components
count as one column.

Shapes: ``n`` atoms of the crystal, ``I`` inputs of a head, ``K`` given descriptors, ``D`` columns of a tabular model,
``G`` groups of columns, ``Q`` points of the integral.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crysldnet.data.elements import SYMBOLS
from crysldnet.encoders.protocol import features_of_layers
from crysldnet.errors import DataError
from crysldnet.graphs.batch import CrystalBatch
from crysldnet.models.head import PropertyModel
from crysldnet.models.hybrid import NETWORK, HybridModel
from crysldnet.models.predictor import TargetModel
from crysldnet.models.targets import Estimate, TargetType

Floats = NDArray[np.float64]
POINTS = 48
"""Q."""
PAIRS = 8
"""Random orders of the columns, each also reversed."""
ENCODER = "encoder"
"""Name of the embedding components among the columns."""


@dataclass(frozen=True)
class Explanation:
    """Contributions to one prediction; ``reference`` and all contributions sum to ``prediction``.

    Attributes:
        prediction: in physical units, or the probability of the predicted class.
        reference: the same for the average training crystal.
        atoms: [n] contributions.
        columns: contributions of descriptors by name; ``encoder`` is the embedding's contribution to tabular members.
        label: the predicted class; None for a number.
    """

    prediction: float
    reference: float
    atoms: Floats
    columns: dict[str, float]
    label: str | None = None

    @property
    def total(self) -> float:
        """The sum of the reference and all contributions."""
        return self.reference + float(self.atoms.sum()) + sum(self.columns.values())

    def by_element(self, numbers: NDArray[np.uint8]) -> dict[str, float]:
        """Return the contributions of the atoms summed by element symbol, largest first.

        Args:
            numbers: [n] atomic numbers.
        """
        sums = np.bincount(numbers, self.atoms)
        found = {SYMBOLS[z]: float(sums[z]) for z in np.unique(numbers)}
        return dict(sorted(found.items(), key=lambda item: -abs(item[1])))

    def scaled(self, reference: float, prediction: float) -> Explanation:
        """Return the contributions rescaled to another total, for a function of the explained value."""
        had = self.total - self.reference
        factor = (prediction - reference) / had if abs(had) > 1e-12 else 0.0
        columns = {name: factor * value for name, value in self.columns.items()}
        return Explanation(prediction, reference, factor * self.atoms, columns, self.label)


def added(parts: Sequence[tuple[float, Explanation]]) -> Explanation:
    """Return the weighted sum of explanations of the same crystal."""
    columns: dict[str, float] = {}
    for weight, part in parts:
        for name, value in part.columns.items():
            columns[name] = columns.get(name, 0.0) + weight * value
    atoms: Floats = np.sum([weight * part.atoms for weight, part in parts], axis=0)
    prediction, reference = (sum(w * getattr(p, field) for w, p in parts) for field in ("prediction", "reference"))
    return Explanation(prediction, reference, atoms, columns, parts[0][1].label)


def explain(
    members: Sequence[TargetModel], batch: CrystalBatch, place: int, mean: Tensor | None, label: int | None = None
) -> Explanation:
    """Explain the prediction of one target of one crystal by a model, or by the mean of an ensemble.

    Args:
        members: members of the ensemble.
        batch: a batch of one crystal.
        place: index of the target.
        mean: [D] features of the average training crystal, used if the head doesn't store its mean input.
        label: index of the class whose probability is explained; by default the predicted one.

    Raises:
        DataError: the target is a hurdle, or the model can't be explained.
    """
    kind = members[0].types[place]
    if not kind.additive:
        raise DataError(f"{members[0].targets[place]} is a number of two parts, which explanations can't add up to")
    if kind.classes is not None and label is None:
        with torch.inference_mode():
            shares = [member.predict(batch).probability for member in members]
        label = int(torch.stack([s[0, place, : len(kind.classes)] for s in shares if s is not None]).mean(0).argmax())
    found = [_explain_one(member, batch, place, label, mean) for member in members]
    whole = added([(1 / len(found), one) for one in found])
    return whole if label is None else replace(whole, label=kind.classes[label])  # type: ignore[index]


def _explain_one(
    model: TargetModel, batch: CrystalBatch, place: int, label: int | None, mean: Tensor | None
) -> Explanation:
    if isinstance(model, PropertyModel):
        return _explain_network(model, batch, place, label, mean)
    if isinstance(model, HybridModel):
        return _explain_hybrid(model, batch, place, label, mean)
    raise DataError(f"explanations of a {type(model).__name__} aren't known")


def _explain_network(
    model: PropertyModel, batch: CrystalBatch, place: int, label: int | None, mean: Tensor | None
) -> Explanation:
    """Integrate the gradients with respect to the head's input, the descriptors and the atomic references."""
    n, head = int(batch.sizes[0]), copy.deepcopy(model.head).double().eval()
    with torch.no_grad():
        read = head.read(model.encoder, batch).double()
        beside = torch.zeros(1, 0) if model.descriptors is None else model.descriptors(batch)
        center = model._center(batch)[0].double()
        factors = model._factors(batch)
    start = _start(model, read, mean)
    plain = model.mean.double() * (n if head.readout == "sum" else 1)
    move, beside_move, center_move = read - start, beside.double(), center - plain
    nodes, weights = np.polynomial.legendre.leggauss(POINTS)
    alpha, weight = (torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2))
    factor = 1.0 if factors is None else 1.0 / float(factors[0, place])

    def value(at: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Map [Q, R, I], [Q, K] and [Q, T] to predictions [Q]."""
        q, rows = at.shape[:2]
        crystal = torch.arange(q).repeat_interleave(rows)
        whole = head(at.flatten(0, 1), crystal, q, b if model.descriptors is not None else None)
        output = whole.split([kind.outputs for kind in model.types], dim=1)[place]
        found = model.types[place].estimate(output, c[:, place], model.std[place].double())
        return found.value * factor if label is None else found.probability[:, label]  # type: ignore[index]

    a = alpha[:, None]
    at = [
        (start + a[:, :, None] * move).requires_grad_(),
        (a * beside_move).requires_grad_(),
        (plain + a * center_move).requires_grad_(),
    ]
    grads = torch.autograd.grad(value(*at).sum(), at, allow_unused=True)
    read_part, beside_part, center_part = (
        torch.zeros_like(step) if grad is None else (weight.view(-1, *[1] * (grad.dim() - 1)) * grad).sum(0) * step  # φ
        for grad, step in zip(grads, (move, beside_move[0], center_move), strict=True)
    )
    atoms = _of_atoms(model, batch, read_part, read, start, n)
    if model.references is not None:
        energies = model.references[place, batch.numbers].double()
        atoms = atoms + float(center_part[place]) * _shares(energies.numpy())
    columns = {} if model.descriptors is None else dict(zip(model.descriptors.names, beside_part.tolist(), strict=True))
    with torch.no_grad():
        ends = [value(start[None] + e * move[None], e * beside_move, (plain + e * center_move)[None]) for e in (0, 1)]
    reference, prediction = (float(end[0]) for end in ends)
    return Explanation(prediction, reference, atoms, columns).scaled(reference, prediction)


def _start(model: PropertyModel, read: Tensor, mean: Tensor | None) -> Tensor:
    """Return the mean training input of the head, in the shape of ``read``."""
    head = model.head
    if head.layers_read == "all":
        return head.center.double().expand_as(read)
    return torch.zeros_like(read) if mean is None else mean.double().expand_as(read)


def _of_atoms(model: PropertyModel, batch: CrystalBatch, part: Tensor, read: Tensor, start: Tensor, n: int) -> Floats:
    """Divide the contributions [1 or n, I] of the head's input among the atoms."""
    if not model.head.per_crystal:
        return part.sum(1).numpy()
    with torch.no_grad():
        if model.head.layers_read == "last":
            features = model.encoder(batch).double()
        else:
            features = torch.cat(features_of_layers(model.encoder, batch), dim=1).double()
    width = features.shape[1]
    away = features - start[0, :width]  # their mean moves the mean
    total = read[0, :width] - start[0, :width]
    per_feature = torch.where(total.abs() > 1e-12, part[0, :width] / total, 0.0)
    atoms = (away * per_feature).sum(1) / n
    if part.shape[1] > width:
        squared = (features - read[0, :width]).square()
        whole = squared.sum(0)
        share = torch.where(whole > 0, squared / whole, 1.0 / n)
        atoms = atoms + (share * part[0, width:]).sum(1)
    return atoms.numpy()


def _shares(values: NDArray[np.floating]) -> Floats:
    """Return values over their sum, or equal fractions if it vanishes."""
    values = np.asarray(values, np.float64)
    total = values.sum()
    return values / total if abs(total) > 1e-12 else np.full(len(values), 1.0 / len(values))


def _explain_hybrid(
    model: HybridModel, batch: CrystalBatch, place: int, label: int | None, mean: Tensor | None
) -> Explanation:
    """Sum the members by weight, on the scale on which they are combined."""
    kind, stack = model.types[place], model.tabular.stacks[place]
    with torch.inference_mode():
        found, embedding = model.read(batch)
        factors = model.factors(batch.to_crystals())
    factor = 1.0 if factors is None else float(factors[0, place])
    output = 0 if label is None or kind.kind == "binary" else label
    sign = -1.0 if label == 0 and kind.kind == "binary" else 1.0
    n = int(batch.sizes[0])
    parts: list[tuple[float, Explanation]] = []
    if len(model.networks) and stack.weights[NETWORK] > 0:
        parts.append((stack.weights[NETWORK], _networks_on_line(model, batch, place, label, mean, factor)))
    weights = {name: stack.weights[name] for name in stack.models}
    if (tabular := sum(weights.values())) > 0:
        x = model.tabular.features(found, embedding)[0]
        start = _training_mean(stack.models, len(x))
        names = [*model.tabular.descriptors]
        groups = [np.array([column]) for column in range(len(names))]
        if len(x) > len(names):
            names.append(ENCODER)
            groups.append(np.arange(len(groups), len(x)))

        def value(rows: Floats) -> Floats:
            each = stack.predict(rows)
            return sign * sum(weights[name] / tabular * each[name][:, output] for name in weights)  # type: ignore[return-value]

        columns = dict(zip(names, shapley(value, x, start, groups).tolist(), strict=True))
        of_element = model.references[place, batch.numbers].numpy() / n  # classes have no references
        low, high = value(np.stack([start, x]))
        parts.append((tabular, Explanation(high + of_element.sum(), low, of_element, columns)))
    whole = added(parts)
    one = 1.0 if sign < 0 else 0.0  # probability of the other of two classes
    reference, prediction = (_physical(kind, one + end, label) / factor for end in (whole.reference, whole.total))
    return whole.scaled(reference, prediction)


def _physical(kind: TargetType, line: float, label: int | None) -> float:
    """Return the physical value for a value on the members' scale; probabilities are unchanged."""
    if label is not None:
        return min(1.0, max(0.0, line))
    return float(kind.from_table(np.array([[line]]), np.zeros((1, 1))).value)


def _networks_on_line(
    model: HybridModel, batch: CrystalBatch, place: int, label: int | None, mean: Tensor | None, factor: float
) -> Explanation:
    """Explain the joint prediction of a hybrid's networks."""
    kind = model.types[place]
    each = [_explain_network(network, batch, place, label, mean) for network in model.networks]  # type: ignore[arg-type]
    whole = added([(1 / len(each), one) for one in each])
    if label is not None:
        if kind.kind == "binary" and label == 0:  # relative to the other class, like the tabular members
            return replace(whole, reference=whole.reference - 1.0, prediction=whole.prediction - 1.0)
        return whole
    ends = []
    for value in (whole.reference, whole.total):
        ends.append(float(kind.as_table_outputs(Estimate(torch.tensor([value * factor], dtype=torch.float64)))[0, 0]))
    return whole.scaled(*ends)


def _training_mean(models: dict, width: int) -> Floats:
    """Return [D] the columns of the average training crystal, stored by kernel ridge.

    Raises:
        DataError: the members include no kernel ridge.
    """
    for model in models.values():
        shift = getattr(model, "shift", None)
        if shift is not None and len(shift) == width:
            return np.asarray(shift, np.float64)
    raise DataError("this model keeps no mean of its training crystals (it has no kernel ridge), so it isn't explained")


def shapley(
    value: Callable[[Floats], Floats], x: Floats, start: Floats, groups: Sequence[NDArray[np.int64]], seed: int = 0
) -> Floats:
    """Return [G] contributions of groups of columns, which sum to f(x) − f(x⁰).

    Args:
        value: f, maps [B, D] to [B].
        x: [D].
        start: [D] x⁰.
        groups: the columns of each group.
        seed: seed of the random orders.
    """
    rng, total = np.random.default_rng(seed), np.zeros(len(groups))
    for _ in range(PAIRS):
        order = rng.permutation(len(groups))
        for path in (order, order[::-1]):
            rows = np.repeat(start[None], len(groups) + 1, axis=0)
            for step, group in enumerate(path):
                rows[step + 1 :, groups[group]] = x[groups[group]]
            total[path] += np.diff(value(rows))
    return total / (2 * PAIRS)
