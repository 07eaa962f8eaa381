"""The world of shapes: its oracle, its prompts, and the prompt lists of this repository."""
import itertools
import os

import numpy as np
import pytest

import helpers
from tiny import shapes


@pytest.fixture(scope="module")
def oracle():
    return shapes.Oracle()


def test_oracle_reads_clean_pictures(oracle):
    attributes, centre = shapes.draw(np.random.default_rng(0), 1500)
    read = oracle.read(shapes.render(attributes, centre))
    assert read["valid"].all()
    for name, values in attributes.items():
        assert (read[name] == values).all(), name
    assert np.abs(np.stack([read["x"], read["y"]], 1) - centre).max() < 0.5


def test_oracle_reads_slightly_noisy_pictures(oracle):
    rng = np.random.default_rng(0)
    attributes, centre = shapes.draw(rng, 300)
    read = oracle.read(shapes.render(attributes, centre) + rng.normal(scale=0.1, size=(300, 3, 32, 32)))
    assert read["valid"].all() and all((read[name] == values).all() for name, values in attributes.items())


def test_oracle_refuses_pictures_of_nothing(oracle):
    rng = np.random.default_rng(0)
    plain = np.repeat(shapes.BACKGROUNDS, 1024, axis=1).reshape(3, 3, 32, 32)
    noise = rng.uniform(-1, 1, size=(50, 3, 32, 32))
    assert not oracle.read(np.concatenate([plain, plain + rng.normal(scale=0.05, size=plain.shape), noise, 0 * noise]))["valid"].any()


def test_oracle_refuses_averages(oracle):
    """The average of two pictures, which is what regression would draw, shows two half-transparent shapes."""
    attributes, centre = shapes.draw(np.random.default_rng(0), 400)
    one, other = shapes.render(attributes, centre).reshape(2, 200, 3, 32, 32)
    apart = np.abs(centre[:200] - centre[200:]).max(1) > 4
    assert oracle.read((one + other)[apart] / 2)["valid"].mean() < 0.02


def test_oracle_refuses_other_sizes(oracle):
    for shape in ((2, 3, 64, 64), (3, 32, 32), (2, 1, 32, 32)):
        with pytest.raises(ValueError, match="the oracle reads pictures of shape"):
            oracle.read(np.zeros(shape))


def test_shapes_have_the_same_area():
    for size, radius in enumerate(shapes.RADII):
        areas = shapes.masks(range(3), [size] * 3, np.full((3, 2), 16.0)).sum((1, 2))
        assert areas == pytest.approx([np.pi * radius**2] * 3, rel=0.02)


def test_shapes_stay_in_the_picture():
    centres = np.array(list(itertools.product(shapes.CENTRES, repeat=2)))
    for shape in range(3):
        mask = shapes.masks([shape] * 4, [1] * 4, centres)
        assert mask.sum((1, 2)) == pytest.approx([np.pi * 64] * 4, rel=0.02)


def every_prompt():
    return [dict(zip(shapes.ATTRIBUTES, values)) for values in itertools.product(*((None, *values) for values in shapes.ATTRIBUTES.values()))]


def test_describe_and_parse_are_inverse():
    prompts = set()
    for attributes in every_prompt():
        prompt = shapes.describe(attributes)
        prompts.add(prompt)
        assert shapes.parse(prompt) == {name: None if value is None else shapes.ATTRIBUTES[name].index(value) for name, value in attributes.items()}
    assert len(prompts) == 336
    assert "a small red circle on a white background" in prompts and "a shape" in prompts


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="'pink'"):
        shapes.parse("a pink circle")


def test_prompts_leave_attributes_out_as_often_as_they_say():
    rng = np.random.default_rng(0)
    attributes, _ = shapes.draw(rng, 4000)
    parsed = [shapes.parse(prompt) for prompt in shapes.prompts_of(attributes, rng)]
    for name, values in attributes.items():
        kept = np.array([p[name] is not None for p in parsed])
        assert kept.mean() == pytest.approx(1 - shapes.DROP, abs=0.03)
        assert all(p[name] == value for p, value, keep in zip(parsed, values, kept) if keep)


def test_prompt_lists_are_disjoint_and_cover_the_world():
    train, tune, evaluation = shapes.split_prompts()
    assert (len(train), len(tune), len(evaluation)) == (208, 64, 64)
    assert sorted(train + tune + evaluation) == sorted(shapes.describe(attributes) for attributes in every_prompt())
    assert shapes.split_prompts() == (train, tune, evaluation)


def test_prompt_files_are_the_lists():
    for name, prompts in zip(("train", "tune", "eval"), shapes.split_prompts()):
        with open(os.path.join(helpers.ROOT, "prompts", f"shapes_{name}.txt")) as file:
            assert file.read().splitlines() == prompts
