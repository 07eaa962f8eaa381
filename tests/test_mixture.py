"""The Gaussian mixture: its closed forms, its exact masses, its networks of several members, and its runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import adm
import adp
from common import T
from support.files import ROOT, read_json
from support.rng import generator
from support.training import Means
from tiny import mixture
from tiny.gaussians import ACROSS, MODES, Mixture
from tiny.members import Network


@pytest.fixture(scope="module")
def plane():
    return Mixture(2)


def make_teacher(dim, members):
    torch.manual_seed(0)
    network = Network(members, dim).requires_grad_(False)
    return mixture.MixtureTeacher(Mixture(dim), network)


# Closed forms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 5])
def test_score_is_the_gradient_of_the_log_density(dim):
    world = Mixture(dim)
    alpha, sigma = 0.7, 0.3
    modes = Normal(alpha * world.centres, (alpha**2 * world.widths**2 + sigma**2).sqrt()[:, None])
    inside = MixtureSameFamily(Categorical(world.weights), Independent(modes, 1))
    across = Normal(0.0, (alpha**2 * ACROSS**2 + sigma**2) ** 0.5)
    full, _ = torch.linalg.qr(torch.cat([world.plane, torch.eye(dim)[:, 2:]], dim=1))
    x = 2 * torch.randn(50, dim, generator=generator("test"))
    x.requires_grad_()
    log_density = inside.log_prob(x @ world.plane).sum() + across.log_prob(x @ full[:, 2:]).sum()
    (score,) = torch.autograd.grad(log_density, x)

    column = torch.ones(50, 1)
    x_0, eps = world.denoise(x.detach(), alpha * column, sigma * column)
    torch.testing.assert_close(-eps / sigma, score, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_0, (x + sigma**2 * score) / alpha, rtol=1e-4, atol=1e-4)  # Tweedie's formula


def test_small_steps_of_the_ode_follow_the_exact_solution_of_one_mode():
    """Of a single Gaussian it is known: x_s = alpha_s m + sqrt(v_s / v_t) (x_t - alpha_t m)."""
    teacher = make_teacher(2, 1)
    only = 3
    teacher.mixture.weights = torch.nn.functional.one_hot(torch.tensor(only), MODES).float()
    centre, width = teacher.mixture.centres[only], teacher.mixture.widths[only]
    start = torch.randn(20, 2, generator=generator("test"))  # in the plane
    times = torch.linspace(800, 200, 601, dtype=torch.float64)
    x = start @ teacher.mixture.plane.T
    for t, s in zip(times[:-1], times[1:]):
        x0_hat, eps_hat = teacher.guided(x, t.expand(20), {}, 1)
        x = teacher.step(x0_hat, eps_hat, s.expand(20))
    ratio = ((0.8**2 * width**2 + 0.2**2) / (0.2**2 * width**2 + 0.8**2)) ** 0.5
    wanted = 0.8 * centre + ratio * (start - 0.2 * centre)
    torch.testing.assert_close(teacher.mixture.project(x), wanted, rtol=0.01, atol=0.01)


def test_network_is_compared_with_the_exact_velocity():
    teacher = make_teacher(2, 1)
    teacher.call = lambda net, x, t, cond: torch.zeros_like(x)
    error, size = mixture.compare_velocities(teacher, 1000, generator("test"))
    assert error == size > 0.5


# Masses ---------------------------------------------------------------------------------------------------


def test_exact_masses_are_those_of_many_samples():
    world = Mixture(4)
    x = world.sample(400_000, generator("test"))
    found, exact = world.count_modes(x), world.exact_modes()
    assert ((found - exact).abs() < 5 * (exact / len(x)).sqrt()).all()
    found, exact = world.count_cells(x), world.exact_cells()
    assert ((found - exact).abs() < 6 * (exact / len(x)).sqrt() + 3e-5).all()
    assert exact.sum() == pytest.approx(1, abs=1e-5)
    assert world.judge(x)["width"] == pytest.approx(ACROSS, rel=0.01)


def test_masses_are_counted_right(plane):
    """Three quarters in the first mode, one quarter where there is none."""
    first, nowhere = plane.centres[0], torch.zeros(2)
    found = plane.judge(torch.stack([first, first, first, nowhere]) @ plane.plane.T)
    assert found["covered"] == 1
    assert found["in_none"] == 0.25
    assert found["masses"] == [0.75] + [0.0] * (MODES - 1) + [0.25]
    exact = plane.exact_modes()
    assert found["tv_modes"] == pytest.approx(1 - exact[0].item() - exact[-1].item(), abs=1e-5)


# Members --------------------------------------------------------------------------------------------------


def test_members_share_nothing():
    """What a member does with its rows depends on its weights and on them alone, in D's groups as well."""
    teacher = make_teacher(3, members=2)
    heads = teacher.make_heads(32)
    x, t = torch.randn(8, 3), torch.rand(8) * T
    other = x.clone()
    other[1::2] += 1

    def run(x):
        layers = teacher.features(x, t, {})
        real, fake = heads(layers, layers)
        return torch.cat([teacher.raw(teacher.denoiser, x, t, {}), real, fake], dim=1)

    changed = (run(x) - run(other)).abs().amax(1)
    assert (changed[0::2] == 0).all()
    assert (changed[1::2] > 0).all()
    assert not torch.equal(run(x[[0, 0]].repeat(4, 1))[0], run(x[[0, 0]].repeat(4, 1))[1])


