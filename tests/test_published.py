"""Published data sets: fetched from a server on this machine, converted from real crystals written in their formats."""

import csv
import gzip
import io
import json
import multiprocessing
import random
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from crysldnet import cli
from crysldnet.config import choices, conf_folder, load_yaml
from crysldnet.data import datasets, download
from crysldnet.data.catalog import File, PublishedSet, definition_of, published, read_definition
from crysldnet.data.datasets import DATA_VARIABLE, data_folder, open_part, open_store
from crysldnet.data.download import fetch_all
from crysldnet.data.elements import SYMBOLS
from crysldnet.data.split import Split
from crysldnet.data.store import CrystalStore, file_hash
from crysldnet.errors import DataError
from crysldnet.graphs.crystals import Crystals
from crysldnet.readers.json_stream import top_level
from crysldnet.signals import RUN_NAME
from crysldnet.tools.importer.published import make_store, seeded_split
from tiny import ENCODER, QUIET

COUNT = 40


class Server:
    """Serves named bytes with ranges and entity tags, as figshare does; cuts the first answer where told to."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.cut_after: int | None = None
        self.delay_s = 0.0
        self.tag = '"one"'
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.http.server_address[1]}/"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name, wanted = handler.path.lstrip("/"), handler.headers.get("Range")
        self.requests.append((name, wanted))
        time.sleep(self.delay_s)
        if name in self.redirects:
            handler.send_response(302)
            handler.send_header("Location", self.redirects[name])
            handler.end_headers()
            return
        if name not in self.files:
            handler.send_error(404, "Not Found")
            return
        content, begin = self.files[name], 0
        if wanted is not None and handler.headers.get("If-Range") == self.tag:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
        handler.send_response(206 if begin else 200)
        handler.send_header("Content-Length", str(len(content) - begin))
        handler.send_header("ETag", self.tag)
        handler.end_headers()
        stop, self.cut_after = self.cut_after, None
        handler.wfile.write(content[begin : stop if stop is not None else len(content)])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "SCHEMES", ("http",))
    served = Server()
    thread = threading.Thread(target=served.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield served
    served.http.shutdown()
    served.http.server_close()
    thread.join()


@pytest.fixture(autouse=True, name="data_folder")
def own_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    return tmp_path / "data"


@contextmanager
def served_from(server: Server, monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[PublishedSet]:
    """Point the files of a definition to the server."""
    definition = published()[name]
    files = tuple(f.model_copy(update={"url": server.base + f.name, "sha256": None}) for f in definition.files)
    with monkeypatch.context() as patch:
        patch.setitem(published(), name, definition.model_copy(update={"files": files}))
        yield published()[name]


def test_two_processes_that_want_a_set_at_once_fetch_and_convert_it_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, starter: CrystalStore
) -> None:
    server.files = jarvis_files(rows_of(starter))
    server.delay_s = 1.0  # so that the second begins before the first has its files
    fork = multiprocessing.get_context("fork")
    with served_from(server, monkeypatch, "jarvis_dft_3d") as definition:
        both = [fork.Process(target=cli.run, args=(["data", "download", "jarvis_dft_3d"],)) for _ in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted(name for name, _ in server.requests) == sorted(file.name for file in definition.files)
    assert len(open_store("published:jarvis_dft_3d")) == COUNT


# --- real crystals in the formats of others ---


def rows_of(store: CrystalStore, count: int = COUNT) -> list[dict[str, Any]]:
    table = store.to_table()
    small = np.flatnonzero(store.crystals.sizes <= 12)[:count]
    return table.take(small).to_pylist()


def zipped(name: str, content: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, content if isinstance(content, str) else json.dumps(content))
    return out.getvalue()


def atoms(row: dict[str, Any], *, cartesian: bool = False) -> dict[str, Any]:
    lattice = np.array(row["lattice"], float).reshape(3, 3)
    coordinates = np.array(row["frac_coords"], float).reshape(-1, 3)
    return {
        "lattice_mat": lattice.tolist(),
        "coords": (coordinates @ lattice if cartesian else coordinates).tolist(),
        "elements": [SYMBOLS[z] for z in row["atomic_numbers"]],
        "cartesian": cartesian,
    }


def structure(row: dict[str, Any]) -> Any:
    from pymatgen.core import Structure

    return Structure(
        np.array(row["lattice"], float).reshape(3, 3),
        row["atomic_numbers"],
        np.array(row["frac_coords"], float).reshape(-1, 3),
    )


def jarvis_files(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    items = [
        {
            "jid": r["material_id"],
            "atoms": atoms(r, cartesian=i % 2 == 0),
            "formation_energy_peratom": r["formation_energy_per_atom"],
            "mbj_bandgap": r["band_gap"] if i % 3 else "na",
            "slme": float("nan"),
        }
        for i, r in enumerate(rows)
    ]
    return {"jdft_3d-8-18-2021.json.zip": zipped("jdft_3d-8-18-2021.json", items)}


def megnet_files(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    energies = [
        {"id": r["material_id"], "atoms": atoms(r), "e_form": r["formation_energy_per_atom"], "gap pbe": r["band_gap"]}
        for r in rows
    ]
    moduli = [{"material_id": r["material_id"], "K": 10.0 * (i + 1), "G": None} for i, r in enumerate(reversed(rows))]
    return {
        "megnet.json.zip": zipped("megnet.json", energies),
        "mp.2018.6.1.json.zip": zipped("mp.2018.6.1.json", moduli),
    }


def mp_20_files(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    from pymatgen.io.cif import CifWriter

    found = {}
    for name, part in (("train", rows[:-10]), ("val", rows[-10:-5]), ("test", rows[-5:])):
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(["", "material_id", "formation_energy_per_atom", "band_gap", "e_above_hull", "cif"])
        for i, r in enumerate(part):
            values = [r["formation_energy_per_atom"], r["band_gap"], 0.0]
            writer.writerow([i, r["material_id"], *values, str(CifWriter(structure(r), significant_figures=8))])
        found[f"{name}.csv"] = out.getvalue().encode()
    return found


def gnome_files(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    from pymatgen.io.cif import CifWriter

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for r in rows:
            archive.writestr(f"by_id/{r['material_id']}.CIF", str(CifWriter(structure(r), significant_figures=8)))
    return {"by_id.zip": out.getvalue()}


def mptrj_files(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    content = {
        f"material-{i}": {
            r["material_id"]: {"structure": structure(r).as_dict(), "energy_per_atom": -1.5, "force": [[0.0] * 3]}
        }
        for i, r in enumerate(rows)
    }
    return {"MPtrj_2022.9_full.json": json.dumps(content).encode()}


def lemat_table(rows: list[dict[str, Any]]) -> pa.Table:
    made = [structure(r) for r in rows]
    return pa.table(
        {
            "immutable_id": [r["material_id"] for r in rows],
            "lattice_vectors": [s.lattice.matrix.tolist() for s in made],
            "cartesian_site_positions": [s.cart_coords.tolist() for s in made],
            "species_at_sites": [[site.specie.symbol for site in s] for s in made],
            "functional": ["pbe"] * len(rows),
        }
    )


FILES: dict[str, Callable[[list[dict[str, Any]]], dict[str, bytes]]] = {
    "jarvis_dft_3d": jarvis_files,
    "megnet": megnet_files,
    "mp_20": mp_20_files,
    "gnome": gnome_files,
    "mptrj": mptrj_files,
}


def same_crystals(store: CrystalStore, rows: list[dict[str, Any]]) -> None:
    """Assert that a store has these crystals, in whatever order."""
    where = {id_: i for i, id_ in enumerate(store.ids.to_pylist())}
    assert set(where) == {r["material_id"] for r in rows}
    crystals: Crystals = store.crystals
    for r in rows:
        i = where[r["material_id"]]
        own = slice(crystals.ptr[i], crystals.ptr[i + 1])
        lattice = np.array(r["lattice"], float).reshape(3, 3)
        # a CIF keeps lengths and angles, not the orientation of the cell
        assert np.allclose(crystals.lattice[i] @ crystals.lattice[i].T, lattice @ lattice.T, atol=1e-4)
        assert sorted(crystals.numbers[own].tolist()) == sorted(r["atomic_numbers"])
        expected = np.array(r["frac_coords"], float).reshape(-1, 3)
        for coordinates, number in zip(expected, r["atomic_numbers"], strict=True):
            gap = crystals.frac_coords[own][crystals.numbers[own] == number] - coordinates
            assert np.abs(gap - np.round(gap)).max(axis=1).min() < 1e-4


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_published_format_gives_its_crystals_back(
    name: str, server: Server, starter: CrystalStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rows = rows_of(starter)
    server.files = FILES[name](rows)
    with served_from(server, monkeypatch, name):
        assert cli.run(["data", "download", name]) == 0
    store = open_store(f"published:{name}")
    same_crystals(store, rows)
    definition = definition_of(name)
    assert store.metadata["license"] == definition.license
    assert store.metadata["citation"] == definition.citation
    assert {p.name: p.unit for p in definition.properties}.items() <= store.units.items()
    printed = capsys.readouterr().out
    assert f"NOT AS PUBLISHED: {COUNT} entries" in printed
    for file in definition.files:
        digest = file_hash(data_folder() / "raw" / name / file.name)
        assert f"{file.name}: not verified, for no sha256 is published; this one is {digest}" in printed


def test_values_units_and_logarithms_of_a_published_set(data_folder: Path, starter: CrystalStore) -> None:
    rows = rows_of(starter)
    put(data_folder / "raw" / "megnet", megnet_files(rows))
    made = make_store(published()["megnet"], data_folder / "raw" / "megnet", data_folder / "megnet.store")
    store = open_store("published:megnet")
    where = {id_: i for i, id_ in enumerate(store.ids.to_pylist())}
    order = [where[r["material_id"]] for r in rows]
    assert np.allclose(store.numbers_of("band_gap")[order], [r["band_gap"] for r in rows])
    assert np.allclose(store.numbers_of("log10_bulk_modulus")[order][::-1], np.log10(10.0 * np.arange(1, COUNT + 1)))
    assert np.isnan(store.numbers_of("log10_shear_modulus")).all()
    assert store.units["log10_bulk_modulus"] == "log10(GPa)"
    assert any("60,000/5,000/4,239 are published" in d for d in made.differences)


def put(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def test_files_that_are_put_by_hand_need_no_network(data_folder: Path, starter: CrystalStore) -> None:
    rows = rows_of(starter)
    with pytest.raises(DataError, match=r"Get \*\.parquet from https://.*LeMat-Bulk.*put it into .*lemat_bulk"):
        fetch_all(published()["lemat_bulk"], data_folder / "raw" / "lemat_bulk")
    (data_folder / "raw" / "lemat_bulk").mkdir(parents=True)
    table = lemat_table(rows)
    pq.write_table(table.slice(0, 25), data_folder / "raw" / "lemat_bulk" / "part-0.parquet")
    pq.write_table(table.slice(25), data_folder / "raw" / "lemat_bulk" / "part-1.parquet")
    assert cli.run(["data", "download", "lemat_bulk"]) == 0
    same_crystals(open_store("published:lemat_bulk"), rows)


def test_measured_enthalpies_take_their_structures_from_a_store(
    data_folder: Path, tmp_path: Path, starter: CrystalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(starter)
    content = {
        "index": [0, 1, 2],
        "columns": ["formula", "expt_form_e", "uncertainty", "likely_mpid"],
        "data": [["A", -1.0, 0.1, rows[3]["material_id"]], ["B", -2.0, None, "mp-none"], ["C", -3.0, 0.2, None]],
    }
    packed = gzip.compress(json.dumps(content).encode())
    put(data_folder / "raw" / "expt_kingsbury", {"expt_formation_enthalpy_kingsbury.json.gz": packed})
    with pytest.raises(DataError, match=r"its sha256 is .* the published file's is a2d2ced9"):
        cli.run(["data", "download", "expt_kingsbury", "--structures", "embedded:mp_starter"])
    known = published()["expt_kingsbury"]
    path = data_folder / "raw" / "expt_kingsbury" / known.files[0].name
    files = (known.files[0].model_copy(update={"sha256": file_hash(path)}),)
    monkeypatch.setitem(published(), "expt_kingsbury", known.model_copy(update={"files": files}))
    with pytest.raises(DataError, match="--structures"):
        cli.run(["data", "download", "expt_kingsbury"])
    assert cli.run(["data", "download", "expt_kingsbury", "--structures", "embedded:mp_starter"]) == 0
    store = open_store("published:expt_kingsbury")
    same_crystals(store, rows[3:4])
    assert store.numbers_of("expt_formation_enthalpy_per_atom").tolist() == [-1.0]


def test_a_file_that_matminer_wrote_gives_the_task_back(data_folder: Path) -> None:
    pytest.importorskip("matbench")
    from crysldnet.tools.matbench.tasks import task_metadata, write_embedded

    folder = data_folder / "raw" / "matbench_jdft2d"
    folder.mkdir(parents=True)
    write_embedded("matbench_jdft2d", "exfoliation_en", folder / "matbench_jdft2d.json.gz")
    made = make_store(published()["matbench_jdft2d"], folder, data_folder / "matbench_jdft2d.store")
    assert made.differences == []
    ours, embedded = open_store("published:matbench_jdft2d"), open_store("embedded:matbench_jdft2d")
    assert ours.ids.to_pylist() == embedded.ids.to_pylist()
    assert np.allclose(ours.numbers_of("exfoliation_en"), embedded.numbers_of("exfoliation_energy"))
    for name, definition in published().items():
        if name.startswith("matbench"):
            metadata = task_metadata(name)
            assert definition.files[0].sha256 == metadata.hash
            assert definition.files[0].url == metadata.url
            assert definition.entries == metadata.n_samples
            assert definition.properties[0].key == metadata.target


def test_checksums_of_measured_data_are_those_of_matminer() -> None:
    datasets = pytest.importorskip("matminer.datasets")
    known = json.loads((Path(datasets.__file__).parent / "dataset_metadata.json").read_text())
    for name, key in (("expt_kingsbury", "expt_formation_enthalpy_kingsbury"), ("expt_kim", "expt_formation_enthalpy")):
        definition = published()[name]
        assert definition.files[0].sha256 == known[key]["hash"]
        assert definition.files[0].url == known[key]["url"]
        assert definition.entries == known[key]["num_entries"]
        assert {p.key for p in definition.properties} <= set(known[key]["columns"])


# --- fetching ---


def one_file(server: Server, name: str = "file.bin", sha256: str | None = None) -> PublishedSet:
    file = File(name=name, url=server.base + name, sha256=sha256)
    return published()["gnome"].model_copy(update={"files": (file,)})


def test_a_fetch_that_is_cut_off_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    content = random.Random(0).randbytes(3_000_000)
    server.files, server.cut_after = {"file.bin": content}, 2_000_000
    with pytest.raises(DataError, match="was cut off") as caught:
        fetch_all(one_file(server), tmp_path)
    assert "the next try resumes it" in str(caught.value)
    assert not (tmp_path / "file.bin").exists()
    kept = (tmp_path / "file.bin.part").stat().st_size
    assert 0 < kept <= 2_000_000
    fetch_all(one_file(server), tmp_path)
    assert server.requests == [("file.bin", None), ("file.bin", f"bytes={kept}-")]
    assert (tmp_path / "file.bin").read_bytes() == content
    assert {p.name for p in tmp_path.iterdir()} == {"file.bin"}
    fetch_all(one_file(server), tmp_path)
    assert len(server.requests) == 2  # what is here is not fetched again


def test_parts_of_two_versions_of_a_file_are_never_joined(server: Server, tmp_path: Path) -> None:
    old, new = b"a" * 2_000_000, b"b" * 2_500_000
    server.files, server.cut_after = {"file.bin": old}, 1_000_000
    with pytest.raises(DataError):
        fetch_all(one_file(server), tmp_path)
    server.files, server.tag = {"file.bin": new}, '"two"'
    fetch_all(one_file(server), tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == new


def test_another_file_than_the_published_one_is_refused_with_both_checksums(server: Server, tmp_path: Path) -> None:
    server.files = {"file.bin": b"damaged"}
    with pytest.raises(DataError) as caught:
        fetch_all(one_file(server, sha256="0" * 64), tmp_path)
    assert "0" * 64 in str(caught.value)
    assert file_hash(tmp_path / "file.bin") in str(caught.value)
    assert "crysldnet data download gnome" in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/file.bin", "ftp://127.0.0.1/file.bin", "file:///etc/hostname"])
def test_only_https_is_fetched_from_and_redirected_to(
    server: Server, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = {"b": b"good"}
    server.redirects = {"a": url.replace("http:", "https:"), "file.bin": f"{server.base}b"}
    with pytest.raises(DataError, match=r"not downloaded, because it isn't https|is not allowed"):
        fetch_all(one_file(server, "a"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    fetch_all(one_file(server), tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == b"good"
    monkeypatch.undo()
    assert download.SCHEMES == ("https",)
    other = published()["gnome"].model_copy(update={"files": (File(name="other", url=url),)})
    with pytest.raises(DataError, match=f"{url}: not downloaded, because it isn't https"):
        fetch_all(other, tmp_path)


def test_a_set_whose_files_have_no_published_sha256_is_called_not_verified_where_it_is_used(
    data_folder: Path, starter: CrystalStore, capsys: pytest.CaptureFixture
) -> None:
    put(data_folder / "raw" / "jarvis_dft_3d", jarvis_files(rows_of(starter)))
    assert cli.run(["data", "download", "jarvis_dft_3d"]) == 0
    datasets._note_unverified.cache_clear()
    capsys.readouterr()
    for _ in range(2):
        open_store("published:jarvis_dft_3d")
    said = capsys.readouterr().err
    file = "jdft_3d-8-18-2021.json.zip"
    assert said.count(f"published:jarvis_dft_3d is not verified: no sha256 is published of {file}") == 1
    assert cli.run(["data", "describe", "published:jarvis_dft_3d"]) == 0
    assert f"{file} {file_hash(data_folder / 'raw' / 'jarvis_dft_3d' / file)}" in capsys.readouterr().out
    assert [name for name, known in published().items() if known.unverified] == [
        *("alexandria", "gnome", "jarvis_dft_3d", "lemat_bulk", "megnet", "mp_20", "mptrj", "oqmd")
    ]


def test_a_missing_file_and_no_network_say_what_to_put_where(server: Server, tmp_path: Path) -> None:
    absent = one_file(server, "absent.bin")
    with pytest.raises(DataError, match="404 Not Found") as not_found:
        fetch_all(absent, tmp_path / "raw")
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(DataError, match="can't be reached") as offline:
        fetch_all(absent, tmp_path / "raw")
    for caught in (not_found, offline):
        text = str(caught.value)
        assert f"Get absent.bin from {server.base}absent.bin, put it into {tmp_path / 'raw'}" in text
        assert "run crysldnet data download gnome again" in text
    assert not list((tmp_path / "raw").iterdir())


def test_a_file_of_another_format_is_refused_with_its_name(data_folder: Path) -> None:
    put(data_folder / "raw" / "jarvis_dft_3d", {"jdft_3d-8-18-2021.json.zip": zipped("x.json", '[{"jid": "a"')})
    with pytest.raises(DataError, match=r"jdft_3d-8-18-2021\.json\.zip: damaged after record 0 "):
        cli.run(["data", "download", "jarvis_dft_3d"])
    assert not (data_folder / "jarvis_dft_3d.store").exists()


@pytest.mark.parametrize("content", [[1, "a]b", {"x": [1, {"y": None}]}, float("inf")], {"k": [1, 2], "l": {}}, [], {}])
def test_json_is_read_the_same_in_parts_as_whole(content: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crysldnet.readers.json_stream._BLOCK", 3)
    expected = list(content.items()) if isinstance(content, dict) else content
    items = top_level(io.BytesIO(json.dumps(content, indent=1).encode()))
    assert [value if element else (key, value) for key, element, value, _ in items] == expected
    with pytest.raises(ValueError, match=r"ends too early|Expecting value"):
        list(top_level(io.BytesIO(json.dumps(content)[:-1].encode())))


# --- published splits ---


@pytest.mark.parametrize(
    ("property_", "count"),
    [
        ("formation_energy_peratom", 55_722),
        ("optb88vdw_total_energy", 55_722),
        ("mbj_bandgap", 18_171),
        ("ehull", 55_370),
    ],
)
def test_the_rule_of_the_field_gives_the_published_sizes(property_: str, count: int) -> None:
    known = next(p for p in published()["jarvis_dft_3d"].properties if p.name == property_)
    labels = seeded_split(count, known.fractions, known.sizes)
    assert known.sizes is not None
    assert [labels.count(s) for s in ("train", "val", "test")] == [known.sizes.train, known.sizes.val, known.sizes.test]


def test_the_rule_of_the_field_takes_the_rows_that_its_description_names() -> None:
    random.seed(123)
    ids = list(range(1_007))
    random.shuffle(ids)
    labels = seeded_split(1_007, (0.1, 0.1), None)
    assert {i for i, label in enumerate(labels) if label == "test"} == set(ids[-100:])
    assert {i for i, label in enumerate(labels) if label == "val"} == set(ids[-200:-100])
    assert {i for i, label in enumerate(labels) if label == "train"} == set(ids[:-200])
    assert seeded_split(1_007, (0.1, 0.1), None, seed=124) != labels


def test_each_property_has_the_split_of_its_own_rows_and_rejected_crystals_do_not_move_it(
    data_folder: Path, starter: CrystalStore
) -> None:
    rows = rows_of(starter)
    rows[5]["frac_coords"] = [0.0] * len(rows[5]["frac_coords"])  # its atoms overlap, so the import rejects it
    put(data_folder / "raw" / "jarvis_dft_3d", jarvis_files(rows))
    made = make_store(
        published()["jarvis_dft_3d"], data_folder / "raw" / "jarvis_dft_3d", data_folder / "jarvis_dft_3d.store"
    )
    assert made.report.rejected == 1
    store = open_store("published:jarvis_dft_3d")
    ids = store.ids.to_pylist()
    assert rows[5]["material_id"] not in ids
    with_gap = [r["material_id"] for i, r in enumerate(rows) if i % 3]
    for target, own in (("formation_energy_peratom", [r["material_id"] for r in rows]), ("mbj_bandgap", with_gap)):
        random.seed(123)
        order = list(own)
        random.shuffle(order)
        tenth = int(0.1 * len(own))
        split = Split(by="official").rows(store, [target])
        assert {ids[i] for i in split["test"]} == set(order[-tenth:]) & set(ids)
        assert {ids[i] for i in split["val"]} == set(order[-2 * tenth : -tenth]) & set(ids)
        assert {ids[i] for i in split["train"]} == set(order[: -2 * tenth]) & set(ids)
    with pytest.raises(DataError, match="train one model for each property"):
        Split(by="official").rows(store, ["formation_energy_peratom", "mbj_bandgap"])
    with pytest.raises(DataError, match=r"data\.split\.by=column"):
        Split(by="official").rows(store)


def test_a_model_trains_on_a_published_set(
    data_folder: Path, tmp_path: Path, starter: CrystalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(data_folder / "raw" / "jarvis_dft_3d", jarvis_files(rows_of(starter)))
    assert cli.run(["data", "download", "jarvis_dft_3d"]) == 0
    monkeypatch.delenv(RUN_NAME, raising=False)
    small = ["data.num_workers=0", "data.batch_size=16", "epochs=1", "min_steps=0"]
    arguments = ["finetune", "data=jarvis", "data.targets=[mbj_bandgap]", f"runs={tmp_path / 'runs'}", "name=gap"]
    assert cli.run([*arguments, *ENCODER, *QUIET, *small, "trainer.accelerator=cpu"]) == 0
    summary = json.loads((tmp_path / "runs/finetune/gap/summary.json").read_text())
    assert summary["train_crystals"] == 22
    monkeypatch.delenv(RUN_NAME, raising=False)


@pytest.mark.parametrize(
    "name", [n for n in choices("data") if "published:" in (conf_folder() / f"data/{n}.yaml").read_text()]
)
def test_a_data_set_that_is_not_here_names_the_command_that_brings_it(name: str, tmp_path: Path) -> None:
    path = load_yaml(conf_folder() / "data" / f"{name}.yaml").path
    published_name = path.removeprefix("published:")
    assert published_name in published()
    with pytest.raises(DataError, match=f"crysldnet data download {published_name}"):
        cli.run(["pretrain", f"data={name}", f"runs={tmp_path}", "data.split.by=random"])
    assert not list(tmp_path.glob("pretrain"))


def test_names_that_do_not_exist_are_refused_with_what_does() -> None:
    with pytest.raises(DataError, match="did you mean 'jarvis_dft_3d'"):
        cli.run(["data", "download", "jarvis_dft3d"])
    with pytest.raises(DataError, match="no row of the column split is 'tset'; there are test, train, val"):
        open_part("embedded:mp_starter@tset")


def test_every_definition_is_complete_and_on_the_data_page(capsys: pytest.CaptureFixture) -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    for name, definition in published().items():
        assert name == definition.name
        assert definition.license
        assert definition.citation
        assert all(p.unit for p in definition.properties)
        known = "not verified" if definition.unverified else "published"
        assert all(file.url.startswith("https://") for file in definition.files)
        title = f"{definition.title}, {definition.version}"
        assert f"| `{name}` | {title} | {definition.entries:,} | {definition.license} | {known} |" in page
        assert cli.run(["data", "download", name, "--info"]) == 0
    capsys.readouterr()
    assert cli.run(["data", "download"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in published())


def test_a_data_set_of_ones_own_is_one_yaml_file(data_folder: Path, tmp_path: Path, starter: CrystalStore) -> None:
    rows = rows_of(starter)
    own = tmp_path / "mine.yaml"
    own.write_text((conf_folder() / "published" / "jarvis_dft_3d.yaml").read_text())
    put(data_folder / "raw" / "mine", jarvis_files(rows))
    assert cli.run(["data", "download", str(own)]) == 0
    same_crystals(open_store("published:mine"), rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("licenze: CC0", "licenze: extra inputs are not permitted"),
        ("name: other", "its name is the file's"),
        ("entries: many", "entries: input should be a valid integer"),
        ("version: 0.1", "version: input should be a valid string"),
        ("files: [{name: a, url: b, sha: c}]", r"files\.0\.sha: extra inputs"),
        ("version: 2024-01-01", "not readable"),
        *(
            (f"files: [{{name: {json.dumps(name)}, url: 'https://x'}}]", r"files\.0\.name: .* is no file's name")
            for name in ("../evil", "/etc/evil", ".profile", "a\\b", "\x1b[31m", "..")
        ),
    ],
)
def test_a_definition_with_an_unknown_key_or_another_type_is_refused(line: str, message: str, tmp_path: Path) -> None:
    known = yaml.safe_load((conf_folder() / "published" / "gnome.yaml").read_text())
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(known | yaml.safe_load(line)))
    with pytest.raises(DataError, match=rf"x\.yaml: .*{message}"):
        read_definition(path)
