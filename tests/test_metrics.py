"""Every scorer against counts by hand, closed forms or a direct computation; intervals, rows and tables."""

import argparse
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from metrics import plots, variety
from metrics.clip import Clip, OpenClip
from metrics.fid import Fid
from metrics.lpips import Lpips
from metrics.oracle import Oracle
from metrics.paper import VIDEOS, read_table, select_rows
from metrics.preference import Hpsv2, Mps, PickScore, fit_into_square
from metrics.rows import bootstrap_interval, format_table, take_interval, take_mean
from metrics.vbench import QUALITY, SEMANTIC, summarise
from metrics.weights import find_repository
from support.arguments import CLIP, LPIPS
from support.errors import UserError
from tiny import shapes, train

PROMPTS = ["a red circle", "a small blue square on a white background"]
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])
RED, BLUE = 0, 2


# The oracle -----------------------------------------------------------------------------------------------


def render(scenes):
    """[(size, colour, shape, background) as indices] -> pixels [n, 3, 32, 32], all centred."""
    attributes = {}
    for i, name in enumerate(shapes.ATTRIBUTES):
        attributes[name] = np.array([scene[i] for scene in scenes])
    return torch.from_numpy(shapes.render(attributes, np.full((len(scenes), 2), 16.0)))


def read_scenes(prompts, scenes):
    """The oracle's scores of P prompts with K scenes each."""
    pixels = torch.stack([render(group) for group in scenes])
    return [Oracle(None, prompts, False).score(pixels, prompts)]


def summarise_oracle(scores, reference=None):
    return Oracle(None, [], False).result(scores, reference or scores)


def test_oracle_counts_by_hand():
    prompts = ["a small red circle on a black background", "a red shape"]
    scenes = [[(0, RED, 0, 0), (0, BLUE, 0, 0)], [(0, RED, 0, 0), (0, RED, 1, 1)]]
    result = summarise_oracle(read_scenes(prompts, scenes))  # of both of the second prompt the size is small
    assert result["accuracy"] == 3 / 4
    assert result["valid"] == 1
    assert result["accuracy_of"]["colour"] == 3 / 4
    assert result["accuracy_of"]["shape"] == 1
    # of two samples of two values half are alike and half are not: total variation 1/4 on average
    nothing = float("nan")
    np.testing.assert_allclose(result["tv_of"]["size"], [nothing, 1 / 2 - 1 / 4], atol=1e-6)
    # of two samples of three values a third are alike: 1/3 x 2/3 + 2/3 x 1/3 on average
    np.testing.assert_allclose(result["tv_of"]["shape"], [nothing, 1 / 3 - 4 / 9], atol=1e-6)
    np.testing.assert_allclose(result["tv"], [nothing, (1 / 4 - 1 / 9 - 1 / 9) / 3], atol=1e-6)
    np.testing.assert_allclose(result["coverage"], [nothing, (1 / 2 + 2 / 3 + 2 / 3) / 3], atol=1e-6)


def test_oracle_counts_an_invalid_image_as_wrong():
    scores = Oracle(None, [], False).score(torch.zeros(1, 2, 3, 32, 32), ["a shape"])
    result = summarise_oracle([scores])
    assert result["accuracy"] == 0
    assert result["valid"] == 0
    assert result["accuracy_of"] == {}  # the prompt names nothing


def draw_student(prompts, kind, seed, samples=64):
    """The oracle's scores of a student that is right about everything its prompts name, and of what they
    leave open draws all values ("perfect"), half of them ("half") or one picture a prompt ("one")."""
    rng = np.random.default_rng(seed)
    groups = []
    for prompt in prompts:
        attributes, centre = shapes.draw(rng, samples)
        for name, wanted in shapes.parse(prompt).items():
            if wanted is not None:
                attributes[name][:] = wanted
            elif kind == "half":
                attributes[name] //= 2
        if kind == "one":
            attributes = {name: np.full(samples, values[0]) for name, values in attributes.items()}
            centre = np.tile(centre[0], (samples, 1))
        groups.append(torch.from_numpy(shapes.render(attributes, centre)))
    return [Oracle(None, prompts, False).score(torch.stack(groups), prompts)]


