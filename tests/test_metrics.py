"""Every scorer against a direct computation on a random model of the same architecture; what is missing is named; files, processes,
interruptions; the page in a browser."""
import argparse
import html.parser
import json
import os
import re
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import common
import evaluate
import helpers
from tiny import shapes, train

PROMPTS = ["a red circle", "a small blue square on a white background"]


def images(n, side=48, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(256, size=(side, side, 3), dtype=np.uint8)) for _ in range(n)]


def scored(scorer, pictures, prompts=PROMPTS):
    """PIL images, the same number for every prompt -> {name: [P K, ...]}."""
    prepared = torch.stack([scorer.prepare(image) for image in pictures])
    return scorer.score(prepared.unflatten(0, (len(prompts), -1)), prompts)


# Scorers -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def thumbnail(tmp_path):
    """An open_clip model of a small size -> (its name, a random model)."""
    open_clip = pytest.importorskip("open_clip")
    config = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
              "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}
    (tmp_path / "small.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small.json")
    torch.manual_seed(0)
    return "small", *open_clip.create_model_and_transforms("small")[::2]


def cosines(model, preprocess, pictures, texts):
    import open_clip

    with torch.no_grad():
        image = [model.encode_image(preprocess(picture)[None])[0] for picture in pictures]
        text = [model.encode_text(open_clip.tokenize([text]))[0] for text in texts]
    return [100 * (i @ t / i.norm() / t.norm()).item() for i, t in zip(image, text)]


