"""Which networks learn in which update, from the scripts' own loops; the teacher never does."""
import pytest
import torch
from torch import nn

import adm
import adp
import common
import helpers


@pytest.fixture
def updates(monkeypatch):
    """A list that receives, for every update of a run, (the networks that got a gradient, the networks that changed)."""
    record, networks = [], {}
    run_init, backbone_init, update = common.Run.__init__, common.PixelBackbone.__init__, common.updating

    def init(self, stage, args, student, parts):
        networks.update({name: part for name, part in parts.items() if isinstance(part, nn.Module)})
        networks.update({f"teacher's {name}": part for name, part in student.teacher.pipe.components.items() if isinstance(part, nn.Module)})
        run_init(self, stage, args, student, parts)

    def init_backbone(self, *arguments):
        backbone_init(self, *arguments)
        networks["pixel backbone"] = self.encoder

    def watched(optimizer, module, parts, clip, metrics, norm_name):
        def look(*_):
            learned.update(name for name, net in networks.items() if any(p.grad is not None for p in net.parameters()))
            for name in learned:
                assert metrics.values[norm_name][0] > 1e-6 and all(p.grad is not None for p in networks[name].parameters()), name

        assert not any(p.grad is not None for net in networks.values() for p in net.parameters())  # the last update left none
        before, learned = {name: [p.detach().clone() for p in net.parameters()] for name, net in networks.items()}, set()
        handle = optimizer.register_step_pre_hook(look)
        yield from update(optimizer, module, parts, clip, metrics, norm_name)
        handle.remove()
        changed = {name for name, net in networks.items() if not all(p.equal(old) for p, old in zip(net.parameters(), before[name]))}
        record.append((learned, changed))

    monkeypatch.setattr(common.Run, "__init__", init)
    monkeypatch.setattr(common.PixelBackbone, "__init__", init_backbone)
    monkeypatch.setattr(common, "updating", watched)
    monkeypatch.setattr(common.Run, "save", lambda *_: None)
    return record


def exactly(names):
    return [({name}, {name}) for name in names.split()]


@pytest.mark.parametrize("options, expected", (
    ("", "f G heads  f G heads"),
    ("--steps 4", "f G heads  f G heads"),
    ("--ttur 2", "f heads f G heads  f heads f G heads"),
    ("--warmup 1", "f heads  f G heads"),
    ("--accumulate 3 --ttur 2", "f heads f G heads  f heads f G heads"),
    ("--loss dmd", "f G  f G"),
    ("--loss dmd --ttur 2", "f f G  f f G"),
    ("--no-checkpointing", "f G heads  f G heads")))
def test_adm_updates(adm_arguments, tmp_path, updates, options, expected):
    adm.main([*adm_arguments, "--out", str(tmp_path), *options.split()])
    assert updates == exactly(expected)


@pytest.mark.parametrize("options, expected", (
    ("--warmup 0", "G heads  G heads"),
    ("--warmup 1", "G  G heads"),
    ("--warmup 0 --lambda-pixel 0", "G heads  G heads"),
    ("--warmup 2", "G  G")))
def test_adp_updates(adp_arguments, tmp_path, updates, options, expected):
    adp.main([*adp_arguments, "--out", str(tmp_path), *options.split()])
    assert updates == exactly(expected)