def test_students_with_less_variety_are_told_apart():
    """A student with one picture a prompt passes every count over all prompts together: accuracy, and the
    values' frequencies."""
    prompts = ["a small shape", "a red shape", "a circle on a black background", "a large blue square"] * 4
    reference = draw_student(prompts, "perfect", 0)
    tv, coverage, spread, distance = {}, {}, {}, {}
    for kind in ("perfect", "half", "one"):
        result = summarise_oracle(draw_student(prompts, kind, 1), reference)
        assert result["accuracy"] == 1
        tv[kind] = take_mean(result["tv"])
        coverage[kind] = take_mean(result["coverage"])
        spread[kind] = take_mean(result["position_std"])
        distance[kind] = take_mean(result["pairwise_distance"])
    assert abs(tv["perfect"]) < 0.02
    assert 0.3 < tv["half"] < 0.5
    assert tv["one"] > tv["half"] + 0.1
    assert coverage["perfect"] > 0.97
    assert 0.5 <= coverage["half"] < 0.65
    assert coverage["one"] < 0.4
    assert spread["perfect"] == pytest.approx(12 / np.sqrt(12), abs=0.1)  # uniform over 12 pixels
    assert spread["half"] == pytest.approx(spread["perfect"], abs=0.1)
    assert spread["one"] == 0
    assert distance["one"] < 1e-3
    assert distance["perfect"] > distance["half"] > 0.2


def draw_pair(rng, one, other, rows, samples, paired=0.0):
    """Values of two distributions, int [rows, samples] each; so large a share of the samples k has one noise
    in both, as where a student draws what its teacher does from it."""
    noise, own = rng.random((rows, samples)), rng.random((rows, samples))
    own = np.where(rng.random((rows, samples)) < paired, noise, own)
    return [np.searchsorted(np.cumsum(shares)[:-1], x) for shares, x in ((one, noise), (other, own))]


@pytest.mark.parametrize("paired", (0.0, 0.7, 0.95))
@pytest.mark.parametrize("other", ((0.5, 0.3, 0.2), (0.4, 0.3, 0.3), (0.0, 0.0, 1.0)))
def test_the_squared_distance_is_that_of_the_distributions(other, paired):
    """However few samples, and be they of one noise or not; to itself it is 0."""
    one = np.array((0.5, 0.3, 0.2))
    values, reference = draw_pair(np.random.default_rng(0), one, other, 40000, 8, paired)
    measured = variety.measure_squared_distance(values, reference, 3)
    error = measured.std() / 200
    assert error < 0.003
    assert measured.mean() == pytest.approx(np.square(one - other).sum(), abs=4 * error + 1e-9)


@pytest.mark.parametrize("paired", (0.0, 0.7, 0.95))
@pytest.mark.parametrize("samples", (16, 64))
@pytest.mark.parametrize("shares", ((0.5, 0.5), (0.5, 0.3, 0.2), (1 / 6,) * 6))
def test_nothing_is_left_of_the_total_variation_of_one_distribution(shares, samples, paired):
    """Samples of one noise differ by less than chance; so much less is taken off."""
    rng = np.random.default_rng(1)
    values, reference = draw_pair(rng, shares, shares, 4000, samples, paired)
    excess = variety.measure_excess_tv_to(values, reference, len(shares))
    assert abs(excess.mean()) <= 4 * excess.std() / np.sqrt(len(excess))


def test_total_variation_is_to_the_reference_and_less_chance():
    """Student and reference have only small ones, as a reference itself may: no distance, and no variety."""
    prompts = ["a red circle on a black background"]
    all_small = [(0, RED, 0, 0)] * 8
    half_small = [(0, RED, 0, 0)] * 4 + [(1, RED, 0, 0)] * 4
    student = read_scenes(prompts, [all_small])
    teacher = read_scenes(prompts, [half_small])
    same = summarise_oracle(student, read_scenes(prompts, [all_small]))
    assert same["tv_of"]["size"] == pytest.approx(0, abs=1e-6)
    of_uniform = 0.5 - variety.expect_tv_to_uniform(2, 8)
    assert same["tv_uniform_of"]["size"] == pytest.approx(of_uniform)
    assert summarise_oracle(student)["tv_of"]["size"] == pytest.approx(of_uniform)  # the reference itself
    other = summarise_oracle(student, teacher)
    # four of the eight samples differ: exchanged or not, one of two more or less of each value on average
    assert other["tv_of"]["size"] == pytest.approx(0.5 - 0.5 * (1.5 + 1.5) / 8)
    assert list(other["tv_of"]) == ["size"]


