"""tools/variants.py: each variant changes what it says, and its command runs."""

import collections

import pytest
import torch

import adm
import helpers
from support.errors import UserError
from tools import variants

ALGORITHM_1 = adm.ADM


def make_variant(monkeypatch, name, words):
    monkeypatch.setattr(adm, "ADM", variants.VARIANTS[name])
    return helpers.make_method(adm, words)


def draw_batch(method):
    """A micro-batch after line 1, with a graph."""
    [b] = method.draw(0, 0)
    method.generate(b)
    return b


@pytest.mark.parametrize("name, taps", [("taps", 5), ("product", 3), ("taps-product", 5), ("rows", 3)])
def test_every_map_has_a_head_and_its_gradient(adm_arguments, monkeypatch, name, taps):
    """The teacher's U-Net has two blocks on either side."""
    method = make_variant(monkeypatch, name, adm_arguments)
    assert len(method.heads.heads) == taps
    b = draw_batch(method)
    method.generator_loss(b).backward()
    method.discriminator_loss(b).backward()
    for parameter in method.heads.parameters():
        assert parameter.grad.norm() > 0


def test_the_product_is_linear_in_x(adm_arguments, monkeypatch):
    method = make_variant(monkeypatch, "product", adm_arguments)
    b = draw_batch(method)
    method.generator_loss(b)
    *maps, x = b.maps_fake
    assert x.equal(b.x_fake)
    at_0, at_x, at_2x = (method.heads([*maps, scale * x]) for scale in (0, 1, 2))
    assert (at_x - at_0).abs().min() > 1e-6
    torch.testing.assert_close(at_2x - at_0, 2 * (at_x - at_0))
    other = [torch.zeros_like(m) for m in b.maps_fake]
    together = method.heads(b.maps_fake, other)  # rows in one pass
    torch.testing.assert_close(together, (at_x, method.heads(other)))


def test_rows_weigh_alike(adm_arguments, monkeypatch):
    method = make_variant(monkeypatch, "rows", adm_arguments)
    x_fake = method.step_ode(draw_batch(method))
    x_fake.retain_grad()  # as the hooks leave it
    weights = torch.arange(1.0, 1 + len(x_fake)).view(-1, 1, 1, 1)
    (weights * x_fake.square()).sum().backward()
    expected = torch.full((len(x_fake),), 1 / x_fake.numel())
    torch.testing.assert_close(x_fake.grad.abs().mean((1, 2, 3)), expected)


def test_four_times_a_sample(adm_arguments, monkeypatch):
    method = make_variant(monkeypatch, "times", adm_arguments)
    b = draw_batch(method)
    method.generator_loss(b)
    x0_hat = b.x0_hat
    times = []

    def note_time(self, b):
        assert b.x0_hat is x0_hat
        times.append(b.s)
        return torch.tensor(float(len(times)))

    monkeypatch.setattr(ALGORITHM_1, "discriminator_loss", note_time)
    assert method.discriminator_loss(b) == 2.5
    assert len(set(torch.cat(times).tolist())) == 4 * len(b.prompts)


def test_the_memory_is_of_10_20_and_30_updates_ago(monkeypatch):
    method = object.__new__(variants.Memory)
    method.memory = collections.deque(maxlen=30)
    monkeypatch.setattr(ALGORITHM_1, "discriminator_loss", lambda self, b: b.k)
    losses = []
    for k in range(1, 42):
        losses.append(method.discriminator_loss(adm.MicroBatch(rng=None, prompts=[], k=k)))
    assert losses[:10] == list(range(1, 11))
    assert losses[10] == (11 + 1) / 2
    assert losses[40] == (41 + 31 + 21 + 11) / 4
    assert len(method.memory) == 30


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_the_command_trains(adm_arguments, tmp_path, monkeypatch, name):
    monkeypatch.setattr(adm, "ADM", ALGORITHM_1)  # put back after it
    out = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["variants.py", name, *adm_arguments, "--out", str(out)])
    variants.main()
    assert adm.ADM is variants.VARIANTS[name]
    assert (out / "latest").exists()


def test_what_cannot_be_had_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["variants.py", "tap"])
    with pytest.raises(UserError, match="give one of taps, product"):
        variants.main()
    for family, name, message in (("sd3", "taps", "has none"), ("cogvideox", "product", "not video")):
        folder = helpers.make_teacher(tmp_path / family, 0, family)
        words = ["--teacher", folder, "--prompts", "none.txt"]
        args = helpers.training_arguments("adm", words)
        teacher = helpers.load_teacher(folder, torch.device("cpu"))
        with pytest.raises(UserError, match=message):
            variants.VARIANTS[name](args, teacher, [])


def test_only_algorithm_1_has_variants(adm_arguments, monkeypatch):
    with pytest.raises(UserError, match="of --loss adm, not of --loss secant"):
        make_variant(monkeypatch, "times", [*adm_arguments, "--loss", "secant"])


@pytest.mark.parametrize("name", ["taps", "product"])
def test_a_variant_leaves_its_teacher_as_it_is(adm_arguments, monkeypatch, teacher, name):
    """The planner makes several from one teacher."""
    args = make_variant(monkeypatch, name, adm_arguments).args
    heads = [variants.VARIANTS[name](args, teacher, ["a circle"]).heads for _ in range(2)]
    assert len(teacher.taps) == 3
    assert len(heads[0].heads) == len(heads[1].heads)