def test_clip(thumbnail, tmp_path):
    """A square out of the middle, 256 pixels, a prefix; then 100 x cosine."""
    name, model, preprocess = thumbnail
    torch.save(model.state_dict(), tmp_path / "small.pt")
    args = argparse.Namespace(clip_model=name, clip_weights=str(tmp_path / "small.pt"), clip_prefix="A photo depicts ", weights_dir=None)
    pictures = [image.resize((90, 60)) for image in images(4)]
    squares = [picture.crop((15, 0, 75, 60)).resize((256, 256), Image.Resampling.LANCZOS) for picture in pictures]
    expected = cosines(model, preprocess, squares, ["A photo depicts " + PROMPTS[i // 2] for i in range(4)])
    np.testing.assert_allclose(scored(evaluate.Clip(args, PROMPTS, False), pictures)["clip"], expected, atol=1e-4)  # of 100: 1e-6 of a cosine


@pytest.mark.parametrize("version, file, column", [("2.0", "HPS_v2_compressed.pt", "hpsv2"), ("2.1", "HPS_v2.1_compressed.pt", "hpsv2.1")])
def test_hpsv2(thumbnail, tmp_path, monkeypatch, version, file, column):
    name, model, preprocess = thumbnail
    (tmp_path / "xswu/HPSv2").mkdir(parents=True)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "xswu/HPSv2" / file)
    monkeypatch.setattr(evaluate.Hpsv2, "architecture", name)
    scorer = evaluate.Hpsv2(argparse.Namespace(weights_dir=str(tmp_path), hps_version=version), PROMPTS, False)
    pictures = images(4)
    np.testing.assert_allclose(scored(scorer, pictures)[column], cosines(model, preprocess, pictures, [PROMPTS[i // 2] for i in range(4)]), atol=1e-4)


def small_clip():
    from transformers import CLIPConfig, CLIPModel

    tokenizer = train.build_tokenizer()
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": train.TOKENS, "eos_token_id": tokenizer.eos_token_id}
    both = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=both | text, vision_config=both | {"image_size": 32, "patch_size": 8}, projection_dim=64)).eval(), tokenizer


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of weights as --weights-dir wants it: PickScore's model and what it and MPS began from, small ones."""
    from transformers import CLIPImageProcessorPil

    folder, (model, tokenizer) = tmp_path_factory.mktemp("weights"), small_clip()
    model.save_pretrained(folder / "yuvalkirstain/PickScore_v1")
    base = folder / evaluate.Pick.BASE
    model.config.save_pretrained(base)
    tokenizer.save_pretrained(base)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(base)
    return folder


def direct(picture, prompt):
    """The two inputs of a small CLIP: pixels by hand, tokens by its own tokenizer."""
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = (np.array(picture.resize((32, 32), Image.Resampling.BICUBIC)) / 255 - mean) / std
    ids = train.build_tokenizer()([prompt], padding="max_length", max_length=train.TOKENS, return_tensors="pt").input_ids
    return torch.from_numpy(pixels).float().permute(2, 0, 1)[None], ids


def test_pick(weights):
    scorer, (model, _) = evaluate.Pick(argparse.Namespace(weights_dir=str(weights)), PROMPTS, False), small_clip()
    pictures = images(4)
    expected = []
    for i, picture in enumerate(pictures):
        pixels, ids = direct(picture, PROMPTS[i // 2])
        with torch.no_grad():
            expected.append(model(input_ids=ids, pixel_values=pixels).logits_per_image.item())
    np.testing.assert_allclose(scored(scorer, pictures)["pick"], expected, atol=1e-5)


def test_mps(weights):
    """One picture at a time and head by head, step by step as it is published."""
    model, _ = small_clip()
    D, H, torch_state = 64, 2, torch.manual_seed(1)
    state = {f"model.{name}": w for name, w in model.state_dict().items()}
    shapes_of = {"0.fn.norm.weight": (D,), "0.fn.to_q.weight": (64 * H, D), "0.fn.to_kv.weight": (128, D), "0.fn.to_out.weight": (D, 64 * H),
                 "0.fn.ff.0.weight": (8 * D, D), "0.fn.ff.2.weight": (D, 4 * D), "1.fn.norm.weight": (D,),
                 "1.fn.fused_attn_ff_proj.weight": (64 * H + 128 + 8 * D, D), "1.fn.attn_out.weight": (D, 64 * H), "1.fn.ff_out.1.weight": (D, 4 * D)}
    cross = {f"{layer}.{name}": torch.randn(shape, generator=torch_state) / shape[-1] ** 0.5 for layer in range(4) for name, shape in shapes_of.items()}
    save_file(state | {f"cross_model.layers.{name}": w for name, w in cross.items()} | {"cross_model.layers.0.0.fn.norm.bias": torch.zeros(D)},
              weights / "MPS_overall.safetensors")
    scorer = evaluate.Mps(argparse.Namespace(weights_dir=str(weights)), PROMPTS, False)

    def norm(x, w):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * w

    def glu(x):
        return x[:, : 4 * D] * x[:, 4 * D :] * torch.sigmoid(x[:, 4 * D :])

    def turn(x):  # [N, 64]: pairs (i, i + 32) as complex numbers
        angle = torch.arange(len(x))[:, None] * 10000 ** (-torch.arange(32) / 32)
        turned = torch.complex(x[:, :32], x[:, 32:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], 1)

    def attention(q, k, v, mask=0.0):
        return torch.softmax(q @ k.T / 8 + mask, 1) @ v

    pictures, expected, dropped = images(4), [], 0
    for i, picture in enumerate(pictures):
        pixels, ids = direct(picture, PROMPTS[i // 2])
        with torch.no_grad():
            text, vision = model.text_model(ids), model.vision_model(pixels)
            words, end = text.last_hidden_state[0] @ model.text_projection.weight.T, text.pooler_output[0] @ model.text_projection.weight.T
            x = vision.last_hidden_state[0] @ model.visual_projection.weight.T
            ids = train.build_tokenizer()([evaluate.Mps.CONDITION], padding="max_length", truncation=True, max_length=train.TOKENS, return_tensors="pt").input_ids
            condition = model.text_model(ids).last_hidden_state[0] @ model.text_projection.weight.T
            similarity = (condition @ words.T).max(0).values
            mask = torch.where(similarity / similarity.max() > 0.3, 0.0, float("-inf"))
            dropped += int((mask < 0).sum())
            for layer in range(4):
                w = {name[2:]: weight for name, weight in cross.items() if name.startswith(f"{layer}.")}
                h = norm(x, w["0.fn.norm.weight"])
                q, kv = h @ w["0.fn.to_q.weight"].T, words @ w["0.fn.to_kv.weight"].T
                seen = torch.cat([attention(q[:, 64 * n : 64 * n + 64], kv[:, :64], kv[:, 64:], mask) for n in range(H)], 1)
                x = x + seen @ w["0.fn.to_out.weight"].T + glu(h @ w["0.fn.ff.0.weight"].T) @ w["0.fn.ff.2.weight"].T
                all_of = norm(x, w["1.fn.norm.weight"]) @ w["1.fn.fused_attn_ff_proj.weight"].T
                k, v = turn(all_of[:, 64 * H : 64 * H + 64]), all_of[:, 64 * H + 64 : 64 * H + 128]
                seen = torch.cat([attention(turn(all_of[:, 64 * n : 64 * n + 64]), k, v) for n in range(H)], 1)
                x = x + seen @ w["1.fn.attn_out.weight"].T + glu(all_of[:, 64 * H + 128 :]) @ w["1.fn.ff_out.1.weight"].T
            expected.append((model.logit_scale.exp() * (x[0] / x[0].norm()) @ (end / end.norm())).item())
    assert 0 < dropped < 4 * train.TOKENS  # the mask matters
    np.testing.assert_allclose(scored(scorer, pictures)["mps"], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("net, file", [("alex", "alexnet-owt-7be5be79.pth"), ("vgg", "vgg16-397923af.pth"), ("random", None)])
def test_lpips_is_the_double_loop(tmp_path, net, file):
    pytest.importorskip("lpips")
    import torchvision

    if file:
        torch.manual_seed(1)
        network = getattr(torchvision.models, {"alex": "alexnet", "vgg": "vgg16"}[net])()
        torch.save({name: w for name, w in network.state_dict().items() if name.startswith("features")}, tmp_path / file)
    scorer = evaluate.Lpips(argparse.Namespace(lpips_net=net, lpips_size=64, weights_dir=str(tmp_path)), PROMPTS, False)
    if file:
        trunk = zip(scorer.model.net.parameters(), network.features.parameters(), strict=True)
        assert all(ours.equal(theirs) for ours, theirs in trunk)
    pictures = images(6)
    small = torch.stack([torch.from_numpy(np.array(p.resize((64, 64), Image.Resampling.LANCZOS))).permute(2, 0, 1) / 127.5 - 1 for p in pictures])
    with torch.no_grad():
        expected = [np.mean([scorer.model(small[a : a + 1], small[b : b + 1]).item() for a in range(n, n + 3) for b in range(n, a)]) for n in (0, 3)]
    columns = scored(scorer, pictures)
    assert list(columns) == ["lpips" if file else "lpips_random"]
    np.testing.assert_allclose(columns[scorer.name], np.repeat(expected, 3), rtol=1e-5)
    assert file or "RANDOM" in scorer.what
    state = torch.random.get_rng_state()
    evaluate.Lpips(argparse.Namespace(lpips_net="random", lpips_size=64, weights_dir=None), PROMPTS, False)
    assert state.equal(torch.random.get_rng_state())  # nobody else's random numbers change


def exactly(mean, std, n, seed):
    """[n, d] whose sample mean and covariance are exactly these: mean [d], diagonal std [d]."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x -= x.mean(0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T * std + mean


def test_fid_is_the_closed_form():
    """Of two Gaussians with diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    pytest.importorskip("torchmetrics")
    fid = evaluate.Fid.__new__(evaluate.Fid)
    m1, s1, m2, s2 = np.array([0.0, 1, 2]), np.array([1.0, 2, 0.5]), np.array([1.0, 1, 0]), np.array([1.5, 1, 0.5])
    first, second = exactly(m1, s1, 200, 0), exactly(m2, s2, 300, 1)
    parts = lambda x: [{"features": x[:50]}, {"features": x[50:]}]
    assert fid.result(parts(first), parts(second))["fid"] == pytest.approx(((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum(), rel=1e-6)
    assert fid.result(parts(first), parts(first))["fid"] == pytest.approx(0, abs=1e-6)


def test_fid_features_are_inceptions(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    torch_fidelity = pytest.importorskip("torch_fidelity")
    from torchmetrics.image.fid import NoTrainInceptionV3

    path = tmp_path / os.path.basename(evaluate.Fid.URL)
    torch.save({}, path)
    with monkeypatch.context() as patch:  # random weights, as there are none to load
        patch.setattr(torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
    torch.save(network.state_dict(), path)
    scorer = evaluate.Fid(argparse.Namespace(weights_dir=str(tmp_path)), PROMPTS, False)
    pictures = images(2)
    large = np.stack([np.array(p.resize((299, 299), Image.Resampling.BICUBIC)) for p in pictures])
    np.testing.assert_allclose(scored(scorer, pictures)["features"], network(torch.from_numpy(large).permute(0, 3, 1, 2)).numpy(), rtol=1e-4, atol=1e-5)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "unpickled"),)

    torch.save({"x": Evil()}, path)
    with pytest.raises(common.UserError, match="cannot be read as a file of tensors"):
        evaluate.Fid(argparse.Namespace(weights_dir=str(tmp_path)), PROMPTS, False)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("metric, wanted", [("clip", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K/open_clip_model.safetensors"), ("pick", "tokenizer.json"),
                                            ("hpsv2", "xswu/HPSv2/HPS_v2_compressed.pt"), ("mps", "MPS_overall.safetensors"),
                                            ("lpips", "alexnet-owt-7be5be79.pth"), ("fid", "weights-inception-2015-12-05-6726825d.pth")])
def test_a_missing_weight_is_named(tmp_path, monkeypatch, metric, wanted):
    def offline(*args, **kwargs):
        raise OSError("no network")

    import huggingface_hub

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    (tmp_path / "weights" / evaluate.Pick.BASE).mkdir(parents=True)
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / "weights" / evaluate.Pick.BASE / file).write_text("{}")
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "1.png")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    with pytest.raises(common.UserError) as error:
        evaluate.main(["--images", f"x={tmp_path}", "--prompts", str(tmp_path / "prompts.txt"), "--metrics", metric, "--weights-dir", str(tmp_path / "weights")])
    assert os.path.basename(wanted) in str(error.value) and f"{tmp_path}/weights" in str(error.value) and "\n" not in str(error.value)


def test_the_interval_is_the_analytic_one():
    values = np.random.default_rng(0).normal(3, 2, size=2000)
    low, high = evaluate.interval(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(half, rel=0.06) and (low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * half)


# The command ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts_path(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(shapes.split_prompts()[2][:9]) + "\n")
    return str(tmp_path / "prompts.txt")


def command(teacher_folder, prompts_path, out):
    return ["--teacher", teacher_folder, "--steps", "1", "--guidance", "1", "--batch", "4", "--prompts", prompts_path, "--seeds", "8", "--metrics", "oracle,lpips",
            "--lpips-net", "random", "--lpips-size", "64", "--workers", "0", "--out", str(out)]


def results(folder):
    """What any repetition has to reproduce, {path: bytes}."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".jsonl", ".safetensors", ".md") or path.parent.name == "pictures"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_two_processes_and_an_interruption(teacher_folder, prompts_path, tmp_path, monkeypatch):
    """One process, two processes, and one that is stopped while it draws and again while it scores: the same bytes, and nothing twice."""
    evaluate.main(command(teacher_folder, prompts_path, tmp_path / "one"))
    expected = results(tmp_path / "one")
    assert sum(name.endswith(".png") for name in expected) == 72 and sum(name.endswith(".safetensors") for name in expected) == 4
    lines = [json.loads(line) for line in expected["teacher/scores.jsonl"].splitlines()]
    assert len(lines) == 72 and lines[-1]["prompt"] == 8 and lines[-1]["file"] == "0008-7.png" and {"accuracy", "lpips_random"} <= set(lines[-1])

    two = helpers.command("evaluate.py", *command(teacher_folder, prompts_path, tmp_path / "two"), processes=2)
    assert two.returncode == 0, two.stderr
    assert results(tmp_path / "two") == expected

    class Stop(BaseException):
        pass

    def stopping(original, calls, left):
        def call(self, *args):
            calls.append(args)
            if len(calls) > left:
                raise Stop
            return original(self, *args)

        return call

    draw, score, drawings, scorings = evaluate.System.pictures, evaluate.Oracle.score, [], []
    for allowed_drawings, allowed_scorings in ((5, 9), (99, 1)):
        monkeypatch.setattr(evaluate.System, "pictures", stopping(draw, drawings, allowed_drawings))
        monkeypatch.setattr(evaluate.Oracle, "score", stopping(score, scorings, allowed_scorings))
        with pytest.raises(Stop):
            evaluate.main(command(teacher_folder, prompts_path, tmp_path / "stopped"))
    monkeypatch.setattr(evaluate.Oracle, "score", stopping(score, scorings, 99))
    evaluate.main(command(teacher_folder, prompts_path, tmp_path / "stopped"))
    assert results(tmp_path / "stopped") == expected
    assert len(drawings) == 3 * 8 + 1 and len(scorings) == 2 + 1  # each once, but the ones that were stopped

    with pytest.raises(common.UserError, match="other pictures, prompts or settings"):
        evaluate.main([*command(teacher_folder, prompts_path, tmp_path / "one"), "--seed", "1"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Perfect pictures of three prompts, and pictures that show the wrong thing for the last two; 2 samples each."""
    place, prompts = tmp_path_factory.mktemp("folders"), ["a red circle", "a blue square on a white background", "a large green triangle"]
    (place / "prompts.txt").write_text("\n".join(prompts) + "\n")
    for name, colours in (("good", (0, 2, 1)), ("bad", (0, 1, 0))):
        (place / name).mkdir()
        for p, (colour, shape, background) in enumerate(zip(colours, (0, 1, 2), (0, 2, 1))):
            scene = {"size": np.array([1, 1]), "colour": np.array([colour] * 2), "shape": np.array([shape] * 2), "background": np.array([background] * 2)}
            for k, pixels in enumerate(torch.from_numpy(shapes.render(scene, np.array([(15.0, 16.0), (17.0, 16.0)])))):
                common.save_grid(pixels[None], str(place / name / f"{p:04d}-{k}.png"), padding=0)
    shutil.copy(place / "good/0000-0.png", place / "good/grid.png")  # as sample.py leaves one
    out = place / "out"
    evaluate.main(["--images", f"good={place}/good", "--images", f"bad={place}/bad", "--prompts", str(place / "prompts.txt"), "--out", str(out),
                   "--side-by-side", "good", "bad"])
    return place


def test_folders_of_pictures(folders):
    good, bad = json.load(open(folders / "out/report.json"))["rows"]
    assert good["accuracy"] == 1 and good["ci"]["accuracy"] == [1, 1] and good["samples"] == 6
    assert bad["accuracy"] == pytest.approx(1 / 3, abs=1e-4) and bad["ci"]["accuracy"] == [0, 1]
    assert good["steps"] is None and "paper" not in (folders / "out/table.md").read_text()
    for name in ("bars.png", "differences.png", "best-and-worst-good.png", "best-and-worst-bad.png", "grid.png"):
        with Image.open(folders / "out" / name) as picture:
            assert min(picture.size) > 50 and len(picture.convert("RGB").getcolors(1 << 24)) > 3

    arguments = ["--prompts", str(folders / "prompts.txt")]
    (folders / "five.txt").write_text("a red circle\n" * 5)
    for wrong, sentence in (
            ([*arguments, "--images", "x=/nowhere"], "no folder of pictures '/nowhere'"),
            (["--prompts", str(folders / "five.txt"), "--images", f"x={folders}/good"], "6 pictures, which is no multiple of the 5 prompts"),
            ([*arguments, "--images", f"x={folders}/good", "--images", f"x={folders}/bad"], "two systems called 'x'"),
            ([*arguments, "--images", f"a/b={folders}/good"], "'a/b' cannot be a system's name"),
            ([*arguments, "--images", f"x={folders}/good", "--reference", "y"], "--reference 'y' is none of the systems x"),
            ([*arguments, "--images", f"x={folders}/good", "--side-by-side", "x", "y"], "--side-by-side 'y'"),
            ([*arguments, "--images", f"x={folders}/good", "--metrics", "vbench", "--out", "/tmp"], "VBench_full_info.json"),
            (arguments, "give a --teacher, a --student, --images")):
        with pytest.raises(common.UserError, match=re.escape(sentence)):
            evaluate.main(wrong)
    (folders / "broken").mkdir(exist_ok=True)
    (folders / "broken/0.png").write_bytes((folders / "good/0000-0.png").read_bytes()[:60])
    (folders / "one.txt").write_text("a red circle\n")
    for workers in ("0", "1"):
        with pytest.raises(common.UserError, match=r"^a picture of broken cannot be read: .*broken/0\.png[^\n]*$"):
            evaluate.main(["--images", f"{folders}/broken", "--prompts", str(folders / "one.txt"), "--workers", workers])


def test_the_papers_rows_stand_beside():
    rows = [{"system": "mine", "steps": 1, "nfe": 1, "clip": 35.0, "lpips": 0.7, "ci": {"clip": [34.5, 35.5]}}]
    paper = evaluate.paper_rows(rows[0])
    lines = evaluate.table(rows, paper).splitlines()
    assert lines[0] == "| system | steps | nfe | clip | lpips |"
    assert lines[2] == "| mine | 1 | 1 | 35.000 ± 0.500 | 0.700 |"
    assert "| DMDX (paper, tables 1 and 6) | 1 | 1 | 35.256 | 0.716 |" in lines and "| SD3-Medium ADM (paper, table 2) | 4 | 4 | 34.908 |  |" in lines
    assert len(paper) == 14 and evaluate.paper_rows({"accuracy": 1.0, "lpips_random": 1.0}) == []


def test_vbench(tmp_path, monkeypatch, capsys):
    """Names and folders as VBench wants them; the command where it is not there; its scores in the table where it is."""
    teacher = tmp_path / "teacher"
    torch.manual_seed(0)
    train.build_cogvideox().to(dtype=torch.float16).save_pretrained(teacher)
    entries = [{"prompt_en": "a red circle moving", "dimension": ["color", "dynamic_degree"]}, {"prompt_en": "a small square moving", "dimension": ["dynamic_degree"]}]
    (tmp_path / "VBench_full_info.json").write_text(json.dumps(entries))
    arguments = ["--teacher", str(teacher), "--steps", "1", "--guidance", "1", "--prompts", str(tmp_path / "VBench_full_info.json"), "--seeds", "2",
                 "--metrics", "oracle,vbench", "--out", str(tmp_path / "out")]
    with pytest.raises(common.UserError, match="--metrics clip is for pictures, not for videos"):
        evaluate.main([*arguments, "--metrics", "clip"])
    monkeypatch.setenv("PATH", str(tmp_path))
    evaluate.main(arguments)
    place = tmp_path / "out/teacher/vbench"
    assert sorted(os.listdir(place / "color")) == ["a red circle moving-0.mp4", "a red circle moving-1.mp4"]
    assert len(os.listdir(place / "dynamic_degree")) == 4 and (place / "color/a red circle moving-0.mp4").stat().st_size > 200
    assert f"vbench evaluate --videos_path {place}/color --dimension color --output_path {place}/results/color" in capsys.readouterr().out

    fake = f"""#!{sys.executable}
import json, sys
dimension, output = sys.argv[5], sys.argv[7]
json.dump({{dimension: [len(dimension) / 100, []]}}, open(output + "/results_2026_eval_results.json", "w"))
"""
    (tmp_path / "vbench").write_text(fake)
    (tmp_path / "vbench").chmod(stat.S_IRWXU)
    evaluate.main(arguments)
    assert json.load(open(tmp_path / "out/report.json"))["rows"][0]["vbench"] == {"color": 0.05, "dynamic_degree": 0.14}
    assert "| dynamic_degree | 0.1400 |" in capsys.readouterr().out


# The page ------------------------------------------------------------------------------------------------------------------


class Links(html.parser.HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self):
        super().__init__()
        self.links = []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]


def test_the_page_holds_everything(folders):
    text = (folders / "out/side-by-side.html").read_text()
    links = Links()
    links.feed(text)
    assert links.links == [] and "http" not in text
    pages = json.loads(re.search(r"const pages = (\[.*?\]), names", text)[1])
    assert [page["prompt"] for page in pages] == (folders / "prompts.txt").read_text().splitlines()
    assert pages[1]["scores"][0] == ["accuracy", "1.000", "0.000"] and all(page[side].startswith("data:image/webp;base64,") for page in pages for side in "ab")


def test_a_prompt_cannot_leave_the_script(tmp_path, folders):
    both = [evaluate.found(name, str(tmp_path), str(folders / name), 3) for name in ("good", "bad")]
    prompts = ["</script><script>alert(1)</script>", "NAMES PAGES \\u003c", "a <b>bold</b> shape"]
    evaluate.save_page(*both, {"good": {}, "bad": {}}, prompts, str(tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    assert text.count("</script>") == 1 and [page["prompt"] for page in json.loads(re.search(r"const pages = (\[.*?\]), names", text)[1])] == prompts


def test_the_page_in_a_browser(folders, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip(f"there is no browser that runs headless: none of {', '.join(names)}")
    for page, prompt in ((0, "a red circle"), (1, "a blue square on a white background")):
        words = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom", f"file://{folders}/out/side-by-side.html#{page}"]
        shown = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout
        assert f'<h2 id="prompt">{prompt}</h2>' in shown and f"{page + 1} of 3" in shown and "<td>accuracy</td>" in shown
        assert len(re.findall(r'<img id="[ab]" src="data:image/webp;base64,', shown)) == 2