def test_a_reference_of_fewer_samples_counts_with_as_many():
    """And one of a single sample says nothing of variety."""
    prompts = ["a red circle on a black background"]
    small, large = (0, RED, 0, 0), (1, RED, 0, 0)
    student = read_scenes(prompts, [[small, small, large, large]])
    result = summarise_oracle(student, read_scenes(prompts, [[small, large]]))
    expected = summarise_oracle(
        read_scenes(prompts, [[small, small]]), read_scenes(prompts, [[small, large]])
    )
    for name in ("tv", "squared_distance"):
        assert result[name] == pytest.approx(expected[name])
    alone = summarise_oracle(student, read_scenes(prompts, [[small]]))
    assert set(result) - set(alone) == {"tv", "tv_of", "squared_distance"}
    assert alone["tv_uniform"] == result["tv_uniform"]


def test_chance_is_the_average_over_many_draws():
    rng = np.random.default_rng(0)
    even = rng.multinomial(16, np.full(6, 1 / 6), size=40000) / 16
    assert abs(variety.measure_excess_tv(even, 16).mean()) < 1e-3


@pytest.mark.parametrize(
    ("values", "distance", "reads", "uniform"),
    [(2, 0.1, 0.04, 0.05), (6, 0.1, 0.02, 0.03), (2, 0.3, 0.23, 0.25), (6, 0.3, 0.15, 0.19)],
)
def test_a_small_distance_reads_as_less(values, distance, reads, uniform):
    """As docs/metrics.md says: what chance gives is taken off in full."""
    rng = np.random.default_rng(0)
    even = np.full(values, 1 / values)
    shift = np.repeat([1, -1], values // 2) * distance / (values // 2)
    student, reference = draw_pair(rng, even + shift, even, 1000, 64)
    assert variety.measure_tv(even + shift, even[None]) == pytest.approx(distance)
    excess = variety.measure_excess_tv_to(student, reference, values)
    assert excess.mean() == pytest.approx(reads, abs=0.006)
    to_uniform = variety.measure_excess_tv(variety.count_shares(student, values), 64)
    assert to_uniform.mean() == pytest.approx(uniform, abs=0.006)


def test_coverage_counts_what_has_half_its_rate():
    shares = np.array([[0.25, 0.25, 0.5], [1 / 6, 0.16, 0.68], [0, 0, 1]])
    np.testing.assert_allclose(variety.measure_coverage(shares), [1, 2 / 3, 1 / 3])


def test_pairwise_distance_by_hand():
    attributes, centre = shapes.draw(np.random.default_rng(0), 20)
    pixels = torch.from_numpy(shapes.render(attributes, centre))
    pairs = [float(((pixels[i] - pixels[j]) ** 2).mean().sqrt()) for i in range(20) for j in range(i)]
    result = summarise_oracle([Oracle(None, [], False).score(pixels[None], ["a shape"])])
    assert take_mean(result["pairwise_distance"]) == pytest.approx(np.mean(pairs), rel=1e-3)


def test_one_sample_has_no_variety():
    result = summarise_oracle(read_scenes(["a red shape"], [[(0, RED, 0, 0)]]))
    assert set(result) == {"accuracy", "valid", "accuracy_of"}


def test_videos_are_read_by_the_video_oracle():
    attributes, centre = shapes.draw(np.random.default_rng(0), 4, shapes.VIDEO)
    attributes["motion"][:] = (0, 0, 1, 1)
    attributes["colour"][:] = BLUE
    pixels = torch.from_numpy(shapes.render_video(attributes, centre)).view(2, 2, 3, 9, 32, 32)
    prompts = ["a blue shape moving left", "a blue shape moving left"]
    oracle = Oracle(None, prompts, True)
    scores = [oracle.score(pixels, prompts)]
    result = oracle.result(scores, scores)
    assert result["valid"] == 1
    assert result["accuracy"] == 0.5
    assert result["accuracy_of"] == {"colour": 1, "motion": 0.5}
    assert set(result["tv_of"]) == {"size", "shape", "background"}


# Networks -------------------------------------------------------------------------------------------------


def make_images(n, side=48, seed=0):
    rng = np.random.default_rng(seed)
    arrays = [rng.integers(256, size=(side, side, 3), dtype=np.uint8) for _ in range(n)]
    return [Image.fromarray(array) for array in arrays]


def score(scorer, images, prompts=PROMPTS):
    """PIL images, the same number for every prompt -> {name: [P K, ...]}."""
    prepared = torch.stack([scorer.prepare(image) for image in images])
    return scorer.score(prepared.unflatten(0, (len(prompts), -1)), prompts)


@pytest.fixture
def thumbnail(tmp_path):
    """An open_clip model of a small size -> (its name, a random model)."""
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "small.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small.json")
    torch.manual_seed(0)
    return "small", *open_clip.create_model_and_transforms("small")[::2]