@pytest.mark.parametrize("stage, options", ((adp, "--warmup 0"), (adm, "--steps 2"), (adm, "--loss dmd")), ids=("adp", "adm", "dmd"))
def test_checkpointing_changes_no_loss(request, tmp_path, monkeypatch, stage, options):
    monkeypatch.setattr(common.Run, "save", lambda *_: None)
    arguments = [*request.getfixturevalue(f"{stage.__name__}_arguments"), *options.split()]
    stage.main([*arguments, "--out", str(tmp_path / "with")])
    stage.main([*arguments, "--out", str(tmp_path / "without"), "--no-checkpointing"])
    for one, other in zip(helpers.metrics(tmp_path / "with"), helpers.metrics(tmp_path / "without"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_adp_weighs_its_discriminators(adp_arguments, tmp_path, monkeypatch):
    """0.85 and 0.15, each shared equally by its heads: 3 on the teacher, one for each of SAM's global blocks."""
    seen, hinge = [], adp.hinge_generator
    monkeypatch.setattr(adp, "hinge_generator", lambda fake, weights: seen.append(weights) or hinge(fake, weights))
    monkeypatch.setattr(common.Run, "save", lambda *_: None)
    adp.main([*adp_arguments, "--out", str(tmp_path), "--warmup", "0", "--iterations", "1"])
    assert seen[0].tolist() == pytest.approx([0.85 / 3] * 3 + [0.15 / 2] * 2)


def test_adm_compares_one_step_of_both_scores(adm_arguments, tmp_path, monkeypatch):
    """t is in (dt, T], both scores see the same x_t, and the discriminator sees both results at t - dt."""
    guided, features, calls = common.SDXL.guided, common.SDXL.features, []
    monkeypatch.setattr(common.SDXL, "guided", lambda self, x, t, *rest: calls.append(("real", x, t)) or guided(self, x, t, *rest))
    monkeypatch.setattr(common.SDXL, "features", lambda self, x, t, cond: calls.append(("D", x, t)) or features(self, x, t, cond))
    monkeypatch.setattr(common.Run, "save", lambda *_: None)
    adm.main([*adm_arguments, "--out", str(tmp_path), "--dt", "0.25", "--iterations", "3", "--batch", "4"])
    calls = calls[1:]  # the first features give the heads' sizes
    assert [name for name, *_ in calls] == ["real", "D", "D", "D", "D"] * 3
    times = torch.cat([t for name, _, t in calls if name == "real"])
    assert (times > 250).all() and (times <= 1000).all() and times.unique().numel() == 12
    for i in range(0, 15, 5):
        (_, x_t, t), (_, x_fake, s), (_, x_real, _), (_, near_real, _), (_, near_fake, _) = calls[i : i + 5]
        assert all(call[2].equal(t - 250) for call in calls[i + 1 : i + 5]) and x_fake.requires_grad and not x_real.requires_grad
        assert not x_t.equal(x_real) and not x_fake.equal(x_real)
        for near, x in ((near_real, x_real), (near_fake, x_fake)):
            assert (near - x).std().item() == pytest.approx(0.1, rel=0.2)


def test_dmd_loss_is_half_the_squared_direction(adm_arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(common.Run, "save", lambda *_: None)
    adm.main([*adm_arguments, "--out", str(tmp_path), "--loss", "dmd"])
    for line in helpers.metrics(tmp_path):
        assert line["loss_G"] == pytest.approx(line["dmd_loss"], rel=1e-4)


def test_penalties_add_to_the_discriminators_loss(adm_arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(common.Run, "save", lambda *_: None)
    losses = {}
    for r1, r2 in ((0, 0), (1e6, 0), (0, 1e6), (2e6, 0)):  # a random discriminator is almost flat
        folder = tmp_path / f"{r1}{r2}"
        adm.main([*adm_arguments, "--out", str(folder), "--iterations", "1", "--r1", str(r1), "--r2", str(r2)])
        losses[r1, r2] = helpers.metrics(folder)[0]["loss_D"]
    assert losses[0, 0] < min(losses[1e6, 0], losses[0, 1e6])
    assert losses[2e6, 0] - losses[0, 0] == pytest.approx(2 * (losses[1e6, 0] - losses[0, 0]), rel=0.05)


def test_students_times_all_come_up(adm_arguments, tmp_path, monkeypatch):
    """With 4 steps t' is one of the student's own times, and every one is trained."""
    seen, x0 = [], common.Student.x0
    monkeypatch.setattr(common.Student, "x0", lambda self, net, x, t, cond: (torch.is_grad_enabled() and seen.append(t)) or x0(self, net, x, t, cond))
    monkeypatch.setattr(common.Run, "save", lambda *_: None)
    adm.main([*adm_arguments, "--out", str(tmp_path), "--loss", "dmd", "--steps", "4", "--iterations", "16", "--batch", "1"])
    assert len(seen) == 16 and {t.item() for t in seen} == {1000, 750, 500, 250}


def test_adm_decays_every_learning_rate(adm_arguments, tmp_path):
    """G's step size falls with those of what follows it, so that they end closer to it, not further away."""
    adm.main([*adm_arguments, "--out", str(tmp_path), "--decay", "0.8", "--lr", "1e-4", "--fake-lr", "2e-4", "--head-lr", "4e-4"])
    state = helpers.state(tmp_path / "step_000002")
    rates = {name: state[name]["param_groups"][0]["lr"] for name in ("opt_G", "opt_f", "opt_heads")}
    assert rates == pytest.approx({"opt_G": 1e-4 / 1.6, "opt_f": 2e-4 / 1.6, "opt_heads": 4e-4 / 1.6})


@pytest.mark.parametrize("factor, moves", ((1.0, True), (float("nan"), False), (float("inf"), False)))
def test_a_gradient_that_is_not_finite_makes_no_step(factor, moves):
    net, metrics = nn.Linear(3, 1), common.Means()
    optimizer, before = torch.optim.AdamW(net.parameters(), 0.1, weight_decay=0.0), net.weight.detach().clone()
    for _ in common.updating(optimizer, net, [None], 1.0, metrics, "norm"):
        (factor * net(torch.ones(1, 3))).sum().backward()
    assert net.weight.equal(before) != moves and bool(metrics.means()["norm"].isfinite()) == moves
    assert all(p.grad is None for p in net.parameters())
