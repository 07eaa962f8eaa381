"""evaluate.py's numbers, on pictures of which they are known."""
import numpy as np
import pytest
import torch

import evaluate
from tiny import shapes


def measured(prompts, K, choose, reference=None):
    """The oracle's metrics of K clean pictures a prompt; choose(rng, n) picks what a prompt leaves open, by attribute."""
    rng, metric = np.random.default_rng(0), evaluate.Oracle(None, prompts)
    for prompt in prompts:
        attributes, centre = shapes.draw(rng, K)
        attributes |= choose(rng, K)
        attributes |= {name: np.full(K, value) for name, value in shapes.parse(prompt).items() if value is not None}
        metric.update(torch.from_numpy(shapes.render(attributes, centre))[None], [prompt])
    return metric, metric.result(reference or metric)


def test_perfect_pictures():
    _, result = measured(shapes.split_prompts()[2], 24, lambda rng, n: {})
    assert result["accuracy"] == result["valid"] == 1 and set(result["accuracy_of"].values()) == {1}
    assert set(result["tv"]) == set(shapes.ATTRIBUTES) and max(result["tv"].values()) < 0.06 and result["tv"] == result["tv_uniform"]
    assert result["position_std"] == pytest.approx(12 / np.sqrt(12), rel=0.03)  # uniform over 12 pixels


def test_a_mode_that_collapsed():
    """All open colours are red: five sixths of the mass are in the wrong place, to the reference and to uniform."""
    prompts = ["a small circle on a black background", "a large square on a white background"]
    reference, _ = measured(prompts, 200, lambda rng, n: {})
    _, result = measured(prompts, 200, lambda rng, n: {"colour": np.zeros(n, int)}, reference)
    assert result["accuracy"] == 1 and set(result["tv"]) == {"colour"}
    assert result["tv_uniform"]["colour"] == pytest.approx(5 / 6) and result["tv"]["colour"] == pytest.approx(5 / 6, abs=0.03)


def test_wrong_pictures():
    """Half of the pictures have another colour than their prompt says, and nothing else is wrong."""
    prompts = ["a small red circle", "a small green circle"]
    metric = evaluate.Oracle(None, prompts)
    attributes, centre = shapes.draw(np.random.default_rng(0), 40)
    attributes |= {"size": np.zeros(40, int), "shape": np.zeros(40, int), "colour": np.ones(40, int)}
    pixels = torch.from_numpy(shapes.render(attributes, centre)).unflatten(0, (2, 20))
    metric.update(pixels, prompts)
    result = metric.result(metric)
    assert result["accuracy"] == 0.5 and result["accuracy_of"] == {"size": 1, "shape": 1, "colour": 0.5} and result["valid"] == 1
    pairs = [(one - other).square().mean().sqrt() for row in pixels for i, one in enumerate(row) for other in row[:i]]
    assert result["pairwise_distance"].item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-4)