@torch.no_grad()
def compute_cosines(model, preprocess, images, texts):
    import open_clip

    cosines = []
    for image, text in zip(images, texts):
        i = model.encode_image(preprocess(image)[None])[0]
        t = model.encode_text(open_clip.tokenize([text]))[0]
        cosines.append(100 * (i @ t / i.norm() / t.norm()).item())
    return cosines


@pytest.mark.parametrize("size, square", (((90, 60), (15, 0, 75, 60)), ((60, 90), (0, 15, 60, 75))))
def test_clip(thumbnail, tmp_path, size, square):
    """A square out of the middle, 256 pixels, a prefix; then 100 x cosine."""
    name, model, preprocess = thumbnail
    weights = str(tmp_path / "small.pt")
    torch.save(model.state_dict(), weights)
    args = argparse.Namespace(
        clip_model=name, clip_weights=weights, clip_prefix="A photo depicts ", weights_dir=None
    )
    images = [image.resize(size) for image in make_images(4)]
    cut = [image.crop(square) for image in images]
    squares = [image.resize((256, 256), Image.Resampling.LANCZOS) for image in cut]
    texts = ["A photo depicts " + PROMPTS[i // 2] for i in range(4)]
    expected = compute_cosines(model, preprocess, squares, texts)
    columns = score(Clip(args, PROMPTS, False), images)
    np.testing.assert_allclose(columns["clip"], expected, atol=1e-4)  # of 100: 1e-6 of a cosine


VERSIONS = [("2.0", "HPS_v2_compressed.pt", "hpsv2"), ("2.1", "HPS_v2.1_compressed.pt", "hpsv2.1")]


@pytest.mark.parametrize("version, file, column", VERSIONS)
def test_hpsv2(thumbnail, tmp_path, monkeypatch, version, file, column):
    name, model, preprocess = thumbnail
    folder = tmp_path / "xswu/HPSv2"
    folder.mkdir(parents=True)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / file)
    monkeypatch.setattr(Hpsv2, "MODEL", name)
    scorer = Hpsv2(argparse.Namespace(weights_dir=str(tmp_path), hps_version=version), PROMPTS, False)
    images = make_images(4)
    expected = compute_cosines(model, preprocess, images, [PROMPTS[i // 2] for i in range(4)])
    np.testing.assert_allclose(score(scorer, images)[column], expected, atol=1e-4)


@pytest.mark.parametrize("axes", ((0, 1, 2), (1, 0, 2)), ids=("wide", "tall"))
def test_hpsv2_cuts_nothing_off(axes):
    """Its authors' own preparation: the longer side to the model's size, black bars at the shorter ones."""
    pixels = np.full((50, 100, 3), 255, np.uint8)
    pixels[:, :10] = (255, 0, 0)  # which a square cut out of the middle has not
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(axes)))
    fitted = np.asarray(fit_into_square(image, 40)).transpose(axes)
    assert fitted.shape == (40, 40, 3)
    assert not fitted[:10].any() and not fitted[30:].any()
    assert fitted[10:30, 39].min() == 255
    assert tuple(fitted[20, 1]) == (255, 0, 0)


def make_small_clip():
    from transformers import CLIPConfig, CLIPModel

    tokenizer = train.build_tokenizer()
    both = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": train.TOKENS,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=both | text, vision_config=both | vision, projection_dim=64)
    torch.manual_seed(0)
    return CLIPModel(config).eval(), tokenizer


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of weights as --weights-dir wants it: a small PickScore, and what it and MPS began from."""
    from transformers import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("weights")
    model, tokenizer = make_small_clip()
    model.save_pretrained(folder / PickScore.REPOSITORY)
    base = folder / PickScore.BASE
    model.config.save_pretrained(base)
    tokenizer.save_pretrained(base)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(base)
    return folder


def tokenize(text):
    tokenizer = train.build_tokenizer()
    options = {"padding": "max_length", "truncation": True, "max_length": train.TOKENS}
    return tokenizer([text], **options, return_tensors="pt").input_ids


def normalise(image):
    """A PIL image -> a small CLIP's pixels [1, 3, 32, 32], by hand."""
    small = np.array(image.resize((32, 32), Image.Resampling.BICUBIC))
    pixels = (small / 255 - CLIP_MEAN) / CLIP_STD
    return torch.from_numpy(pixels).float().permute(2, 0, 1)[None]


def test_pick(weights):
    scorer = PickScore(argparse.Namespace(weights_dir=str(weights)), PROMPTS, False)
    model, _ = make_small_clip()
    images = make_images(4)
    expected = []
    for i, image in enumerate(images):
        with torch.no_grad():
            out = model(input_ids=tokenize(PROMPTS[i // 2]), pixel_values=normalise(image))
        expected.append(out.logits_per_image.item())
    np.testing.assert_allclose(score(scorer, images)["pick"], expected, atol=1e-5)


WIDTH, HEADS = 64, 2  # of the small MPS
MPS_SHAPES = {
    "0.fn.norm.weight": (WIDTH,),
    "0.fn.to_q.weight": (64 * HEADS, WIDTH),
    "0.fn.to_kv.weight": (128, WIDTH),
    "0.fn.to_out.weight": (WIDTH, 64 * HEADS),
    "0.fn.ff.0.weight": (8 * WIDTH, WIDTH),
    "0.fn.ff.2.weight": (WIDTH, 4 * WIDTH),
    "1.fn.norm.weight": (WIDTH,),
    "1.fn.fused_attn_ff_proj.weight": (64 * HEADS + 128 + 8 * WIDTH, WIDTH),
    "1.fn.attn_out.weight": (WIDTH, 64 * HEADS),
    "1.fn.ff_out.1.weight": (WIDTH, 4 * WIDTH),
}


def norm(x, w):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * w


def glu(x):
    return x[:, : 4 * WIDTH] * x[:, 4 * WIDTH :] * torch.sigmoid(x[:, 4 * WIDTH :])


def turn(x):
    """[N, 64]: pairs (i, i + 32) as complex numbers."""
    angle = torch.arange(len(x))[:, None] * 10000 ** (-torch.arange(32) / 32)
    turned = torch.complex(x[:, :32], x[:, 32:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], 1)


def attention(q, k, v, mask=0.0):
    return torch.softmax(q @ k.T / 8 + mask, 1) @ v


def run_mps_layer(x, words, mask, w):
    """A layer of MPS's cross-attention model for one image, head by head, as it is published."""
    heads = [slice(64 * n, 64 * n + 64) for n in range(HEADS)]
    h = norm(x, w["0.fn.norm.weight"])
    q = h @ w["0.fn.to_q.weight"].T
    kv = words @ w["0.fn.to_kv.weight"].T
    seen = torch.cat([attention(q[:, head], kv[:, :64], kv[:, 64:], mask) for head in heads], 1)
    x = x + seen @ w["0.fn.to_out.weight"].T + glu(h @ w["0.fn.ff.0.weight"].T) @ w["0.fn.ff.2.weight"].T

    fused = norm(x, w["1.fn.norm.weight"]) @ w["1.fn.fused_attn_ff_proj.weight"].T
    inner = 64 * HEADS
    k, v = turn(fused[:, inner : inner + 64]), fused[:, inner + 64 : inner + 128]
    seen = torch.cat([attention(turn(fused[:, head]), k, v) for head in heads], 1)
    ff = glu(fused[:, inner + 128 :]) @ w["1.fn.ff_out.1.weight"].T
    return x + seen @ w["1.fn.attn_out.weight"].T + ff


def test_mps(weights):
    """One image at a time and head by head, step by step as it is published."""
    model, _ = make_small_clip()
    generator = torch.manual_seed(1)
    cross = {}
    for layer in range(4):
        for name, shape in MPS_SHAPES.items():
            cross[f"{layer}.{name}"] = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    state = {f"model.{name}": w for name, w in model.state_dict().items()}
    state |= {f"cross_model.layers.{name}": w for name, w in cross.items()}
    state["cross_model.layers.0.0.fn.norm.bias"] = torch.zeros(WIDTH)
    save_file(state, weights / "MPS_overall.safetensors")
    scorer = Mps(argparse.Namespace(weights_dir=str(weights)), PROMPTS, False)
    own = [*scorer.model.parameters(), *scorer.model.buffers()]
    assert len(scorer.list_weights()) == len(own) + len(cross) + 1  # and the bias

    images, expected, dropped = make_images(4), [], 0
    to_text, to_vision = model.text_projection.weight.T, model.visual_projection.weight.T
    with torch.no_grad():
        condition = model.text_model(tokenize(Mps.CONDITION)).last_hidden_state[0] @ to_text
        for i, image in enumerate(images):
            text = model.text_model(tokenize(PROMPTS[i // 2]))
            words, end = text.last_hidden_state[0] @ to_text, text.pooler_output[0] @ to_text
            similarity = (condition @ words.T).max(0).values
            mask = torch.where(similarity / similarity.max() > 0.3, 0.0, float("-inf"))
            dropped += int((mask < 0).sum())
            x = model.vision_model(normalise(image)).last_hidden_state[0] @ to_vision
            for layer in range(4):
                own = {name[2:]: w for name, w in cross.items() if name.startswith(f"{layer}.")}
                x = run_mps_layer(x, words, mask, own)
            cosine = (x[0] / x[0].norm()) @ (end / end.norm())
            expected.append((model.logit_scale.exp() * cosine).item())
    assert 0 < dropped < 4 * train.TOKENS  # the mask matters
    np.testing.assert_allclose(score(scorer, images)["mps"], expected, atol=1e-4, rtol=1e-5)


NETS = [("alex", "alexnet-owt-7be5be79.pth"), ("vgg", "vgg16-397923af.pth"), ("random", None)]


@pytest.mark.parametrize("net, file", NETS)
def test_lpips_is_the_double_loop(tmp_path, net, file):
    pytest.importorskip("lpips")
    import torchvision

    if file:
        torch.manual_seed(1)
        network = getattr(torchvision.models, {"alex": "alexnet", "vgg": "vgg16"}[net])()
        state = {name: w for name, w in network.state_dict().items() if name.startswith("features")}
        torch.save(state, tmp_path / file)
    args = argparse.Namespace(lpips_net=net, lpips_size=64, weights_dir=str(tmp_path))
    scorer = Lpips(args, PROMPTS, False)
    if file:
        trunk = zip(scorer.model.net.parameters(), network.features.parameters(), strict=True)
        assert all(ours.equal(theirs) for ours, theirs in trunk)

    images = make_images(6)
    resized = [np.array(image.resize((64, 64), Image.Resampling.LANCZOS)) for image in images]
    small = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 127.5 - 1
    expected = []
    for first in (0, 3):
        pairs = [(a, b) for a in range(first, first + 3) for b in range(first, a)]
        with torch.no_grad():
            distances = [scorer.model(small[a : a + 1], small[b : b + 1]).item() for a, b in pairs]
        expected.append(np.mean(distances))
    columns = score(scorer, images)
    assert list(columns) == ["lpips" if file else "lpips_random"]
    np.testing.assert_allclose(columns[scorer.column], np.repeat(expected, 3), rtol=1e-5)
    assert file or "RANDOM" in scorer.description


def test_lpips_leaves_random_numbers_alone():
    pytest.importorskip("lpips")
    state = torch.random.get_rng_state()
    Lpips(argparse.Namespace(lpips_net="random", lpips_size=64, weights_dir=None), PROMPTS, False)
    assert state.equal(torch.random.get_rng_state())


def draw_exactly(mean, std, n, seed):
    """[n, d] whose sample mean and covariance are exactly these: mean [d], diagonal std [d]."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x -= x.mean(0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T * std + mean


def test_fid_is_the_closed_form():
    """Of two Gaussians with diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    pytest.importorskip("torchmetrics")
    fid = Fid.__new__(Fid)
    m1, s1 = np.array([0.0, 1, 2]), np.array([1.0, 2, 0.5])
    m2, s2 = np.array([1.0, 1, 0]), np.array([1.5, 1, 0.5])
    first, second = draw_exactly(m1, s1, 200, 0), draw_exactly(m2, s2, 300, 1)
    first = [{"features": first[:50]}, {"features": first[50:]}]
    second = [{"features": second[:50]}, {"features": second[50:]}]
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert fid.result(first, second)["fid"] == pytest.approx(expected, rel=1e-6)
    assert fid.result(first, list(first))["fid"] == pytest.approx(0, abs=1e-6)
    assert fid.result(first, first) == {"fid": None}  # the reference's own row has no number


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """A random Inception, and its weights' file as --weights-dir wants it."""
    pytest.importorskip("torchmetrics")
    torch_fidelity = pytest.importorskip("torch_fidelity")
    from torchmetrics.image.fid import NoTrainInceptionV3

    path = tmp_path / os.path.basename(Fid.URL)
    torch.save({}, path)
    extractor = torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:  # random weights, as there are none to load
        patch.setattr(extractor, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
    torch.save(network.state_dict(), path)
    return network, path


def test_fid_features_are_inceptions(inception):
    network, path = inception
    scorer = Fid(argparse.Namespace(weights_dir=str(path.parent)), PROMPTS, False)
    images = make_images(2)
    large = np.stack([np.array(image.resize((299, 299), Image.Resampling.BICUBIC)) for image in images])
    expected = network(torch.from_numpy(large).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(score(scorer, images)["features"], expected, rtol=1e-4, atol=1e-5)
    wide = Image.new("RGB", (80, 48))
    wide.paste(images[0], (16, 0))
    assert scorer.prepare(wide).equal(scorer.prepare(images[0]))  # the square in the middle counts
    assert len(scorer.list_weights()) == len(network.state_dict())  # its running means among them


def test_fids_file_is_not_unpickled(inception):
    _, path = inception

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "unpickled"),)

    torch.save({"x": Evil()}, path)
    with pytest.raises(UserError, match="cannot be read as a file of tensors"):
        Fid(argparse.Namespace(weights_dir=str(path.parent)), PROMPTS, False)
    assert not (path.parent / "unpickled").exists()


def test_a_folder_of_weights_that_is_not_complete_is_said(tmp_path):
    """The hub's would take the place of all of it."""
    (tmp_path / "some/model").mkdir(parents=True)
    (tmp_path / "some/model/a.safetensors").touch()
    with pytest.raises(UserError, match="has a.safetensors and no config.json"):
        find_repository(str(tmp_path), "some/model", "config.json", "a.safetensors")


# Rows -----------------------------------------------------------------------------------------------------


def test_the_interval_is_the_analytic_one():
    values = np.random.default_rng(0).normal(3, 2, size=2000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * half)


@pytest.mark.parametrize("values", ([0.5], [float("nan"), 0.5], [float("nan")]))
def test_one_prompt_has_no_interval(values):
    """It would read as +- 0.000."""
    assert take_interval(np.array(values)) is None


OF_THE_PAPER = argparse.Namespace()
OF_THE_PAPER.clip_model, OF_THE_PAPER.clip_weights, OF_THE_PAPER.clip_prefix = CLIP
OF_THE_PAPER.lpips_net, OF_THE_PAPER.lpips_size = LPIPS


def test_the_papers_rows_stand_beside():
    interval = {"clip": [34.5, 35.5]}
    rows = [{"system": "mine", "steps": 1, "nfe": 1, "clip": 35.0, "lpips": 0.7, "ci": interval}]
    paper = select_rows(rows[0], OF_THE_PAPER)
    lines = format_table(rows, paper).splitlines()
    assert lines[0] == "| system | steps | nfe | clip | lpips |"
    assert lines[2] == "| mine | 1 | 1 | 35.000 ± 0.500 | 0.700 |"
    assert "| DMDX (paper, tables 1 and 6) | 1 | 1 | 35.256 | 0.716 |" in lines
    assert "| SD3-Medium ADM (paper, table 2) | 4 | 4 | 34.908 |  |" in lines
    assert len(paper) == 14
    assert select_rows({"accuracy": 1.0, "lpips_random": 1.0}, OF_THE_PAPER) == []


OTHERS = (("clip_model", "ViT-B-32"), ("clip_prefix", ""), ("lpips_size", 256), ("lpips_net", "vgg"))


@pytest.mark.parametrize("name, value", OTHERS)
def test_the_papers_numbers_do_not_stand_beside_those_of_another_model(name, value):
    args = argparse.Namespace(**{**vars(OF_THE_PAPER), name: value})
    measured = {"clip": 35.0, "lpips": 0.7}
    metric = name.partition("_")[0]
    other = {"clip": "lpips", "lpips": "clip"}[metric]
    rows = select_rows(measured, args)
    assert rows
    assert all(metric not in row and other in row for row in rows)


def test_a_table_has_the_columns_of_all_rows():
    """A system with one sample a prompt has no variety, and may be the first."""
    one = {"system": "one", "nfe": None, "accuracy": 0.5, "ci": {}}
    many = {"system": "many", "nfe": 1, "accuracy": 0.75, "tv": 0.25, "tv_of": {"size": 0.25}, "ci": {}}
    for rows in ([one, many], [many, one]):
        lines = format_table(rows).splitlines()
        assert lines[0] == "| system | nfe | accuracy | tv | tv_of size |"
        assert "| one |  | 0.500 |  |  |" in lines
        assert "| many | 1 | 0.750 | 0.250 | 0.25 |" in lines


@pytest.mark.parametrize("reference, other, mean", (("many", "one", -1), ("one", "many", 1)))
def test_differences_are_of_what_all_systems_have(monkeypatch, reference, other, mean):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    values = {"many": {"tv": np.ones(4), "accuracy": np.ones(4)}, "one": {"accuracy": np.zeros(4)}}
    plots.save_differences(values, reference, "x")
    [axes] = figures[0].axes
    assert axes.get_title() == plots.write_title("accuracy")
    assert axes.get_ylabel().startswith(f"{other} - {reference}")
    assert axes.get_legend().get_texts()[0].get_text().startswith(f"mean {mean} ")


def test_the_papers_vbench_totals_follow_from_their_parts():
    entries = read_table(VIDEOS)
    assert len(entries) == 4
    for _, scores in entries:
        assert scores["total"] == pytest.approx((4 * scores["quality"] + scores["semantic"]) / 5, abs=0.01)


def test_vbenchs_summary():
    best = {name: high for name, (_, high, _) in (QUALITY | SEMANTIC).items()}
    worst = {name: low for name, (low, _, _) in (QUALITY | SEMANTIC).items()}
    assert summarise(best) == pytest.approx({"total": 100, "quality": 100, "semantic": 100})
    assert summarise(worst) == pytest.approx({"total": 0, "quality": 0, "semantic": 0})
    still = summarise(best | {"dynamic_degree": 0.0})  # which weighs half
    assert still["quality"] == pytest.approx(100 * 6 / 6.5)
    assert still["total"] == pytest.approx((4 * still["quality"] + 100) / 5)
    del best["scene"]
    assert summarise(best) == {}


def test_vbenchs_summary_is_the_leaderboards():
    """CogVideoX-5B's row of it: total, quality and semantic score of these dimensions."""
    dimensions = {
        "subject_consistency": 0.9623,
        "background_consistency": 0.9652,
        "temporal_flickering": 0.9866,
        "motion_smoothness": 0.9692,
        "dynamic_degree": 0.7097,
        "aesthetic_quality": 0.6198,
        "imaging_quality": 0.6290,
        "object_class": 0.8523,
        "multiple_objects": 0.6211,
        "human_action": 0.9940,
        "color": 0.8281,
        "spatial_relationship": 0.6635,
        "scene": 0.5320,
        "appearance_style": 0.2491,
        "temporal_style": 0.2538,
        "overall_consistency": 0.2759,
    }
    expected = {"total": 81.61, "quality": 82.75, "semantic": 77.04}
    assert summarise(dimensions) == pytest.approx(expected, abs=0.01)


def test_vbenchs_table_has_the_papers_rows():
    scores = {"total": 80.5, "quality": 81.0, "semantic": 78.5, "color": 0.9}
    rows = [{"system": "mine", "steps": 8, "nfe": 8, "vbench": scores}]
    first, second = format_table(rows, select_rows(rows[0], OF_THE_PAPER)).split("\n\n")[:2]
    assert "paper" not in first
    lines = second.splitlines()
    assert lines[0].startswith("| VBench | mine | CogVideoX-2b ADM (paper, table 3) |")
    assert lines[2] == "| total, % | 80.500 | 78.584 | 80.036 | 82.067 | 81.226 |"
    assert lines[5] == "| color | 0.9000 |  |  |  |  |"


def test_an_interval_leaves_out_prompts_without_a_number():
    assert np.isfinite(take_interval(np.array([1.0, np.nan, 3.0]))).all()


def test_a_description_names_all_that_scores_depend_on(monkeypatch):
    """Scores that are kept are taken again where it is the same."""
    for kind in (OpenClip, Lpips):
        monkeypatch.setattr(kind, "load", lambda *arguments: None)

    def build(scorer, *arguments, **options):
        scorer.model = torch.nn.Identity()

    monkeypatch.setattr(Lpips, "build", build)
    usual = {"clip_model": "a", "clip_weights": "b", "clip_prefix": "c", "weights_dir": None}
    usual |= {"lpips_net": "alex", "lpips_size": 64}

    def describe(kind, **changed):
        return kind(argparse.Namespace(**usual | changed), [], False).description

    for name in ("clip_model", "clip_weights", "clip_prefix"):
        assert describe(Clip) != describe(Clip, **{name: "x"}), name
    assert describe(Lpips) != describe(Lpips, lpips_size=128)
    assert describe(Lpips) != describe(Lpips, lpips_net="vgg")


def test_clip_is_made_as_its_weights_say(monkeypatch, tmp_path):
    """Activation, mean and standard deviation differ between the weights of one architecture."""
    open_clip = pytest.importorskip("open_clip")
    (tmp_path / "owner/name").mkdir(parents=True)
    (tmp_path / "owner/name/open_clip_model.safetensors").write_text("")
    tag = {"hf_hub": "owner/name/", "mean": (1, 1, 1), "std": (2, 2, 2), "quick_gelu": True}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *arguments: tag)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda *arguments: None)
    given = {}

    def create(*arguments, **options):
        given.update(options)
        return torch.nn.Identity(), None, None

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    OpenClip.__new__(Clip).load("ViT-B-32", "x", str(tmp_path))
    assert given["force_quick_gelu"]
    assert (given["image_mean"], given["image_std"]) == ((1, 1, 1), (2, 2, 2))
