"""Which networks learn in which update of an iteration, and from what; the teacher never does."""

import pytest
import torch
from torch import nn

import adm
import adp
import helpers
from tiny import families


def train(stage, method, minimise=None):
    """All iterations of an ADM or ADP -> their metrics, [{name: float}]."""
    lines = []
    for step in range(method.args.iterations):
        stage.iterate(method, step, minimise or stage.minimise)
        metrics = method.log.take()
        lines.append({name: value.item() for name, value in metrics.items()})
    return lines


class Watch:
    """Stands in for a stage's `minimise`, and remembers every update: (the network that it is of, all
    networks that got a gradient, all networks that changed)."""

    def __init__(self, stage, method):
        self.stage = stage
        self.updates = []
        self.networks = {}
        for name in ("G", "f", "heads"):
            if getattr(method, name, None):
                self.networks[name] = getattr(method, name)
        for name, part in method.teacher.pipe.components.items():
            if isinstance(part, nn.Module):
                self.networks[f"teacher's {name}"] = part
        if getattr(method, "backbone", None):
            self.networks["pixel backbone"] = method.backbone.encoder

    def minimise(self, loss_of, batch, net, optimizer, clip):
        assert not self.find_gradients()  # the last update left none
        before = {}
        for name, network in self.networks.items():
            before[name] = [p.detach().clone() for p in network.parameters()]
        learned = []
        handle = optimizer.register_step_pre_hook(lambda *_: learned.extend(self.find_gradients()))
        norm = self.stage.minimise(loss_of, batch, net, optimizer, clip)
        handle.remove()
        assert norm > 1e-6
        trained = [name for name, network in self.networks.items() if network is net]
        self.updates.append((trained, learned, self.find_changes(before)))
        return norm

    def find_gradients(self):
        """The networks with gradients; where one of its parameters has one, all must."""
        found = []
        for name, network in self.networks.items():
            parameters = [p for p in network.parameters() if p.requires_grad or p.grad is not None]
            missing = [p.grad is None for p in parameters]
            if not all(missing):
                assert not any(missing), name
                found.append(name)
        return found

    def find_changes(self, before):
        found = []
        for name, network in self.networks.items():
            if not all(p.equal(old) for p, old in zip(network.parameters(), before[name])):
                found.append(name)
        return found


def watch_updates(stage, words):
    method = helpers.make_method(stage, words)
    watch = Watch(stage, method)
    train(stage, method, watch.minimise)
    return watch.updates


def expect(names):
    """The updates of these networks, each of which alone learns."""
    return [([name], [name], [name]) for name in names.split()]


ADM_UPDATES = (
    ("", "f G heads  f G heads"),
    ("--steps 4", "f G heads  f G heads"),
    ("--ttur 2", "f heads f G heads  f heads f G heads"),
    ("--warmup 1", "f heads  f G heads"),
    ("--accumulate 3 --ttur 2", "f heads f G heads  f heads f G heads"),
    ("--loss secant", "f G heads  f G heads"),
    ("--loss line", "f G  f G"),
    ("--loss dmd", "f G  f G"),
    ("--loss dmd --ttur 2", "f f G  f f G"),
    ("--no-checkpointing", "f G heads  f G heads"),
)
ADP_UPDATES = (
    ("--warmup 0", "G heads  G heads"),
    ("--warmup 1", "G  G heads"),
    ("--warmup 0 --lambda-pixel 0", "G heads  G heads"),
    ("--warmup 2", "G  G"),
)


@pytest.mark.parametrize("options, expected", ADM_UPDATES)
def test_adm_updates(adm_arguments, options, expected):
    assert watch_updates(adm, [*adm_arguments, *options.split()]) == expect(expected)


@pytest.mark.parametrize("options, expected", ADP_UPDATES)
def test_adp_updates(adp_arguments, options, expected):
    assert watch_updates(adp, [*adp_arguments, *options.split()]) == expect(expected)


