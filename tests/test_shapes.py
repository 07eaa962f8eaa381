"""The world of shapes: its oracles, its prompts and their lists, and the training of its teachers."""

import itertools
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import helpers
from tiny import shapes, train


@pytest.fixture(scope="module")
def oracle():
    return shapes.Oracle()


@pytest.fixture(scope="module")
def video_oracle():
    return shapes.VideoOracle()


@pytest.fixture(scope="module")
def videos():
    """(attributes, centre, videos) of 120 scenes."""
    attributes, centre = shapes.draw(np.random.default_rng(0), 120, shapes.VIDEO)
    return attributes, centre, shapes.render_video(attributes, centre)


def find_offset(read, centre):
    """How far the centres that an oracle read are from the true ones, at most, in pixels."""
    return np.abs(np.stack([read["x"], read["y"]], 1) - centre).max()


# Oracles --------------------------------------------------------------------------------------------------


def test_oracle_reads_clean_images(oracle):
    attributes, centre = shapes.draw(np.random.default_rng(0), 1500)
    read = oracle.read(shapes.render(attributes, centre))
    assert read["valid"].all()
    for name, values in attributes.items():
        assert (read[name] == values).all(), name
    assert find_offset(read, centre) < 0.5


def test_oracle_reads_slightly_noisy_images(oracle):
    rng = np.random.default_rng(0)
    attributes, centre = shapes.draw(rng, 300)
    noise = rng.normal(scale=0.1, size=(300, 3, 32, 32))
    read = oracle.read(shapes.render(attributes, centre) + noise)
    assert read["valid"].all()
    for name, values in attributes.items():
        assert (read[name] == values).all(), name


def test_oracle_refuses_images_of_nothing(oracle):
    rng = np.random.default_rng(0)
    plain = np.repeat(shapes.BACKGROUNDS, 1024, axis=1).reshape(3, 3, 32, 32)
    noisy = plain + rng.normal(scale=0.05, size=plain.shape)
    noise = rng.uniform(-1, 1, size=(50, 3, 32, 32))
    images = np.concatenate([plain, noisy, noise, 0 * noise])
    assert not oracle.read(images)["valid"].any()


def test_oracle_refuses_averages(oracle):
    """The average of two images, which is what regression would draw, shows two half-transparent shapes."""
    attributes, centre = shapes.draw(np.random.default_rng(0), 400)
    one, other = shapes.render(attributes, centre).reshape(2, 200, 3, 32, 32)
    apart = np.abs(centre[:200] - centre[200:]).max(1) > 4
    average = (one + other)[apart] / 2
    assert oracle.read(average)["valid"].mean() < 0.02


def test_oracle_refuses_other_sizes(oracle):
    for shape in ((2, 3, 64, 64), (3, 32, 32), (2, 1, 32, 32)):
        with pytest.raises(ValueError, match="the oracle reads pictures of shape"):
            oracle.read(np.zeros(shape))


def test_shapes_have_the_same_area():
    centre = np.full((3, 2), 16.0)
    for size, radius in enumerate(shapes.RADII):
        areas = shapes.render_masks(range(3), [size] * 3, centre).sum((1, 2))
        assert areas == pytest.approx([np.pi * radius**2] * 3, rel=0.02)


def test_shapes_stay_in_the_image():
    centres = np.array(list(itertools.product(shapes.CENTRES, repeat=2)))
    for shape in range(3):
        areas = shapes.render_masks([shape] * 4, [1] * 4, centres).sum((1, 2))
        assert areas == pytest.approx([np.pi * 64] * 4, rel=0.02)


def test_video_oracle_reads_clean_and_slightly_noisy_videos(video_oracle, videos):
    attributes, centre, clean = videos
    for noise in (0, np.random.default_rng(0).normal(scale=0.07, size=clean.shape)):
        read = video_oracle.read(clean + noise)
        assert read["valid"].all()
        for name, values in attributes.items():
            assert (read[name] == values).all(), name
        assert find_offset(read, centre) < 0.5


def test_video_oracle_reads_reversed_motion_as_the_opposite(video_oracle, videos):
    attributes, _, clean = videos
    read = video_oracle.read(clean[:, :, ::-1])
    assert read["valid"].all()
    assert (read["motion"] == attributes["motion"] ^ 1).all()