# Runs -----------------------------------------------------------------------------------------------------


def run(tmp_path, monkeypatch, *words):
    """mixture.main on networks that have hardly trained -> (report.json, lines of table.md)."""
    monkeypatch.setattr(mixture, "SAMPLES", 200)
    monkeypatch.setattr(mixture, "WATCHED", 100)
    monkeypatch.setattr(mixture, "FRAMES", 2)
    short = ["--seeds", "2", "--iterations", "4", "--adp-iterations", "6", "--fit", "5"]
    mixture.main([*words, *short, "--out", str(tmp_path)])
    table = (tmp_path / "table.md").read_text()
    return read_json(tmp_path / "report.json"), table.splitlines()


METHODS = (
    (adp.ADP, ("velocity_loss", "generator_loss", "discriminator_loss")),
    (adm.ADM, ("generate", "fake_score_loss", "generator_loss", "discriminator_loss", "dmd_loss")),
)


def test_the_stages_own_methods_train(monkeypatch, tmp_path):
    """Every method of ADP and ADM runs in the runs of the losses that have it, and in no others."""
    called = set()

    def listen(stage, name):
        method = getattr(stage, name)

        def call(self, b):
            called.add((stage, name))
            return method(self, b)

        monkeypatch.setattr(stage, name, call)

    monkeypatch.setattr(mixture, "ADM_WORDS", mixture.ADM_WORDS.replace("--warmup 50", "--warmup 1"))
    for stage, names in METHODS:
        for name in names:
            listen(stage, name)
    run(tmp_path / "dmd", monkeypatch, "--losses", "dmd", "--starts", "bad")
    assert called == {(adm.ADM, name) for name in ("generate", "fake_score_loss", "dmd_loss")}
    called.clear()
    run(tmp_path / "adm", monkeypatch, "--losses", "plain", "--starts", "good")
    expected = {(stage, name) for stage, names in METHODS for name in names}
    assert called == expected - {(adm.ADM, "dmd_loss")}