@pytest.mark.filterwarnings("error:Already found")  # peft's, of a second adapter
@pytest.mark.parametrize("family", families.FAMILIES)
def test_adapters_of_every_family(tmp_path, prompts_file, family):
    """All that is trained has an effect on the output: with several ranks a weight without would be waited
    for. And nothing is said of it."""
    folder = helpers.make_teacher(tmp_path / "teacher", 0, family)
    words = ["--teacher", folder, "--prompts", prompts_file, *helpers.size(family), *helpers.QUICK]
    options = "--fake-lr 1e-4 --lora 2 --steps 1 --iterations 1 --loss dmd"
    method = helpers.make_method(adm, [*words, *options.split()])
    watch = Watch(adm, method)
    del watch.networks[f"teacher's {method.teacher.denoiser_name}"]  # which the adapters are in
    train(adm, method, watch.minimise)
    learned = [learned for _, learned, _ in watch.updates]
    assert learned == [["f"], ["G"]]


@pytest.mark.parametrize("family", ("sdxl", "sd3", "cogvideox", *families.FAMILIES))
def test_every_weight_that_trains_gets_a_gradient(tmp_path, prompts_file, family):
    """DDP would wait for one without; those have no part in the output, and do not train."""
    folder = helpers.make_teacher(tmp_path / "teacher", 0, family)
    words = ["--teacher", folder, "--prompts", prompts_file, *helpers.size(family), *helpers.QUICK]
    method = helpers.make_method(adm, [*words, "--fake-lr", "1e-4", "--loss", "dmd", "--steps", "1"])
    (b,) = method.draw(0, 0)
    method.generate(b)
    method.fake_score_loss(b).backward()
    assert all((p.grad is not None) == p.requires_grad for p in method.f.parameters())


