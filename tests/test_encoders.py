"""Encoders: names, refusals, preprocessing, and checkpoints in the formats their authors publish."""

import pickle
import socket
import subprocess
import sys
import warnings

import open_clip
import pytest
import timm
import torch
from conftest import ROOT
from safetensors.torch import save_file
from small_models import TINY, photo, tiny_clip, write_embedded
from torch import nn

from lib.features import encoders, libraries
from lib.features.encoders import load_encoder, resolve
from lib.files import file_hash


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    return write_embedded(tmp_path_factory.mktemp("embedded"))


@pytest.fixture(autouse=True)
def small(embedded, monkeypatch):
    monkeypatch.setattr(encoders, "EMBEDDED_FOLDER", embedded)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    from huggingface_hub import constants

    def refuse(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)


@pytest.mark.parametrize("name", ["embedded:clip", "embedded:vit", "timm:test_byobnet/random"])
def test_preprocessing_can_be_sent_to_another_process(name):
    encoder = load_encoder(name, device="cpu")
    plain, augment = pickle.loads(pickle.dumps((encoder.transform, encoder.augment)))
    assert torch.equal(plain(photo(1)), encoder.transform(photo(1)))
    assert augment(photo(1)).shape == plain(photo(1)).shape


def test_importing_features_loads_no_model_library():
    code = "import sys, lib.features; print({'timm', 'open_clip', 'torchvision', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(("name", "dim"), [("embedded:clip", 24), ("embedded:conv", 256), ("embedded:vit", 48)])
def test_an_encoder_gives_float32_features_of_its_dimension(name, dim):
    encoder = load_encoder(name, device="cpu")
    batch = torch.stack([encoder.transform(photo(i)) for i in range(3)])
    x = encoder.encode_images(batch)
    assert batch.shape == (3, 3, 32, 32)
    assert x.shape == (3, encoder.dim) and encoder.dim == dim and x.dtype == torch.float32 and not x.requires_grad
    assert not torch.allclose(x.norm(dim=1), torch.ones(3), atol=1e-2), "features are not normalised silently"
    assert torch.equal(x, encoder.encode_images(batch))
    assert bool(encoder.tokenizer) == (name == "embedded:clip")


def test_clip_encodes_texts_as_open_clip_does(embedded):
    encoder = load_encoder("embedded:clip", device="cpu")
    model = tiny_clip(embedded)
    texts = [f"a photo of {i} cats." for i in range(300)]
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer("tiny-quickgelu")(texts))
    torch.testing.assert_close(encoder.encode_text(texts), expected)
    assert encoder.logit_scale == pytest.approx(model.logit_scale.exp().item())
    with pytest.warns(UserWarning, match="context of 24 tokens and may be cut"):
        encoder.encode_text(["word " * 40])


def test_an_image_encoder_refuses_texts():
    with pytest.raises(ValueError, match="embedded:vit encodes images only"):
        load_encoder("embedded:vit", device="cpu").encode_text(["a cat"])


def test_bf16_is_near_fp32_and_says_so_in_nothing_but_the_last_digits():
    exact, rounded = (load_encoder("embedded:vit", "cpu", precision) for precision in ("fp32", "bf16"))
    batch = torch.stack([exact.transform(photo(i)) for i in range(8)])
    x, y = exact.encode_images(batch), rounded.encode_images(batch)
    assert y.dtype == torch.float32 and not torch.equal(x, y)
    assert torch.cosine_similarity(x, y).min() > 0.999


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip", "unknown encoder 'clip'.*open_clip:ARCHITECTURE"),
        ("embeded:clip", "did you mean 'embedded:clip'"),
        ("embedded:none", "known: embedded:clip, embedded:conv, embedded:vit"),
        ("open_clip:ViT-B-23/openai", "no architecture 'ViT-B-23'; did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32/laion3b", "no tag or file 'laion3b'.*laion2b_s34b_b79k"),
        ("open_clip:ViT-B-32-quickgelu/laion2b_s34b_b79k", "ViT-B-32 has it, without QuickGELU"),
        (
            "open_clip:RN50/openai",
            "QuickGELU, the architecture has GELU; the correct name is open_clip:RN50-quickgelu/openai",
        ),
        ("open_clip:RN50-quickgelu/missing.pt", "no file .*missing.pt"),
        (
            "timm:vit_small_patch16_223.dino",
            "timm has no model 'vit_small_patch16_223'; did you mean 'vit_small_patch16_224'",
        ),
        ("timm:vit_small_patch16_224.dina", "timm has no weights .*vit_small_patch16_224.dino"),
        ("timm:test_byobnet.nothing", "it has test_byobnet.r160_in1k"),
        ("mocov3:nowhere.pth.tar", "no file .*nowhere.pth.tar"),
        ("mocov3:", "unknown encoder"),
    ],
)
def test_wrong_names_are_refused_with_the_near_one(name, message):
    with pytest.raises(ValueError, match=message):
        resolve(name)


