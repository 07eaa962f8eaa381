"""Metrics against counts by hand, and closed forms; pictures that depend on prompt and seed alone."""
import json

import numpy as np
import pytest
import torch

import common
import evaluate
import sample
from tiny import shapes


def pictures(scenes):
    """[(size, colour, shape, background) as indices] -> pixels [n, 3, 32, 32], all centred."""
    attributes = {name: np.array([scene[i] for scene in scenes]) for i, name in enumerate(shapes.ATTRIBUTES)}
    return torch.from_numpy(shapes.render(attributes, np.full((len(scenes), 2), 16.0)))


def scores(prompts, scenes):
    """The oracle's scores of P prompts with K scenes each."""
    return [evaluate.Oracle(None, prompts, False).score(torch.stack([pictures(group) for group in scenes]), prompts)]


def oracle(scores, reference=None):
    return evaluate.Oracle(None, [], False).result(scores, reference or scores)


def test_oracle_counts_by_hand():
    prompts = ["a small red circle on a black background", "a red shape"]
    red, blue = 0, 2
    result = oracle(scores(prompts, [[(0, red, 0, 0), (0, blue, 0, 0)], [(0, red, 0, 0), (0, red, 1, 1)]]))
    assert result["accuracy"] == 3 / 4 and result["valid"] == 1 and result["accuracy_of"]["colour"] == 3 / 4 and result["accuracy_of"]["shape"] == 1
    assert result["tv"]["size"] == pytest.approx(1 / 2)  # two small ones where the size is open, uniform would be half and half
    assert result["tv"]["shape"] == pytest.approx(0.5 * (1 / 6 + 1 / 6 + 1 / 3))
    assert result["position_std"] == 0


def test_oracle_counts_an_invalid_picture_as_wrong():
    result = oracle([evaluate.Oracle(None, [], False).score(torch.zeros(1, 2, 3, 32, 32), ["a shape"])])
    assert result["accuracy"] == 0 and result["valid"] == 0 and result["accuracy_of"] == {}  # the prompt names nothing


def test_total_variation_is_to_the_reference():
    teacher = scores(["a shape"], [[(0, 0, 0, 0), (0, 1, 0, 0)]])
    student = scores(["a shape"], [[(0, 0, 0, 0), (1, 0, 0, 0)]])
    assert oracle(student, teacher)["tv"] == pytest.approx({"size": 0.5, "colour": 0.5, "shape": 0, "background": 0})
    assert oracle(teacher)["tv"] == oracle(teacher, student)["tv_uniform"]


def test_spread_of_perfect_samples():
    rng = np.random.default_rng(0)
    attributes, centre = shapes.draw(rng, 600)
    metric = evaluate.Oracle(None, ["a shape"], False)
    pixels = torch.from_numpy(shapes.render(attributes, centre))[None]
    result = oracle([metric.score(pixels, ["a shape"])])
    assert result["accuracy"] == 1
    assert result["position_std"] == pytest.approx(12 / np.sqrt(12), abs=0.1)  # uniform over 12 pixels
    pairs = [float(((pixels[0, i] - pixels[0, j]) ** 2).mean().sqrt()) for i in range(20) for j in range(i)]
    assert float(oracle([metric.score(pixels[:, :20], ["a shape"])])["pairwise_distance"]) == pytest.approx(np.mean(pairs), rel=1e-3)


def test_a_picture_depends_on_its_number_and_seed_alone(teacher):
    system = sample.System(teacher, steps=2, guidance=3.0)
    prompts = ["a red shape", "a small circle", "a square"]
    together = system.pictures(prompts, range(3), [5])
    alone = torch.cat([system.pictures([prompt], [i], [5]) for i, prompt in enumerate(prompts)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert (system.pictures(prompts, range(3), [6]) - together).abs().max() > 0.1


@pytest.mark.parametrize("arguments, sentence", [
    (["--metrics", "beauty"], "no metric 'beauty'"),
    (["--metrics", "lpips", "--seeds", "1"], "--seeds 2"),
    (["--student", "x=/nowhere"], "no checkpoint"),
])
def test_wrong_requests(teacher_folder, tmp_path, arguments, sentence):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red shape\n")
    with pytest.raises(common.UserError, match=sentence):
        evaluate.main(["--teacher", teacher_folder, "--prompts", str(prompts), *arguments])


def test_the_oracle_refuses_prompts_of_another_world(teacher_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a lighthouse in a storm\n")
    with pytest.raises(common.UserError, match="lighthouse"):
        evaluate.main(["--teacher", teacher_folder, "--prompts", str(prompts)])


def test_the_summary_of_several_seeds(tmp_path, capsys):
    """tiny/reproduce.py: mean and standard deviation by hand; a row a system, in the reports' order."""
    from tiny import reproduce

    for seed, accuracy in enumerate((0.7, 0.8)):
        row = {"steps": 1, "prompts": 64, "accuracy": accuracy, "tv": {"shape": 0.1 * seed}, "tv_uniform": {"shape": 0.0}}
        report = {"rows": [{"system": "teacher", **row}, {"system": "dmdx", **row, "accuracy": 0.5}], "seed": seed, "minutes": 12.0 + seed}
        (tmp_path / f"{seed}.json").write_text(json.dumps(report))
    reproduce.main([str(tmp_path / "0.json"), str(tmp_path / "1.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| system | steps | accuracy | tv shape |"
    assert lines[2] == "| teacher | 1.000 | 0.750 ± 0.071 | 0.050 ± 0.071 |" and lines[3] == "| dmdx | 1.000 | 0.500 | 0.050 ± 0.071 |"
    assert lines[-1] == "seeds [0, 1], minutes 12.0, 13.0"


def test_video_is_read_by_the_video_oracle():
    attributes, centre = shapes.draw(np.random.default_rng(0), 4, shapes.VIDEO)
    attributes["motion"][:] = (0, 0, 1, 1)
    attributes["colour"][:] = 2
    pixels = torch.from_numpy(shapes.render_video(attributes, centre)).view(2, 2, 3, 9, 32, 32)
    prompts = ["a blue shape moving left", "a blue shape moving left"]
    metric = evaluate.Oracle(None, prompts, True)
    result = metric.result(*[[metric.score(pixels, prompts)]] * 2)
    assert result["valid"] == 1 and result["accuracy"] == 0.5 and result["accuracy_of"] == {"colour": 1, "motion": 0.5}
    assert set(result["tv"]) == {"size", "shape", "background"}