def test_video_oracle_refuses_what_is_no_moving_shape(video_oracle, videos):
    attributes, centre, clean = videos
    rng = np.random.default_rng(0)
    middle = shapes.FRAMES // 2
    other_colour = {"colour": (attributes["colour"] + 1) % 6}
    other_axis = {"motion": attributes["motion"] ^ 2}
    other = shapes.render_video(attributes | other_colour, centre)
    turned = shapes.render_video(attributes | other_axis, centre)  # the same middle frame
    order = np.array([0, 3, 6, 1, 4, 7, 2, 5, 8])
    start = clean[:, :, :middle]
    refused = {
        "noise": rng.uniform(-1, 1, size=clean.shape),
        "a still shape": np.repeat(clean[:, :, [middle]], shapes.FRAMES, axis=2),
        "another colour half-way": np.concatenate([start, other[:, :, middle:]], axis=2),
        "another direction half-way": np.concatenate([start, turned[:, :, middle:]], axis=2),
        "shuffled frames": clean[:, :, order],
        "half the speed": np.repeat(clean[:, :, 2:7], 2, axis=2)[:, :, :9],
        "two shapes": (clean + np.roll(clean, 1, axis=0)) / 2,
    }
    for name, video in refused.items():
        assert video_oracle.read(video)["valid"].mean() < 0.02, name
    with pytest.raises(ValueError, match="the oracle reads videos of shape"):
        video_oracle.read(clean[:, :, :5])


