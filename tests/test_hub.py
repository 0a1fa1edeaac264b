"""Reading checkpoints without running them, naming what is wrong."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vargen import registry
from vargen.checkpoints.families import Family, get_family, guess_family, known_families, register_family
from vargen.checkpoints.reader import CheckpointError, check_family, load_original, load_strict

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def refusal(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_weights(found: dict[str, Tensor]) -> None:
    assert set(found) == set(WEIGHTS)
    assert all(torch.equal(found[k], WEIGHTS[k]) for k in WEIGHTS)


class Spy:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("container", [None, "model", "state_dict", "module", "model_state_dict"])
def test_weights_come_out_of_every_container(tmp_path: Path, container: str | None, legacy: bool) -> None:
    content = {container: WEIGHTS, "steps": 7, "args": argparse.Namespace(lr=1e-4)} if container else WEIGHTS
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    assert_weights(load_original(tmp_path / "x.pt"))
    assert_weights(load_original(str(tmp_path / "x.pt")))


def test_training_container_gives_the_model_and_ema_only_on_request(tmp_path: Path) -> None:
    optimizer = {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"lr": 0.1}]}
    content = {"ema": {"a": torch.zeros(1)}, "model": WEIGHTS, "optimizer": optimizer, "steps": 1}
    torch.save(content, tmp_path / "x.pt")
    assert_weights(load_original(tmp_path / "x.pt"))
    assert set(load_original(tmp_path / "x.pt", key="ema")) == {"a"}
    message = refusal(load_original, tmp_path / "x.pt", key="averaged")
    assert "'averaged'" in message
    assert "ema, model" in message


def test_nested_containers_and_prefixes_are_unwrapped() -> None:
    prefixed = {f"module._orig_mod.{k}": v for k, v in WEIGHTS.items()}
    assert_weights(load_original({"model": {"name": "gpt", "sd": prefixed}}))
    assert_weights(load_original({"trainer": {"var_wo_ddp": WEIGHTS, "vae_local": {"b": torch.ones(1)}}, "epoch": 2}))
    assert set(load_original({"trainer": {"vae_local": {"b": torch.ones(1)}}}, key="trainer.vae_local")) == {"b"}
    partly = {"module.a": torch.ones(1), "b": torch.ones(1)}  # a prefix that not all keys share belongs to the names
    assert set(load_original(partly)) == set(partly)


def test_parameters_come_back_as_plain_tensors() -> None:
    found = load_original({"a": nn.Parameter(torch.ones(1))})
    assert not found["a"].requires_grad


def test_safetensors_are_read_whatever_their_name(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "weights.pt")
    assert_weights(load_original(tmp_path / "weights.pt"))


def test_folder_with_one_checkpoint_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    assert_weights(load_original(tmp_path))
    save_file({"other": torch.ones(1)}, tmp_path / "other.safetensors")
    assert "2 checkpoint files" in refusal(load_original, tmp_path)
    save_file(WEIGHTS, tmp_path / "model.safetensors")  # the name that says which
    assert_weights(load_original(tmp_path))


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle 2", "pickle 4"])
def test_pickled_code_is_refused_named_and_not_run(tmp_path: Path, how: str) -> None:
    file, trace = tmp_path / "evil.pt", tmp_path / "trace"
    if how.startswith("pickle"):
        file.write_bytes(pickle.dumps({"model": Spy(trace)}, protocol=int(how[-1])))
    else:
        torch.save({"model": WEIGHTS, "hook": Spy(trace)}, file, _use_new_zipfile_serialization=how == "zip")
    message = refusal(load_original, file)
    assert "contains pickled code (" in message
    assert "mkdir" in message
    assert "convert it to safetensors" in message
    assert not trace.exists()
    torch.load(file, weights_only=False) if how in ("zip", "legacy") else pickle.loads(file.read_bytes())
    assert trace.exists()  # the file really was dangerous


def test_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    assert "torch.nn.modules.linear.Linear" in refusal(load_original, tmp_path / "x.pt")


def test_lightning_callback_classes_are_inert(tmp_path: Path) -> None:
    # taming's files name this class as a dictionary key; it is not installed, so the file is made by another process
    code = (
        "import sys, types, torch\n"
        "name = 'pytorch_lightning.callbacks.model_checkpoint'\n"
        "for part in ('pytorch_lightning', 'pytorch_lightning.callbacks', name):\n"
        "    sys.modules[part] = types.ModuleType(part)\n"
        "kind = type('ModelCheckpoint', (), {'__module__': name})\n"
        "sys.modules[name].ModelCheckpoint = kind\n"
        "torch.save({'callbacks': {kind: {'best': 1}}, 'state_dict': {'a': torch.ones(1)}}, sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "last.ckpt")], check=True)
    assert set(load_original(tmp_path / "last.ckpt")) == {"a"}


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_truncated_files_are_recognised(tmp_path: Path, kind: str, part: float) -> None:
    weights = {"a": torch.randn(40, 50)}
    if kind == "safetensors":
        save_file(weights, tmp_path / "x")
    else:
        torch.save(weights, tmp_path / "x", _use_new_zipfile_serialization=kind == "zip")
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content[: int(len(content) * part)])
    assert "truncated" in refusal(load_original, tmp_path / "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello", "neither safetensors nor a torch file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"PK\x05\x06" + bytes(18), "not a checkpoint"),
        (b"\x80\x02garbage", "not a checkpoint"),
    ],
)
def test_other_files_are_no_checkpoints(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    assert message in refusal(load_original, tmp_path / "x.pt")


def test_missing_file_and_empty_container(tmp_path: Path) -> None:
    assert "no checkpoint file" in refusal(load_original, tmp_path / "absent.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds a list" in refusal(load_original, tmp_path / "list.pt")
    assert "no tensors" in refusal(load_original, {"epoch": 3})


def test_strict_loading_names_what_differs() -> None:
    module = nn.Linear(3, 2)
    load_strict(module, {"weight": WEIGHTS["a.weight"], "bias": WEIGHTS["a.bias"]})
    assert torch.equal(module.weight, WEIGHTS["a.weight"])
    message = refusal(load_strict, module, {"weight": torch.zeros(2, 3), "scale": torch.zeros(1)})
    assert "1 missing key: bias" in message
    assert "1 unexpected key: scale" in message
    message = refusal(load_strict, module, {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)})
    assert "weight is (3, 2) in the file, the model expects (2, 3)" in message
    many = {f"x{i}": torch.zeros(1) for i in range(9)}
    assert "x0, x1, x2 and 6 more" in refusal(load_strict, module, many)
    assert torch.equal(module.weight, WEIGHTS["a.weight"])  # a refused load changes nothing


def test_strict_loading_drops_only_what_is_ignored() -> None:
    module = nn.Linear(3, 2)
    given = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "layers.0.kv_cache.k": torch.zeros(1)}
    load_strict(module, given, ignore=["*.kv_cache.*"])
    assert "layers.0.kv_cache.k" in refusal(load_strict, module, given)


def test_strict_loading_fills_a_meta_module() -> None:
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    load_strict(module, {"weight": WEIGHTS["a.weight"], "bias": WEIGHTS["a.bias"]})
    assert torch.equal(module(torch.ones(3)), WEIGHTS["a.weight"].sum(1) + 1)


def gpt(*extra: str) -> dict[str, Tensor]:
    names = ["tok_embeddings.weight", "layers.0.attention.wqkv.weight", "output.weight", *extra]
    return {name: torch.zeros(1) for name in names}


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        (gpt("cls_embedding.embedding_table.weight"), "llamagen-c2i"),
        (gpt("cls_embedding.cap_proj.fc1.weight"), "llamagen-t2i"),
        (gpt("cls_embedding.embedding_table.weight", "medusa_output.weight"), "nar"),
        (gpt("cls_embedding.embedding_table.weight", "spe_tok_embeddings.special_embeddings.weight"), "par"),
        (["pos_1LC", "lvl_embed.weight", "blocks.0.attn.q_bias"], "var"),
        (["diffloss.net.input_proj.weight", "z_proj.weight"], "mar"),
        (["transformer.tok_emb.weight"], "nbp"),
        (["quantize.embedding.weight", "decoder.up.0.block.0.conv1.weight"], "taming-vqgan"),
        (["quantize.embedding.weight", "decoder.up.0.x", "quantize.quant_resi.0.weight"], "var-vqvae"),
        (["post_quant_conv.weight", "decoder.up.0.block.0.conv1.weight"], "kl-autoencoder"),
    ],
)
def test_families_are_told_apart(keys: Any, family: str) -> None:
    found = guess_family(keys)
    assert found is not None
    assert found.name == family


def test_every_family_is_listed_once() -> None:
    names = [family.name for family in known_families()]
    assert len(names) == len(set(names))
    assert all(get_family(name).name == name for name in names)


def test_unknown_keys_belong_to_no_family() -> None:
    assert guess_family(["fc.weight"]) is None
    check_family({"fc.weight": 0}, "var")  # cannot tell, so strict loading decides


def test_wrong_family_is_named_with_its_loader() -> None:
    var = {"pos_1LC": torch.zeros(1), "lvl_embed.weight": torch.zeros(1)}
    message = refusal(load_strict, nn.Linear(1, 1), var, family=("llamagen-c2i", "llamagen-t2i"))
    assert message.startswith("expected a LlamaGen class-to-image transformer or LlamaGen text-to-image transformer")
    assert "looks like a VAR transformer (VARTransformer)" in message


def test_families_can_be_added_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vargen.checkpoints import families

    monkeypatch.setattr(families, "_families", list(families._families))
    register_family(Family("mine", "My model", "none", ("my.key",)))
    assert guess_family(["my.key", "pos_1LC", "lvl_embed.weight"]) == get_family("mine")
    with pytest.raises(ValueError, match="already registered"):
        register_family(Family("mine", "My model", "none", ("my.key",)))
    with pytest.raises(ValueError, match="unknown family 'yours'"):
        get_family("yours")


def test_models_are_resolved_by_name_path_and_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vargen.validation.places.MODELS_FOLDER", tmp_path / "models")
    assert registry.shipped_models() == []
    for name in ("heroes32-llamagen", "heroes32-var"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "model_index.json").write_text("{}")
    (tmp_path / "models" / "heroes32-classifier").mkdir()  # a network of a metric, not a pipeline
    assert [model.name for model in registry.shipped_models()] == ["heroes32-llamagen", "heroes32-var"]
    assert registry.resolve_model("heroes32-var") == str(tmp_path / "models" / "heroes32-var")
    assert registry.resolve_model(tmp_path) == str(tmp_path)
    assert registry.resolve_model("FoundationVision/vq-ds16-c2i") == "FoundationVision/vq-ds16-c2i"
    with pytest.raises(ValueError, match="did you mean heroes32-llamagen"):
        registry.resolve_model("heros32-lamagen")
    with pytest.raises(ValueError, match="shipped models: heroes32-llamagen, heroes32-var"):
        registry.resolve_model("zzz")
    with pytest.raises(ValueError, match="no model folder"):
        registry.resolve_model("./absent/folder")
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file, not a model folder"):
        registry.resolve_model(tmp_path / "x.pt")