def test_every_quickgelu_mismatch_is_refused_and_the_name_proposed_is_correct(monkeypatch):
    monkeypatch.setattr(libraries, "_hub_file", lambda *_: ROOT / "README.md")
    refused = 0
    for architecture, tag in open_clip.list_pretrained():
        try:
            spec = resolve(f"open_clip:{architecture}/{tag}")
            assert spec.preprocess["size"] == open_clip.get_model_config(architecture)["vision_cfg"]["image_size"]
        except ValueError as error:
            proposed = str(error).rpartition(" ")[2]
            resolve(proposed)
            refused += 1
    assert refused >= 20


def test_precision_and_device_are_checked_first():
    with pytest.raises(ValueError, match="precision is fp32 or bf16, not 'fp16'"):
        load_encoder("embedded:clip", precision="fp16")
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used here"):
        load_encoder("embedded:clip", device="cuda:99")
    with pytest.raises(ValueError, match="device 'gpu'"):
        load_encoder("embedded:clip", device="gpu")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("open_clip:RN50-quickgelu/openai", "timm/resnet50_clip.openai.*name it open_clip:RN50-quickgelu/FILE"),
        ("open_clip:hf-hub:laion/some-model", "open_clip_config.json.*laion/some-model.*open_clip:local-dir:FOLDER"),
        (
            "timm:vit_small_patch16_224.dino",
            "timm/vit_small_patch16_224.dino.*name it timm:vit_small_patch16_224.dino/FILE",
        ),
    ],
)
def test_a_hub_out_of_reach_gives_one_line_with_what_to_do(name, place, no_network):
    with pytest.raises(ValueError, match=place) as caught:
        load_encoder(name, device="cpu")
    assert "\n" not in str(caught.value) and "huggingface.co" in str(caught.value)


def test_a_file_in_the_hubs_cache_needs_no_network(no_network, tmp_path, monkeypatch):
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--timm--test_byobnet.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "blobs").mkdir()
    net = timm.create_model("test_byobnet")
    save_file(net.state_dict(), tmp_path / "made.safetensors")
    blob = repository / "blobs" / file_hash(tmp_path / "made.safetensors")
    (tmp_path / "made.safetensors").rename(blob)
    (repository / "snapshots" / "abc" / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", constants.HF_HUB_CACHE)
    spec = resolve("timm:test_byobnet.r160_in1k")
    assert spec.weights == repository / "snapshots" / "abc" / "model.safetensors"
    assert load_encoder("timm:test_byobnet.r160_in1k", device="cpu").dim == net.num_features
    data = bytearray(blob.read_bytes())
    data[-9] ^= 2
    blob.write_bytes(data)
    with pytest.raises(ValueError, match=r"the hub's copy .* is damaged .*delete it"):
        resolve("timm:test_byobnet.r160_in1k")


# ---- checkpoints --------------------------------------------------------------------------------------------


def openai_state(model: nn.Module) -> dict:
    """The state dict as OpenAI publishes it: half precision, and three numbers among the weights."""
    state = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    extras = {"input_resolution": 32, "context_length": 24, "vocab_size": 49408}
    return state | {key: torch.tensor(value) for key, value in extras.items()}


def same_features(name: str, model: nn.Module, tolerance: float = 1e-6) -> None:
    encoder = load_encoder(name, device="cpu")
    batch = torch.stack([encoder.transform(photo(i)) for i in range(2)])
    encode = getattr(model, "encode_image", model)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_images(batch), encode(batch), rtol=tolerance, atol=tolerance)


def test_open_clip_checkpoints_load_strictly(tmp_path):
    model = tiny_clip(tmp_path)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "run.pt"
    )
    save_file(model.state_dict(), tmp_path / "safe.safetensors")
    for file in ("plain.pt", "run.pt", "safe.safetensors"):
        same_features(f"open_clip:tiny-quickgelu/{tmp_path / file}", model)
    state = model.state_dict()
    del state["visual.proj"]
    torch.save(state, tmp_path / "lacking.pt")
    with pytest.raises(ValueError, match=r"cannot read \S*lacking.pt as tiny-quickgelu: .*visual\.proj"):
        load_encoder(f"open_clip:tiny-quickgelu/{tmp_path / 'lacking.pt'}", device="cpu")


