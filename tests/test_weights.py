"""Encoders with a name: found wherever an encoder is asked for, listed with their cards, and exchanged with the hub."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import crysldnet
from crysldnet import finetune
from crysldnet.artifacts import weights
from crysldnet.cli import run
from crysldnet.data import download
from crysldnet.errors import CheckpointError, DataError
from crysldnet.tools import hub
from tiny import finetune_config


@pytest.fixture(scope="module")
def labelled(shared):
    return shared / "data.parquet"


@pytest.fixture
def named(tmp_path, pretrained, monkeypatch):
    """An encoder of the name tiny, in the folder of those that ship."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "tiny.safetensors").write_bytes(pretrained.read_bytes())
    (folder / "tiny.md").write_text("# tiny\n\nIt saw 40 crystals.\n")
    monkeypatch.setattr(weights, "SHIPPED", folder)
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path / "fetched"))
    return folder / "tiny.safetensors"


def test_a_name_stands_for_its_file_in_finetune_and_python(tmp_path, labelled, named):
    given = [f"data.path={labelled}", f"runs={tmp_path}", "epochs=1", "name=a", "data.targets=[band_gap]"]
    assert finetune.run(*finetune_config(*given, "pretrained=tiny")) == 0
    summary = json.loads((tmp_path / "finetune" / "a" / "summary.json").read_text())
    assert summary["pretraining_overlap"]["pretraining_crystals"] == 40
    one, two = crysldnet.load_encoder("tiny"), crysldnet.load_encoder(named)
    files = "src/crysldnet/data/embedded/examples"
    assert (one.embed(files).features == two.embed(files).features).all()


def test_a_wrong_name_is_refused_with_the_nearest(named):
    with pytest.raises(CheckpointError, match="did you mean 'tiny'"):
        weights.find("tinny")
    with pytest.raises(CheckpointError, match="no such file"):
        weights.find("runs/none/encoder.safetensors")


