"""Scikit-learn estimators that write a table, finetune on it like the command, and keep the model files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Self

import numpy as np
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, TransformerMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted

from crysldnet.api.crystals import Labels, Source, is_path, known_classes, label_text, read, write
from crysldnet.api.runs import dotted, run_command
from crysldnet.config import compose
from crysldnet.console import silenced
from crysldnet.descriptors import crystal_descriptors
from crysldnet.descriptors.composition import Features, side_by_side
from crysldnet.errors import ConfigError, DataError, Interrupted
from crysldnet.inference import Embedder, LayersRead, Predictor, load, load_encoder
from crysldnet.inference.results import Predictions
from crysldnet.io import cannot_write, whole_file

OWN = {"data", "data.path", "data.targets", "name", "resume", "runs", "seed", "trainer.progress_bar"}
"""Keys that the estimator itself sets."""
KEPT = ("summary.json", "model.safetensors", "calibration.safetensors", "member_*/model.safetensors")
"""Files of a run from which the model is loaded."""
VALIDATION = [0.9, 0.1, 0.0]
"""Fractions of training, validation and test if a store is split by formula."""


class _Finetuned(BaseEstimator):
    """Base class of regressor and classifier; settings are attributes like other parameters."""

    _classes = False

    def __init__(
        self,
        recipe: str | None = None,
        pretrained: str | None = None,
        random_state: Any = 0,
        verbose: bool = True,
        **settings: Any,
    ) -> None:
        self.recipe = recipe
        self.pretrained = pretrained
        self.random_state = random_state
        self.verbose = verbose
        self._set(settings)

    def _set(self, settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            if hasattr(type(self), name) or name.startswith("_") or name.endswith("_"):
                raise TypeError(f"{type(self).__name__} has no parameter {name!r}")
            setattr(self, name, value)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters, including the given settings."""
        named: dict[str, Any] = super().get_params(deep)
        others = {name: value for name, value in vars(self).items() if name not in named}
        return named | {name: value for name, value in others.items() if name[0] != "_" and name[-1] != "_"}

    def set_params(self, **params: Any) -> Self:
        """Set parameters and settings; ``optimizer__lr`` is the setting ``optimizer.lr``."""
        self._set(params)
        return self

    def fit(self, X: Any, y: Any) -> Self:
        """Train a model.

        Args:
            X: n structures: pymatgen ``Structure`` or ASE ``Atoms`` objects, paths of CIF or POSCAR files, a DataFrame
                with a column of structures, whose index provides the ids; or the path of a store, table or folder.
            y: [n] or [n, T] values, NaN if unknown. A Series or DataFrame names the targets, with units in the names,
                ``band_gap (eV)``, or in ``attrs["units"]``. If X is a path, the index has the ids, or y is a column
                name or a list of names.

        Raises:
            DataError: a structure or value is invalid.
            ConfigError: a setting is unknown or invalid.
        """
        seed = self.random_state
        if not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(2**31 - 1)
        names = [y] if isinstance(y, str) else y
        quiet = ("next",) if self.verbose else ("notes",)  # the run is in a folder that is removed
        in_place = is_path(X) and isinstance(names, list) and all(isinstance(name, str) for name in names)
        with tempfile.TemporaryDirectory(prefix="crysldnet-") as folder, silenced("tables", *quiet):
            settings = self._settings()
            if in_place:
                self._flat = isinstance(y, str)
                data = {"path": X, "targets": names, "split.by": "formula", "split.seed": int(seed)}
                data["split.fractions"] = VALIDATION
            else:
                labels = Labels.of(y, classes=self._classes)
                self._flat = labels.flat
                table = Path(folder) / "crystals.parquet"
                write(X, labels, table, int(seed), settings.get("data.descriptors") or [])
                names, data = labels.names, {"path": table, "targets": labels.names, "split.by": "column"}
            own: dict[str, Any] = {"data": "custom", "seed": int(seed), "runs": folder, "name": "fit"}
            own |= {"trainer.progress_bar": bool(self.verbose)} | {f"data.{key}": v for key, v in data.items()}
            if self._classes:
                own["target_types"] = dict.fromkeys(names, "classification")
            try:
                run = run_command("finetune", own | settings)
            except Interrupted as error:
                raise KeyboardInterrupt from error
            files = {path for pattern in KEPT for path in run.folder.glob(pattern)}
            self.files_ = {str(path.relative_to(run.folder)): path.read_bytes() for path in sorted(files)}
            self.metrics_ = run.metrics
            self._predictor: Predictor | None = None
        self.targets_, self.units_ = self.predictor_.targets, self.predictor_.units
        if self._classes:
            named = [np.array(texts) for texts in self.predictor_.members[0].classes]
            self._keep_classes(named if in_place else list(known_classes(labels.values)))
        return self

    def _keep_classes(self, classes: list[NDArray[Any]]) -> None: ...

    def _settings(self) -> dict[str, Any]:
        """Return the settings by dotted key."""
        given = self.get_params(deep=False)
        left_out = {"random_state", "verbose", *(name for name in ("recipe", "pretrained") if given[name] is None)}
        settings = dotted("finetune", {name: value for name, value in given.items() if name not in left_out})
        if taken := sorted(OWN & set(settings)):
            instead = {"seed": "random_state", "trainer.progress_bar": "verbose"}.get(taken[0], "")
            raise ConfigError(
                f"{taken[0]}: {type(self).__name__} sets it; use {instead or 'crysldnet.finetune'} instead", taken[0]
            )
        return settings

    @property
    def predictor_(self) -> Predictor:
        """The fitted model with ids, intervals and flags; see :class:`Predictor`."""
        check_is_fitted(self, "files_")
        if self._predictor is None:
            with tempfile.TemporaryDirectory(prefix="crysldnet-") as folder, isolate_rng():
                self._predictor = load(self._write(Path(folder)))
        return self._predictor

    def _write(self, folder: Path) -> Path:
        for name, content in self.files_.items():
            _write_file(folder / name, content)
        return folder

    def save(self, path: Any) -> None:
        """Write the model to a file if the name ends in .safetensors, else to a folder; ``crysldnet.load`` reads both.

        Raises:
            ConfigError: an ensemble can't be one file.
        """
        check_is_fitted(self, "files_")
        path = Path(path)
        if path.suffix != ".safetensors":
            self._write(path)
        elif "model.safetensors" in self.files_:
            _write_file(path, self.files_["model.safetensors"])
        else:
            raise ConfigError(f"{path}: an ensemble is saved as a folder; give a name without .safetensors")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **({"_predictor": None} if hasattr(self, "files_") else {})}

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.allow_nan = True
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        tags.no_validation = True
        return tags

    def _predict(self, X: Any, interval: float = 0.9) -> tuple[Predictions, Any]:
        """Return predictions and the position of each structure among them."""
        predictor = self.predictor_
        source = Source.of(X)
        return predictor.predict(source.readable, interval=interval), slice(
            None
        ) if source.index is None else source.index

    def _shaped(self, values: NDArray[Any]) -> NDArray[Any]:
        return values[:, 0] if self._flat else values