def test_openai_state_dicts_load_with_quickgelu_only(tmp_path):
    model = tiny_clip(tmp_path)
    tiny_clip(tmp_path, "tiny", quick_gelu=False)
    torch.save(openai_state(model), tmp_path / "openai.pt")
    model.load_state_dict({k: v for k, v in openai_state(model).items() if k in model.state_dict()})
    same_features(f"open_clip:tiny-quickgelu/{tmp_path / 'openai.pt'}", model)
    with pytest.raises(ValueError, match="QuickGELU; use tiny-quickgelu"):
        load_encoder(f"open_clip:tiny/{tmp_path / 'openai.pt'}", device="cpu")


def test_a_torchscript_archive_runs_only_if_openai_published_it(tmp_path, monkeypatch):
    class Published(nn.Module):
        def __init__(self, state):
            super().__init__()
            for key, value in state.items():
                place, *_, leaf = self, *key.split(".")
                for part in key.split(".")[:-1]:
                    if not hasattr(place, part):
                        place.add_module(part, nn.Module())
                    place = getattr(place, part)
                place.register_buffer(leaf, value)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model, path = tiny_clip(tmp_path), tmp_path / "archive.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Published(openai_state(model))).save(path)
    with pytest.raises(ValueError, match="TorchScript archive that is not one of OpenAI's"):
        load_encoder(f"open_clip:tiny-quickgelu/{path}", device="cpu")
    monkeypatch.setattr(libraries, "_openai_hashes", lambda: {file_hash(path)})
    model.load_state_dict({k: v for k, v in openai_state(model).items() if k in model.state_dict()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same_features(f"open_clip:tiny-quickgelu/{path}", model)


def test_openais_published_hashes_are_known():
    assert len(libraries._openai_hashes()) == 9
    assert all(len(digest) == 64 for digest in libraries._openai_hashes())


def test_a_folder_with_config_and_weights_loads_like_a_hub_model(tmp_path):
    import json

    model = tiny_clip(tmp_path / "registered")
    card = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": card}))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    same_features(f"open_clip:local-dir:{tmp_path}", model)
    encoder = load_encoder(f"open_clip:local-dir:{tmp_path}", device="cpu")
    assert encoder.transform(photo(0, (64, 16))).shape == (3, 32, 32)
    assert encoder.encode_text(["a cat"]).shape == (1, 24)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no file .*open_clip_model.safetensors"):
        resolve(f"open_clip:local-dir:{tmp_path}")


def test_timm_checkpoints_load_with_and_without_their_classifier(tmp_path):
    net = timm.create_model("test_byobnet", num_classes=7).eval()
    torch.save({"state_dict": net.state_dict(), "epoch": 1}, tmp_path / "tuned.pth")
    bare = {key: value for key, value in net.state_dict().items() if not key.startswith("head.fc")}
    save_file(bare, tmp_path / "bare.safetensors")
    net.reset_classifier(0)
    for file in ("tuned.pth", "bare.safetensors"):
        same_features(f"timm:test_byobnet/{tmp_path / file}", net)
    bare.pop(next(key for key in bare if key.startswith("stages")))
    save_file(bare, tmp_path / "lacking.safetensors")
    with pytest.raises(ValueError, match=r"cannot read \S*lacking.safetensors as test_byobnet: .*[Mm]issing"):
        load_encoder(f"timm:test_byobnet/{tmp_path / 'lacking.safetensors'}", device="cpu")


def test_the_mocov3_checkpoint_loads_its_base_encoder(tmp_path):
    net = timm.create_model("resnet50", num_classes=0).eval()
    state = {f"module.base_encoder.{key}": value for key, value in net.state_dict().items()}
    state |= {"module.base_encoder.fc.0.weight": torch.zeros(8, 2048), "module.base_encoder.fc.1.bias": torch.zeros(8)}
    state |= {
        "module.momentum_encoder.conv1.weight": torch.zeros(64, 3, 7, 7),
        "module.predictor.0.weight": torch.zeros(2, 2),
    }
    torch.save({"epoch": 1000, "arch": "resnet50", "state_dict": state, "optimizer": {}}, tmp_path / "r-50.pth.tar")
    name = f"mocov3:{tmp_path / 'r-50.pth.tar'}"
    encoder = load_encoder(name, device="cpu")
    batch = encoder.transform(photo(0, (300, 250)))[None]
    assert batch.shape == (1, 3, 224, 224) and encoder.dim == 2048
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_images(batch), net(batch), rtol=1e-4, atol=1e-4)
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, tmp_path / "other.pth.tar")
    with pytest.raises(ValueError, match="not a MoCo v3 ResNet"):
        load_encoder(f"mocov3:{tmp_path / 'other.pth.tar'}", device="cpu")


class Malicious:
    def __reduce__(self):
        return (open, ("run_by_the_pickle", "w"))