def test_the_list_and_the_card_are_printed(named, capsys):
    assert run(["weights"]) == 0
    shown = capsys.readouterr().out
    assert "tiny" in shown
    assert "PDDFormer" in shown
    assert run(["weights", "show", "tiny"]) == 0
    assert "It saw 40 crystals." in capsys.readouterr().out


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as one small repository needs."""

    files: dict[str, bytes]
    made: list[str]

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        content = self.files.get(self.path.partition("?")[0].rpartition("/")[2]) if "/resolve/" in self.path else None
        if content is None:
            self.answer(404, b"{}", X_Error_Code="EntryNotFound")
        else:
            self.answer(200, content, ETag=f'"{hash(content)}"', X_Repo_Commit="c" * 40)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/repos/create"):
            self.made.append(json.loads(body)["name"])
            answer = {"url": f"http://{self.headers['Host']}/me/tiny", "name": "me/tiny"}
        elif "/preupload/" in self.path:
            wanted = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
        elif "/commit/" not in self.path:
            answer = {}
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            sent = [line["value"] for line in lines if line["key"] == "file"]
            self.files.update({f["path"]: base64.b64decode(f["content"]) for f in sent})
            answer = {"commitUrl": f"http://{self.headers['Host']}/me/tiny/commit/{'c' * 40}", "commitOid": "c" * 40}
        self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")


@pytest.fixture
def local_hub(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    handler = type("LocalHub", (Hub,), {"files": {}, "made": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    from huggingface_hub import HfApi, constants, hf_hub_download

    class Here:
        """huggingface_hub, at another address."""

        from huggingface_hub import CommitOperationAdd

        @staticmethod
        def HfApi():
            return HfApi(endpoint=address, token="hf_test")

        @staticmethod
        def hf_hub_download(*args, **kwargs):
            return hf_hub_download(*args, endpoint=address, cache_dir=tmp_path / "cache", token=False, **kwargs)

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub, "_hub", lambda: Here)
    yield handler
    server.shutdown()


def test_an_encoder_travels_over_the_hub_with_its_card(local_hub, named, monkeypatch, tmp_path):
    assert run(["weights", "push", "tiny", "me/tiny", "--license", "cc-by-4.0"]) == 0
    assert local_hub.made == ["tiny"]
    assert local_hub.files["encoder.safetensors"] == named.read_bytes()
    card = local_hub.files["README.md"].decode()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert "It saw 40 crystals." in card
    assert run(["weights", "pull", "me/tiny", "--name", "again"]) == 0
    assert weights.find("again").read_bytes() == named.read_bytes()
    assert "It saw 40 crystals." in weights.card_of(weights.find("again"))
    with pytest.raises(CheckpointError, match="taken"):
        hub.pull("me/tiny", "again")


def test_what_is_no_encoder_is_not_fetched(local_hub, named):
    local_hub.files.update({"encoder.safetensors": b"noise", "README.md": b"# noise"})
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        hub.pull("me/noise")
    assert not (weights.fetched_folder() / "noise.safetensors").exists()
    local_hub.files.clear()
    with pytest.raises(CheckpointError, match="can't be fetched"):
        hub.pull("me/nothing")


@pytest.fixture
def web(monkeypatch):
    handler = type("Web", (Hub,), {"files": {}, "made": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(download, "SCHEMES", ("http",))
    yield handler.files, f"http://127.0.0.1:{server.server_port}/resolve/"
    server.shutdown()


def test_an_encoder_is_downloaded_by_address_and_checked(web, named, capsys):
    files, address = web
    content = named.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    files.update({"large.safetensors": content, "large.md": b"# large", "bare.safetensors": content})
    assert run(["weights", "get", f"{address}large.safetensors", "--sha256", sha256]) == 0
    assert weights.find("large").read_bytes() == content
    assert weights.card_of(weights.find("large")) == "# large"
    assert run(["weights", "get", f"{address}bare.safetensors", "--sha256", sha256.upper(), "--name", "other"]) == 0
    assert "it has no model card" in capsys.readouterr().err
    assert weights.card_of(weights.find("other")) is None
    assert {file.name for file in weights.fetched_folder().iterdir()} >= {"large.safetensors", "large.md"}
    assert not [file for file in weights.fetched_folder().iterdir() if file.name.startswith(".")]


def test_another_file_than_announced_is_not_kept(web, named):
    files, address = web
    noise = b"noise"
    files.update({"large.safetensors": named.read_bytes(), "noise.safetensors": noise})
    with pytest.raises(CheckpointError, match=r"its sha256 is .* not 0000"):
        hub.get(f"{address}large.safetensors", "0" * 64)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        hub.get(f"{address}noise.safetensors", hashlib.sha256(noise).hexdigest())
    with pytest.raises(CheckpointError, match=r"ends in \.safetensors"):
        hub.get(f"{address}large.pt", "0" * 64)
    with pytest.raises(DataError, match="404"):
        hub.get(f"{address}absent.safetensors", "0" * 64)
    assert not [f for f in weights.fetched_folder().iterdir() if f.name.startswith((".", "large", "noise"))]


def test_a_sha256_is_read_in_every_usual_form_and_checked_before_the_download(web, named):
    files, address = web
    content = named.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    files.update({"a.safetensors": content, "%C3%A9.safetensors": content})
    hub.get(f"{address}a.safetensors", f" sha256:{sha256.upper()} ")
    hub.get(f"{address}é.safetensors?download=true", sha256)
    assert set(weights.named_encoders()) == {"tiny", "a", "é"}
    for wrong in ("", sha256[:20], "../up", f"{sha256}0"):
        with pytest.raises(CheckpointError, match="a sha256 has 64 hexadecimal digits"):
            hub.get(f"{address}absent.safetensors", wrong)


def test_only_a_download_that_was_begun_is_said_to_be_kept(named, monkeypatch):
    monkeypatch.setattr(download, "SCHEMES", ("http",))
    with pytest.raises(DataError, match="can't be reached") as refused:
        hub.get("http://127.0.0.1:9/absent.safetensors", "0" * 64)
    assert "is kept" not in str(refused.value)


def test_an_encoder_in_place_of_a_model_is_named_as_such(named):
    with pytest.raises(CheckpointError, match="tiny is an encoder, not a finetuned model"):
        crysldnet.load("tiny")


def test_an_address_that_is_none_is_refused(named):
    with pytest.raises(CheckpointError, match="this isn't a web address"):
        hub.get("https://[::1/y.safetensors", "0" * 64)


@pytest.mark.parametrize("name", ["../up", "a/b", "none", "x.safetensors", ""])
def test_names_that_are_paths_or_words_are_refused(named, name):
    with pytest.raises(CheckpointError):
        hub.pull("me/x" if name else "nonsense", name or None)