class CrystalRegressor(RegressorMixin, _Finetuned):
    """Regression on crystals.

    Args:
        recipe: training recipe; the default is that of the configuration.
        pretrained: initial encoder; the default is that of the configuration.
        random_state: seed of initial weights, data order and validation crystals; the same seed gives the same model.
        verbose: show a progress bar and notes on standard error.
        settings: other keys of ``crysldnet finetune``, with ``__`` in place of dots: ``epochs=20``,
            ``optimizer__lr=1e-3``.

    Attributes:
        predictor_: the object returned by :func:`crysldnet.load`.
        metrics_: validation errors by name.
        targets_, units_: [T] names and units.
    """

    def predict(self, X: Any, return_interval: bool = False, interval: float = 0.9) -> Any:
        """Return predictions [n] or [n, T].

        Args:
            X: structures as in :meth:`fit`.
            return_interval: return values, lower and upper bounds.
            interval: coverage of the interval, between 0 and 1.
        """
        found, rows = self._predict(X, interval)
        values = self._shaped(found.values)[rows]
        if not return_interval:
            return values
        return values, self._shaped(found.low)[rows], self._shaped(found.high)[rows]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return R² over the known values, averaged over targets."""
        found, rows = self._predict(X)
        return _mean_score(r2_score, Labels.of(y, classes=False).values, found.values[rows], sample_weight)


class CrystalClassifier(ClassifierMixin, _Finetuned):
    """Classification of crystals; parameters as in :class:`CrystalRegressor`.

    Attributes:
        classes_: the classes, or a list of them for several targets.
        predictor_, metrics_, targets_, units_: as in :class:`CrystalRegressor`.
    """

    _classes = True

    def _keep_classes(self, classes: list[NDArray[Any]]) -> None:
        self.classes_ = classes[0] if self._flat else classes
        texts = [[label_text(value) for value in of_target.tolist()] for of_target in classes]
        named = self.predictor_.members[0].classes  # sorted as text
        self._codes = [[own.index(name) for name in names or []] for own, names in zip(texts, named, strict=True)]

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most likely classes [n] or [n, T]."""
        found, rows = self._predict(X)
        classes = [self.classes_] if self._flat else self.classes_
        columns = [
            of_target[np.array(codes)[found.values[rows, place].astype(int)]]
            for place, (of_target, codes) in enumerate(zip(classes, self._codes, strict=True))
        ]
        return columns[0] if self._flat else np.stack([column.astype(object) for column in columns], axis=1)

    def predict_proba(self, X: Any) -> Any:
        """Return probabilities [n, C] in the order of ``classes_``, or a list of them for several targets."""
        found, rows = self._predict(X)
        assert found.probabilities is not None
        of_targets = [found.probabilities[rows, place][:, np.argsort(codes)] for place, codes in enumerate(self._codes)]
        return of_targets[0] if self._flat else of_targets

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy over the known values, averaged over targets."""
        predicted = np.asarray(self.predict(X), object)
        true = Labels.of(y, classes=True).values
        return _mean_score(accuracy_score, true, predicted.reshape(true.shape), sample_weight)


def _write_file(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(content)
    except OSError as error:
        raise cannot_write(path, error) from error


def _mean_score(score: Any, true: NDArray[Any], predicted: NDArray[Any], weight: Any) -> float:
    if len(true) != len(predicted):
        raise DataError(f"y has {len(true)} rows and there are {len(predicted)} structures; they must be as many")
    scores = []
    for own, found in zip(true.T, predicted.T, strict=True):
        known = np.array([value is not None and value == value for value in own])
        weights = None if weight is None else np.asarray(weight)[known]
        scores.append(score(own[known].tolist(), found[known].tolist(), sample_weight=weights))
    return float(np.mean(scores))


class CrystalTransformer(TransformerMixin, BaseEstimator):
    """Turn crystals into features for other scikit-learn models.

    Args:
        pretrained: an encoder as in :func:`crysldnet.load_encoder`; the default is that of the configuration.
        layers_read: ``all`` returns mean and standard deviation over the atoms of the features of every layer,
            ``last`` the mean of the encoder output.
        descriptors: append the named descriptors of composition and geometry; without an encoder
            (``pretrained="none"``) these are the only features.
    """

    def __init__(
        self, pretrained: str | None = None, layers_read: LayersRead = "all", descriptors: bool = False
    ) -> None:
        self.pretrained = pretrained
        self.layers_read = layers_read
        self.descriptors = descriptors

    def fit(self, X: Any, y: Any = None) -> Self:
        """Load the encoder, without training.

        Raises:
            ConfigError: neither an encoder nor descriptors are selected.
        """
        chosen = compose("finetune").values["pretrained"] if self.pretrained is None else self.pretrained
        if chosen == "none" and not self.descriptors:
            raise ConfigError("pretrained: name an encoder, or take descriptors=True", "pretrained")
        self.encoder_: Embedder | None = None if chosen == "none" else load_encoder(chosen)
        return self

    def transform(self, X: Any) -> NDArray[np.float64]:
        """Return features [n, D] of structures as in :meth:`CrystalRegressor.fit`.

        Raises:
            DataError: a crystal is invalid.
        """
        check_is_fitted(self, "encoder_")
        crystals, *_ = read(X)
        blocks: list[Features] = []
        if self.encoder_ is not None:
            found = self.encoder_.embed(crystals, layers_read=self.layers_read).features.astype(np.float64)
            blocks.append(Features(tuple(f"embedding_{column}" for column in range(found.shape[1])), found))
        if self.descriptors:
            blocks.append(crystal_descriptors(crystals))
        features = side_by_side(blocks)
        self.feature_names_ = features.names
        return features.values

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[Any]:
        """Return the [D] feature names after a transform."""
        check_is_fitted(self, "feature_names_")
        return np.array(self.feature_names_, object)