@pytest.mark.parametrize("name", ["open_clip:tiny-quickgelu/{}", "timm:test_byobnet/{}", "mocov3:{}"])
@pytest.mark.parametrize("kind", ["malicious", "html", "empty", "truncated"])
def test_a_bad_checkpoint_is_refused_and_never_run(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_clip(tmp_path)
    path = tmp_path / "weights.pt"
    if kind == "malicious":
        path.write_bytes(pickle.dumps({"state_dict": Malicious()}))
    elif kind == "html":
        path.write_text("<html>quota exceeded</html>")
    elif kind == "empty":
        path.touch()
    else:
        torch.save({"state_dict": {"conv1.weight": torch.zeros(99, 99)}}, path)
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cannot read \S*weights.pt") as caught:
        load_encoder(name.format(path), device="cpu")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run_by_the_pickle").exists()


@pytest.mark.parametrize("name", ["open_clip:tiny-quickgelu/{}", "timm:test_byobnet/{}", "mocov3:{}"])
def test_a_file_that_is_no_checkpoint_is_named(name, tmp_path):
    tiny_clip(tmp_path)
    path = tmp_path / "passwd"
    path.write_text("root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n")
    with pytest.raises(ValueError, match=rf"cannot read {path} as \S+: ") as caught:
        load_encoder(name.format(path), device="cpu")
    assert "is not a checkpoint" in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_index_of_the_embedded_encoders_is_named(tmp_path, monkeypatch):
    (tmp_path / "index.json").write_text('{"clip": {')
    monkeypatch.setattr(encoders, "EMBEDDED_FOLDER", tmp_path)
    for call in (encoders.embedded_index, encoders.listed, lambda: resolve("embedded:clip")):
        with pytest.raises(ValueError, match=rf"{tmp_path}/index.json cannot be read: "):
            call()
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match=r"unknown encoder 'embedded:clip'; run python data/embedded/train.py"):
        resolve("embedded:clip")


def test_a_tokenizer_that_cannot_be_loaded_stops_texts_but_not_images(monkeypatch):
    encoder = load_encoder("embedded:clip", device="cpu")

    def unreachable(_):
        raise OSError("no such file")

    monkeypatch.setattr(libraries, "_tokenizer", unreachable)
    assert encoder.encode_images(encoder.transform(photo(0))[None]).shape == (1, 24)
    with pytest.raises(ValueError, match=r"embedded:clip: cannot load its tokenizer \(no such file\)"):
        encoder.encode_text(["a cat"])


def test_an_embedded_file_that_changed_is_refused(embedded, tmp_path, monkeypatch):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(embedded, copy)
    monkeypatch.setattr(encoders, "EMBEDDED_FOLDER", copy)
    data = bytearray((copy / "vit.safetensors").read_bytes())
    data[-5] ^= 1
    (copy / "vit.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"vit.safetensors has sha256 .* its index says"):
        resolve("embedded:vit")


def test_random_weights_are_the_same_every_time():
    first, second = (load_encoder("timm:test_byobnet/random", device="cpu") for _ in range(2))
    batch = torch.rand(2, 3, *first.transform(photo(0)).shape[1:])
    assert torch.equal(first.encode_images(batch), second.encode_images(batch))
    state = torch.get_rng_state()
    load_encoder("timm:test_byobnet/random", device="cpu")
    assert torch.equal(state, torch.get_rng_state()), "the caller's random state is left alone"


@pytest.mark.parametrize(
    ("name", "size", "mean"),
    [
        ("open_clip:RN50-quickgelu/random", 224, 0.48145466),
        ("timm:vit_small_patch16_224.dino/random", (224, 224), 0.485),
        ("timm:vit_base_patch14_dinov2.lvd142m/random", (518, 518), 0.485),
        ("open_clip:ViT-B-16-SigLIP/random", 224, 0.48145466),
    ],
)
def test_preprocessing_is_the_models_own(name, size, mean):
    spec = resolve(name)
    assert spec.preprocess["size"] == size and spec.preprocess["mean"][0] == mean


def test_preprocessing_of_a_tag_comes_with_the_tag(monkeypatch):
    monkeypatch.setattr(libraries, "_hub_file", lambda *_: ROOT / "README.md")
    assert resolve("open_clip:ViT-B-16-SigLIP/webli").preprocess["resize_mode"] == "squash"
    assert resolve("timm:vit_small_patch16_224.dino").preprocess["crop"] == 0.9


def test_the_transform_gives_what_the_library_gives():
    encoder = load_encoder("timm:vit_small_patch16_224.dino/random", device="cpu")
    card = timm.get_pretrained_cfg("vit_small_patch16_224.dino").to_dict()
    expected = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=card))
    image = photo(1, (300, 200))
    assert torch.equal(encoder.transform(image), expected(image))
    assert encoder.dim == 384