def test_run_writes_its_files(monkeypatch, tmp_path):
    """Two dimensions, two penalties: the DMD loss, which has none, runs once in each."""
    words = ["--dim", "2", "3", "--starts", "bad", "collapsed", "--losses", "adm", "dmd"]
    report, table = run(tmp_path, monkeypatch, *words, "--weight", "0.1", "1")
    runs = [row for row in report["rows"] if "log" in row]
    assert len(runs) == 2 * 2 * 3
    for row in runs:
        assert len(row["seeds"]) == 2
        assert len(row["history"]["far"]) == 3
        assert ("D_abs" in row["log"]) == (row["loss"] == "adm")
    assert report["command"].startswith("python tiny/mixture.py --dim 2 3")
    assert len(table) == 2 + len(report["rows"])
    assert table[0].startswith("| dim | start | loss | options | modes |")
    for name in ("figure.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "animation.gif").read_bytes().startswith(b"GIF89a")


def test_table_has_means_and_deviations_and_no_empty_column(plane):
    seed = {"covered": 9, "tv_modes": 0.1, "tv_cells": 0.2, "in_none": 0.0, "far": 0.1, "width": 0.0}
    seed["masses"] = plane.exact_modes().tolist()
    name = {"dim": 2, "start": "bad", "options": ""}
    rows = [
        {**name, "loss": "adm", "seeds": [seed, seed | {"tv_modes": 0.3}], "log": {"cosine": 0.5}},
        {**name, "loss": "dmd", "seeds": [seed, seed | {"covered": 8}]},
    ]
    lines = mixture.make_table(rows).splitlines()
    assert lines[0] == "| loss | modes | TV with gaps | cosine |"
    assert lines[2] == "| adm | 9.000 | 0.200 ± 0.141 | 0.5 |"
    assert lines[3] == "| dmd | 8.500 ± 0.707 | 0.100 |  |"


def test_total_variation_of_modes_is_that_of_the_samples_in_one(plane):
    """Half of the samples between modes leave it at 0, a mode that is lost is its share; of less than a tenth
    in modes nothing is said."""
    exact = plane.exact_modes()
    among = exact[:MODES] / exact[:MODES].sum()
    shares = torch.cat([among / 2, torch.tensor([0.5])])
    assert mixture.read_masses(shares.tolist())["tv_among"] == pytest.approx(0, abs=1e-6)
    shares[MODES - 1] = 0
    read = mixture.read_masses(shares.tolist())
    assert read["tv_among"] == pytest.approx(among[MODES - 1].item(), abs=1e-6)
    assert read["light"] == pytest.approx(0.02, abs=1e-6)
    assert mixture.read_masses((shares / 6).tolist())["tv_among"] is None


@pytest.mark.parametrize("loss, power", [("adm / alpha", -1), ("dmd * alpha", 1)])
def test_gradient_of_a_sample_is_weighed_by_a_power_of_alpha(loss, power):
    method = mixture.MixtureADM.__new__(mixture.MixtureADM)
    method.teacher, method.power = make_teacher(2, 1), mixture.POWERS[loss]
    method.args = SimpleNamespace(t_range=(0.01, 1.0))
    rng = mixture.BatchRNG(6, "test")
    b = adm.MicroBatch(rng, [""] * 6, k=0, x0_hat=torch.zeros(6, 2, requires_grad=True))
    _, t = method.diffuse_sample(b)
    (b.x0_hat * 3).sum().backward()
    alpha = (1 - t / T).clamp(min=0.02)[:, None]
    torch.testing.assert_close(b.x0_hat.grad, (3 * alpha**power).expand(6, 2).float())


def make_method():
    """A MixtureADM whose D is the sum of a sample's two numbers."""
    method = mixture.MixtureADM.__new__(mixture.MixtureADM)
    method.log, method.args = Means(), SimpleNamespace(dt=0.25)
    method.heads = lambda real, fake: (real, fake)
    method.teacher = SimpleNamespace(features=lambda x, s, cond: x.sum(1, keepdim=True))
    return method


def test_unit_line_pushes_as_far_along_every_line():
    method = make_method()
    x_fake = torch.zeros(2, 2, requires_grad=True)
    method.step_ode = lambda b: x_fake
    lines = torch.tensor([[0.0, 2.0], [0.5, 0.0]])
    method.unit_line_loss(SimpleNamespace(x_fake=x_fake.detach(), x_real=lines)).backward()
    torch.testing.assert_close(-4 * x_fake.grad, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_flat_line_is_the_line_straight_through():
    teacher = make_teacher(3, 1)
    method = mixture.MixtureADM.__new__(mixture.MixtureADM)
    method.teacher, method.f, method.heads, method.log = teacher, teacher.denoiser, None, Means()
    method.args = SimpleNamespace(dt=1 / 64, guidance=1, straight_through=True)
    t = torch.tensor([30.0, 500.0, 990.0])
    x_t = torch.randn(3, 3, generator=generator("test"))

    def compute_gradient(loss):
        x = x_t.clone().requires_grad_()
        method.diffuse_sample = lambda b: (x, t)
        loss(adm.MicroBatch(None, [""] * 3, k=0, cond={}, x0_hat=x_t)).backward()
        return x.grad

    of_line = compute_gradient(method.line_loss)
    assert of_line.abs().min() > 1e-3
    torch.testing.assert_close(compute_gradient(method.flat_line_loss), of_line, rtol=1e-3, atol=1e-5)


def test_slopes_are_those_of_the_secant_in_quarters_of_the_times():
    """A slope is the sum of a line over the mean of its squares."""
    method = make_method()
    lines = torch.tensor([[2.0, -1.0], [1.0, 1.0], [2.0, 0.0], [1.0, 1.0], [3.0, 1.0]])
    s = torch.tensor([100.0, 300.0, 600.0, 900.0, 999.0])
    b = SimpleNamespace(x_fake=torch.zeros(5, 2), x_real=lines, s=s, cond={})
    slope = method.measure_slope(b, lines)
    assert slope.flatten().tolist() == pytest.approx([1 / 2.5, 2, 1, 2, 4 / 5])
    logged = {name: value.item() for name, value in method.log.take().items()}
    assert [logged[name] for name in mixture.SLOPES] == pytest.approx([1 / 2.5, 2, 1, 6 / 6])
    assert mixture.format_slopes(logged) == "0.36 1.82 0.91 0.91"


def test_dmd_loss_moves_samples_into_modes(monkeypatch):
    """From a start at which nearly none is in one."""
    monkeypatch.setattr(mixture, "SAMPLES", 500)
    monkeypatch.setattr(mixture, "FRAMES", 1)
    world = Mixture(2)
    network, _ = mixture.fit_network(world, members=1, iterations=200, seed=0)
    teacher = mixture.MixtureTeacher(world, network)
    measured, moments = mixture.run_adm(teacher, "dmd", "--loss dmd --lr 2e-3", 0, 150)
    before = world.judge(world.embed(torch.from_numpy(moments[0])))
    assert before["in_none"] > 0.9
    assert measured["seeds"][0]["in_none"] < 0.6


# Documentation --------------------------------------------------------------------------------------------


REPORTS = "plane regimes wide high-noise line secant secant-wide constant constant-wide flat flat-wide"


@pytest.mark.parametrize("name", REPORTS.split())
def test_tables_of_the_documentation_are_those_of_its_reports(name, capsys):
    """docs/mixture.md has what --report prints, the report's command and its date."""
    text = Path(ROOT, "docs/mixture.md").read_text(encoding="utf-8")
    path = Path(ROOT, f"docs/mixture/{name}.json")
    mixture.main(["--report", str(path)])
    assert capsys.readouterr().out in text
    report = read_json(path)
    assert report["date"] in text
    words = " ".join(text.replace("\\\n", " ").split())
    assert report["command"].split(" --out")[0] in words