@pytest.mark.parametrize(
    "stage, options",
    (
        (adp, "--warmup 0"),
        (adm, "--steps 2"),
        (adm, "--loss dmd"),
        (adm, "--lora 4 --lr 1e-2 --fake-lr 1e-2"),
    ),
    ids=("adp", "adm", "dmd", "lora"),
)
def test_checkpointing_changes_no_loss(request, stage, options):
    words = [*request.getfixturevalue(f"{stage.__name__}_arguments"), *options.split()]
    with_it = train(stage, helpers.make_method(stage, words))
    without = train(stage, helpers.make_method(stage, [*words, "--no-checkpointing"]))
    for one, other in zip(with_it, without, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_learning_rate_means_the_same_at_every_rank_of_lora(adm_arguments):
    for rank in ("2", "8"):
        method = helpers.make_method(adm, [*adm_arguments, "--lora", rank])
        assert method.G.layers
        assert all(layer.scaling["student"] == 1 for layer in method.G.layers.values())


def test_adp_weighs_its_discriminators(adp_arguments, monkeypatch):
    """0.85 and 0.15, each shared equally by its heads: 3 on the teacher, one for each of SAM's global
    blocks."""
    seen = []
    hinge = adp.hinge_generator

    def watch(fake, weights):
        seen.append(weights)
        return hinge(fake, weights)

    monkeypatch.setattr(adp, "hinge_generator", watch)
    method = helpers.make_method(adp, [*adp_arguments, "--warmup", "0"])
    adp.iterate(method, 0, adp.minimise)
    assert seen[0].tolist() == pytest.approx([0.85 / 3] * 3 + [0.15 / 2] * 2)


def test_adm_compares_one_step_of_both_scores(adm_arguments, monkeypatch):
    """t is in (dt, T], both scores see the same x_t, and the discriminator sees both results at t - dt."""
    words = "--dt 0.25 --iterations 3 --batch 4"
    method = helpers.make_method(adm, [*adm_arguments, *words.split()])
    teacher = method.teacher
    calls = []

    def watch(kind, call):
        def watched(x, t, *rest):
            calls.append((kind, x, t))
            return call(x, t, *rest)

        return watched

    monkeypatch.setattr(teacher, "guided", watch("real", teacher.guided))
    monkeypatch.setattr(teacher, "features", watch("D", teacher.features))
    train(adm, method)

    assert [kind for kind, *_ in calls] == ["real", "D", "D", "D", "D"] * 3
    times = torch.cat([t for kind, _, t in calls if kind == "real"])
    assert (times > 250).all()
    assert (times <= 1000).all()
    assert times.unique().numel() == 12
    for i in range(0, 15, 5):
        _, x_t, t = calls[i]
        assert all(s.equal(t - 250) for _, _, s in calls[i + 1 : i + 5])
        x_fake, x_real, near_real, near_fake = (x for _, x, _ in calls[i + 1 : i + 5])
        assert x_fake.requires_grad
        assert not x_real.requires_grad
        assert not x_t.equal(x_real)
        assert not x_fake.equal(x_real)
        for near, x in ((near_real, x_real), (near_fake, x_fake)):
            assert (near - x).std().item() == pytest.approx(0.1, rel=0.2)


def test_the_spread_of_the_students_samples_is_logged(adm_arguments):
    method = helpers.make_method(adm, [*adm_arguments, "--loss", "dmd"])
    (b,) = method.draw(0, 0)
    method.generate(b)
    method.dmd_loss(b)
    spreads = [x.std().item() for x in b.x0_hat]
    assert method.log.take()["std"].item() == pytest.approx(sum(spreads) / len(spreads), rel=1e-4)


def test_dmd_loss_is_half_the_squared_direction(adm_arguments):
    for line in train(adm, helpers.make_method(adm, [*adm_arguments, "--loss", "dmd"])):
        assert line["loss_G"] == pytest.approx(line["dmd_loss"], rel=1e-4)


def test_penalties_add_to_the_discriminators_loss(adm_arguments):
    losses = {}
    for r1, r2 in ((0, 0), (1e6, 0), (0, 1e6), (2e6, 0)):  # a random discriminator is almost flat
        words = f"--iterations 1 --r1 {r1} --r2 {r2}"
        (line,) = train(adm, helpers.make_method(adm, [*adm_arguments, *words.split()]))
        losses[r1, r2] = line["loss_D"]
    assert losses[0, 0] < min(losses[1e6, 0], losses[0, 1e6])
    once = losses[1e6, 0] - losses[0, 0]
    assert losses[2e6, 0] - losses[0, 0] == pytest.approx(2 * once, rel=0.05)


def test_students_times_all_come_up(adm_arguments, monkeypatch):
    """With 4 steps t' is one of the student's own times, and every one is trained."""
    words = "--loss dmd --steps 4 --iterations 16 --batch 1"
    method = helpers.make_method(adm, [*adm_arguments, *words.split()])
    seen = []
    x0 = method.student.x0

    def watch(net, x_t, t, cond):
        if torch.is_grad_enabled():
            seen.append(t.item())
        return x0(net, x_t, t, cond)

    monkeypatch.setattr(method.student, "x0", watch)
    train(adm, method)
    assert len(seen) == 16
    assert set(seen) == {1000, 750, 500, 250}


def test_adm_decays_every_learning_rate(adm_arguments, tmp_path):
    """G's step size falls with those of what follows it, so that they end closer to it, not further away."""
    words = "--decay 0.8 --lr 1e-4 --fake-lr 2e-4 --head-lr 4e-4"
    adm.main([*adm_arguments, "--out", str(tmp_path), *words.split()])
    state = helpers.read_state(tmp_path / "step_000002")
    rates = {name: state[name]["param_groups"][0]["lr"] for name in ("opt_G", "opt_f", "opt_heads")}
    assert rates == pytest.approx({"opt_G": 1e-4 / 1.6, "opt_f": 2e-4 / 1.6, "opt_heads": 4e-4 / 1.6})


@pytest.mark.parametrize("stage", (adm, adp))
@pytest.mark.parametrize("factor, moves", ((1.0, True), (float("nan"), False), (float("inf"), False)))
def test_a_gradient_that_is_not_finite_makes_no_step(stage, factor, moves):
    net = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(net.parameters(), 0.1, weight_decay=0.0)
    before = net.weight.detach().clone()

    def compute_loss(x):
        return (factor * net(x)).sum()

    norm = stage.minimise(compute_loss, [torch.ones(1, 3)], net, optimizer, 1.0)
    assert net.weight.equal(before) != moves
    assert bool(norm.isfinite()) == moves
    assert all(p.grad is None for p in net.parameters())


def test_micro_batches_keep_no_graph_of_their_samples(adm_arguments):
    """Line 3 makes each anew: --accumulate is to cost no memory."""
    words = ["--accumulate", "2", "--steps", "1", "--loss", "dmd"]
    method = helpers.make_method(adm, [*adm_arguments, *words])
    kept = []

    def minimise(loss_of, batch, *rest):
        kept.append([b.x0_hat.requires_grad for b in batch])
        return torch.zeros(())

    adm.iterate(method, 0, minimise)
    assert kept[0] == [False, False]