def test_moving_shapes_stay_in_the_image():
    attributes, centre = shapes.draw(np.random.default_rng(0), 2000, shapes.VIDEO)
    path = shapes.trace_path(attributes, centre)
    assert path.min() >= shapes.CENTRES[0] and path.max() <= shapes.CENTRES[1]
    assert path[:, shapes.FRAMES // 2] == pytest.approx(centre)
    assert path[:, 1] - path[:, 0] == pytest.approx(shapes.STEPS[attributes["motion"]])


# Prompts --------------------------------------------------------------------------------------------------


def list_attributes(world):
    """All that a prompt of this world may say: [{name: value or None}]."""
    choices = [(None, *values) for values in world.values()]
    return [dict(zip(world, chosen)) for chosen in itertools.product(*choices)]


@pytest.mark.parametrize(
    "world, count, examples",
    [
        (shapes.ATTRIBUTES, 336, ["a small red circle on a white background", "a shape"]),
        (shapes.VIDEO, 1680, ["a small red circle moving left on a white background", "a shape moving"]),
    ],
)
def test_describe_and_parse_are_inverse(world, count, examples):
    prompts = set()
    for attributes in list_attributes(world):
        prompt = shapes.describe(attributes)
        prompts.add(prompt)
        for name, i in shapes.parse(prompt).items():
            assert attributes[name] == (None if i is None else world[name][i])
        assert list(shapes.parse(prompt)) == list(attributes)
    assert len(prompts) == count
    assert prompts.issuperset(examples)


@pytest.mark.parametrize(
    "prompt, word",
    [("a pink circle", "pink"), ("a circle left", "left"), ("a circle moving there", "there")],
)
def test_unknown_words_are_refused(prompt, word):
    with pytest.raises(ValueError, match=repr(word)):
        shapes.parse(prompt)


def test_a_prompt_with_two_values_of_an_attribute_is_refused():
    with pytest.raises(ValueError, match="two values of colour"):
        shapes.parse("a red green circle")


@pytest.mark.parametrize("world", [shapes.ATTRIBUTES, shapes.VIDEO])
def test_prompts_leave_attributes_out_as_often_as_they_say(world):
    rng = np.random.default_rng(0)
    attributes, _ = shapes.draw(rng, 4000, world)
    parsed = [shapes.parse(prompt) for prompt in shapes.draw_prompts(attributes, rng)]
    for name, values in attributes.items():
        told = [prompt[name] for prompt in parsed]
        kept = np.array([value is not None for value in told])
        assert kept.mean() == pytest.approx(1 - shapes.DROP, abs=0.03)
        for value, true in zip(told, values):
            assert value in (None, true)


def test_prompt_lists_are_disjoint_and_cover_the_world():
    train, tune, evaluation = shapes.split_prompts()
    assert (len(train), len(tune), len(evaluation)) == (208, 64, 64)
    everything = [shapes.describe(attributes) for attributes in list_attributes(shapes.ATTRIBUTES)]
    assert sorted(train + tune + evaluation) == sorted(everything)
    assert shapes.split_prompts() == (train, tune, evaluation)


def test_motion_prompt_lists_are_disjoint():
    train, tune, evaluation = shapes.split_motion_prompts()
    assert (len(train), len(tune), len(evaluation)) == (320, 32, 32)
    assert len({*train, *tune, *evaluation}) == 384
    for prompt in train + tune + evaluation:
        assert "motion" in shapes.parse(prompt)


@pytest.mark.parametrize(
    "world, lists",
    [(shapes.ATTRIBUTES, shapes.split_prompts()), (shapes.VIDEO, shapes.split_motion_prompts())],
)
def test_the_evaluation_list_is_fair(world, lists):
    parsed = [shapes.parse(prompt) for prompt in lists[2]]
    for name, values in world.items():
        said = [prompt[name] for prompt in parsed]
        counts = [said.count(i) for i in range(len(values))]
        assert said.count(None) >= len(said) * 3 / 16, name
        assert max(counts) <= 1.6 * min(counts), name


@pytest.mark.parametrize(
    "kind, lists",
    [("shapes", shapes.split_prompts()), ("motion", shapes.split_motion_prompts())],
)
def test_prompt_files_are_the_lists(kind, lists):
    for name, prompts in zip(("train", "tune", "eval"), lists):
        with open(os.path.join(helpers.ROOT, "prompts", f"{kind}_{name}.txt")) as file:
            assert file.read().splitlines() == prompts


# The tiny teachers' training ------------------------------------------------------------------------------


@torch.no_grad()
def test_a_counted_token_weighs_as_much_as_all_it_stands_for():
    torch.manual_seed(0)
    transformer = train.build_sd3().transformer.eval()
    x = torch.randn(2, 4, 8, 8)
    text = torch.randn(2, 16, 128)
    pooled = torch.randn(2, 128)
    t = torch.tensor([300.0, 900.0])
    zero = torch.zeros(2, 1, 128)
    all_zeros = torch.cat([text, zero.expand(2, train.ZEROS, 128)], 1)
    one_zero = torch.cat([text, zero], 1)

    full = transformer(x, all_zeros, pooled, t).sample
    uncounted = transformer(x, one_zero, pooled, t).sample
    transformer.set_attn_processor(train.CountLastToken(train.ZEROS))
    counted = transformer(x, one_zero, pooled, t).sample
    assert (counted - full).abs().max() < 1e-5
    assert (uncounted - full).abs().max() > 1e-2


@torch.no_grad()
def test_the_borrowed_autoencoder_only_moves_its_latents():
    vae = train.build_sd3().vae
    train.borrow(vae)
    original = train.load_shipped_vae()
    attributes, centre = shapes.draw(np.random.default_rng(0), 64)
    latents = train.encode(vae, attributes, centre)
    before = train.encode(original, attributes, centre)
    torch.testing.assert_close(latents, before + vae.config.shift_factor, atol=1e-4, rtol=1e-4)
    decoded = vae.decode(latents).sample
    torch.testing.assert_close(decoded, original.decode(before).sample, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_inflated_autoencoder_starts_as_that_of_images(videos):
    _, _, clean = videos
    clean = torch.from_numpy(clean[:8])
    torch.manual_seed(0)
    vae = train.build_cogvideox().vae
    train.inflate(vae)
    decoded = vae.decode(vae.encode(clean).latent_dist.mean).sample
    assert F.mse_loss(decoded[:, :, 0], clean[:, :, 0]) < 0.02
    assert F.mse_loss(decoded, clean) < 0.04


@torch.no_grad()
def test_whitening_changes_latents_only():
    """Folded into convolutions without a border, it is undone exactly."""
    torch.manual_seed(0)
    writing = torch.nn.Conv2d(3, 8, 3)
    reading = torch.nn.Conv2d(4, 5, 1)
    x = torch.randn(16, 3, 18, 18)
    latents = writing(x)[:, :4]
    before = reading(latents)
    train.whiten(latents.transpose(0, 1).flatten(1), 0.5, writing, [reading])
    latents = writing(x)[:, :4]
    torch.testing.assert_close(reading(latents), before, atol=1e-4, rtol=1e-4)
    white = latents.transpose(0, 1).flatten(1) * 0.5
    torch.testing.assert_close(white.cov(), torch.eye(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(white.mean(1), torch.zeros(4), atol=1e-3, rtol=0)


@pytest.mark.parametrize("build", [train.build_sdxl, train.build_sd3, train.build_cogvideox])
def test_noisy_latents_and_targets_give_back_the_clean_ones(build):
    scheduler = build().scheduler
    x_0, noise = torch.randn(2, 64, 4, 8, 8)
    x_t, timestep, target = train.diffuse(scheduler, x_0, noise)
    if hasattr(scheduler, "alphas_cumprod"):
        abar = scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        alpha = abar.sqrt()
        sigma = (1 - abar).sqrt()
        if scheduler.config.prediction_type == "v_prediction":
            v = target
        else:
            v = (target - sigma * x_t) / alpha
        found = alpha * x_t - sigma * v
    else:
        found = x_t - timestep.view(-1, 1, 1, 1) / 1000 * target
    torch.testing.assert_close(found.float(), x_0, atol=1e-3, rtol=1e-3)
