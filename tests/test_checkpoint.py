"""The files that outlive a run: strict, verified, never unpickled."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from crysldnet import build as build_module
from crysldnet.artifacts import model_file
from crysldnet.encoders.pddformer import PDDFormer
from crysldnet.errors import CheckpointError

CONFIG = {"_target_": "crysldnet.encoders.pddformer.PDDFormer", "width": 16, "layers": 2, "k": 6, "n_basis": 8}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return build_module.build(CONFIG)


@pytest.fixture
def written(encoder, tmp_path):
    path = tmp_path / "encoder.safetensors"
    info = model_file.encoder_info(encoder, CONFIG, {"data": "made for a test"})
    model_file.write(path, "encoder", encoder.state_dict(), info)
    return path


def rewrite(path, *, state=None, info=None, kind="encoder"):
    """Write the file again with some of it changed, its digests correct."""
    old_info, old_state = model_file.read(path, "encoder")
    old_info = {k: v for k, v in old_info.items() if k not in ("kind",)}
    model_file.write(path, kind, {**old_state, **(state or {})}, {**old_info, **(info or {})})


def test_an_encoder_comes_back_bit_for_bit(encoder, written):
    loaded, info = model_file.load_encoder(written)
    assert info["provenance"] == {"data": "made for a test"}
    assert loaded.state_dict().keys() == encoder.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), encoder.state_dict().values(), strict=True)
    )


def test_an_encoder_in_16_bits_is_half_as_large_and_says_nearly_the_same(encoder, written, tmp_path):
    out = tmp_path / "half.safetensors"
    model_file.write_half_precision(written, out)
    loaded, info = model_file.load_encoder(out)
    assert info["provenance"] == {"data": "made for a test"}
    for name, value in encoder.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-3, atol=1e-6)
    numbers = sum(value.nbytes for value in encoder.state_dict().values() if value.is_floating_point())
    assert written.stat().st_size - out.stat().st_size >= 0.49 * numbers


def test_a_weight_that_16_bits_cannot_hold_is_refused(written, tmp_path):
    rewrite(
        written,
        state={"species.weight": torch.full_like(model_file.read(written, "encoder")[1]["species.weight"], 1e6)},
    )
    with pytest.raises(CheckpointError, match=r"in 16 bits diverged: species.weight"):
        model_file.write_half_precision(written, tmp_path / "half.safetensors")
    assert not (tmp_path / "half.safetensors").exists()


def test_the_keys_of_the_shared_encoder_are_a_contract():
    keys = set(PDDFormer(width=16, layers=2, k=6, n_basis=8).state_dict())
    conv = [
        *(f"{m}.{p}" for m in ("query", "key", "value", "edge", "output") for p in ("weight", "bias")),
        *(
            f"{m}.{part}.{p}"
            for m in ("key_mlp", "message_mlp")
            for part in ("first", "second")
            for p in ("weight", "bias")
        ),
        *(
            f"{n}.{p}"
            for n in ("edge_norm", "node_norm")
            for p in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        ),
    ]
    mixing = [
        *(f"{m}.{p}" for m in ("expand", "gate", "output") for p in ("weight", "bias")),
        *(f"norm.{p}" for p in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    ]
    expected = {f"{m}.{p}" for m in ("species", "edge", "distances") for p in ("weight", "bias")}
    expected |= {f"convs.{i}.{k}" for i in range(2) for k in conv} | {f"mixing.0.{k}" for k in mixing}
    assert keys == expected


def test_a_missing_key_is_named(encoder, written):
    _, state = model_file.read(written, "encoder")
    del state["species.weight"]
    model_file.write(written, "encoder", state, model_file.encoder_info(encoder, CONFIG, {}))
    with pytest.raises(CheckpointError, match=r"missing \(species\.weight\)"):
        model_file.load_encoder(written)


def test_a_surplus_key_is_named(written):
    rewrite(written, state={"stranger": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"surplus \(stranger\)"):
        model_file.load_encoder(written)


def test_a_misshapen_tensor_is_named(written):
    rewrite(written, state={"species.bias": torch.zeros(17)})
    with pytest.raises(CheckpointError, match=r"species\.bias has shape \[17\], the model needs \[16\]"):
        model_file.load_encoder(written)


def test_other_graph_settings_are_refused(written):
    info, _ = model_file.read(written, "encoder")
    rewrite(written, info={"graph": {**info["graph"], "k": 7}})
    with pytest.raises(CheckpointError, match="k=7"):
        model_file.load_encoder(written)


def test_a_newer_format_is_refused(written):
    rewrite(written, info={"format_version": model_file.FORMAT_VERSION + 1})
    with pytest.raises(CheckpointError, match=rf"format version is {model_file.FORMAT_VERSION + 1}.*upgrade"):
        model_file.load_encoder(written)


def test_another_kind_is_refused(written):
    with pytest.raises(CheckpointError, match="kind is 'encoder', where 'property_model' is needed"):
        model_file.load_property_model(written)


def test_an_encoder_that_is_not_on_the_list_is_refused(written):
    rewrite(written, info={"encoder": {"_target_": "os.system", "command": "true"}})
    with pytest.raises(CheckpointError, match="not on the list"):
        model_file.load_encoder(written)


def test_any_flipped_byte_is_found_and_the_tensor_named(written):
    content = written.read_bytes()
    header = int.from_bytes(content[:8], "little") + 8
    for place in range(header, len(content), max(1, (len(content) - header) // 40)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        written.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"tensor '.*' is damaged"):
            model_file.load_encoder(written)
    for place in range(0, header, max(1, header // 60)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        written.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=str(written)):
            model_file.load_encoder(written)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(written, share):
    content = written.read_bytes()
    written.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="cut off"):
        model_file.load_encoder(written)


def test_a_pickle_is_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError):
        model_file.load_encoder(path)
    torch.save({"state": Trap()}, path)
    with pytest.raises(CheckpointError):
        model_file.load_encoder(path)
    assert not (tmp_path / "owned").exists()


def test_a_file_of_someone_else_is_refused(tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not written by crysldnet"):
        model_file.load_encoder(path)
    with pytest.raises(CheckpointError, match="no such file"):
        model_file.load_encoder(tmp_path / "nothing")


def test_metadata_is_plain_json(written):
    with safe_open(written, framework="pt") as file:
        info = json.loads(file.metadata()["crysldnet"])
    assert info["encoder"] == CONFIG
    assert info["graph"]["k"] == 6
    assert info["format_version"] == 1  # what earlier versions read too
