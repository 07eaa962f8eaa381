"""Schedules, predictions, samplers, losses and random numbers against hand-computed and analytic values."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

import adm
import adp
import common
import helpers
from common import T
from support.errors import UserError
from support.pairs import Pairs
from support.parallel import join_processes
from support.prompts import read_prompts
from support.rng import RowRNG, make_rngs
from support.systems import System
from support.tensors import is_finite
from support.training import Means, MovingAverage, set_lr

SDXL = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
ZERO_SNR = {
    **SDXL,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
TIMES = torch.tensor([0, 1e-3, 0.5, 1, 250.25, 499.999, 999, 1000], dtype=torch.float64)
CPU = torch.device("cpu")


def make_schedule(config, kind=common.Teacher):
    """A teacher with a noise schedule only."""
    teacher = object.__new__(kind)
    teacher.pipe = SimpleNamespace(scheduler=DDIMScheduler(**config))
    teacher.path = "analytic"
    teacher.device = CPU
    teacher.dtype = torch.float32
    teacher._read_schedule(teacher.pipe.scheduler)
    return teacher


def draw_normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near(value, expected, tolerance):
    torch.testing.assert_close(value, expected, rtol=0, atol=tolerance)


# Schedule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", (SDXL, ZERO_SNR))
def test_schedule_ends(config):
    teacher = make_schedule(config)
    x = torch.zeros(1)
    assert [float(v) for v in teacher.alpha_sigma([0], x)] == [1, 0]
    if config is ZERO_SNR:
        assert [float(v) for v in teacher.alpha_sigma([T], x)] == [0, 1]


@pytest.mark.parametrize("config", (SDXL, ZERO_SNR))
def test_schedule_is_the_schedulers_own_at_integer_times(config):
    x = torch.zeros(1000, dtype=torch.float64)
    alpha, sigma = make_schedule(config).alpha_sigma(torch.arange(1, 1001), x)
    assert_near(alpha**2, DDIMScheduler(**config).alphas_cumprod.double(), 1e-12)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))


def test_schedule_of_sdxl_as_published():
    x = torch.zeros(5, dtype=torch.float64)
    alpha, _ = make_schedule(SDXL).alpha_sigma([1, 250, 500, 750, 1000], x)
    published = [0.99914998, 0.67543209, 0.27766943, 0.05662345, 0.00466010]
    assert_near(alpha**2, torch.tensor(published).double(), 2e-7)


@pytest.mark.parametrize("config", (SDXL, ZERO_SNR))
def test_schedule_is_monotone_between_integers(config):
    x = torch.zeros(4001, dtype=torch.float64)
    alpha, sigma = make_schedule(config).alpha_sigma(torch.linspace(0, T, 4001), x)
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()


def test_schedule_broadcasts_in_the_dtype_of_x():
    alpha, sigma = make_schedule(SDXL).alpha_sigma([10.0, 20.0], torch.zeros(2, 4, 8, 8))
    assert alpha.shape == sigma.shape == (2, 1, 1, 1)
    assert alpha.dtype == torch.float32


# Predictions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", (SDXL, ZERO_SNR))
def test_convert_inverts_target(config):
    teacher = make_schedule(config)
    x_0 = draw_normal(8, 3, 2, 2)
    eps = draw_normal(8, 3, 2, 2, seed=1)
    x_t = teacher.diffuse(x_0, eps, TIMES)
    raw = teacher.target(x_0, eps, TIMES)
    x0_hat, eps_hat = teacher.convert(raw, x_t, TIMES)
    assert_near(x0_hat, x_0, 1e-10)
    assert_near(eps_hat, eps, 1e-10)
    s = TIMES.flip(0)
    assert_near(teacher.step(x0_hat, eps_hat, s), teacher.diffuse(x_0, eps, s), 1e-10)


@pytest.mark.parametrize("config", (SDXL, ZERO_SNR))
def test_target_inverts_convert(config):
    """For a raw output of any kind, both predictions together are x_t again, and give the same raw output."""
    teacher = make_schedule(config)
    raw = draw_normal(8, 3, 2, 2)
    x_t = draw_normal(8, 3, 2, 2, seed=1)
    x0_hat, eps_hat = teacher.convert(raw, x_t, TIMES)
    assert_near(teacher.diffuse(x0_hat, eps_hat, TIMES), x_t, 1e-10)
    assert_near(teacher.target(x0_hat, eps_hat, TIMES), raw, 1e-10)


def test_network_sees_timesteps_from_0_to_999():
    teacher = make_schedule(SDXL)
    seen = []
    teacher.call = lambda net, x, timestep, cond: seen.append(timestep) or x
    teacher.predict(None, draw_normal(4, 1, 1, 1), torch.tensor([0, 0.5, 1, 1000]), None)
    assert seen[0].tolist() == [0, 0, 0, 999]


def test_velocity_student_round_trip():
    """On the straight path, ends included; its network sees t itself."""
    teacher = make_schedule(SDXL)
    x_0 = draw_normal(8, 3, 2, 2)
    x_T = draw_normal(8, 3, 2, 2, seed=1)
    teacher.call = lambda net, x, timestep, cond: net(timestep)
    student = common.Student(teacher, "velocity", 1)
    x_t = student.diffuse(x_0, x_T, TIMES)
    assert_near(x_t[0], x_0[0], 0)
    assert_near(x_t[-1], x_T[-1], 0)

    def net(timestep):
        assert timestep.equal(TIMES)
        return x_T - x_0

    assert_near(student.x0(net, x_t, TIMES, None), x_0, 1e-12)


def test_teacher_student_uses_the_teachers_path():
    teacher = make_schedule(ZERO_SNR)
    x_0 = draw_normal(8, 3, 2, 2)
    eps = draw_normal(8, 3, 2, 2, seed=1)
    student = common.Student(teacher, "teacher", 4)
    teacher.call = lambda net, x, timestep, cond: teacher.target(x_0, eps, TIMES)
    x_t = student.diffuse(x_0, eps, TIMES)
    torch.testing.assert_close(x_t, teacher.diffuse(x_0, eps, TIMES))
    assert_near(student.x0(None, x_t, TIMES, None), x_0, 1e-10)


# The probability-flow ODE on a Gaussian -------------------------------------------------------------------


class Gaussian(common.Teacher):
    """The exact teacher of data from N(0, c^2), where E[x_0 | x_t] and E[eps | x_t] are linear in x_t."""

    c = 0.5
    denoiser = None

    def timestep(self, t):
        return t

    def variance(self, t):
        alpha, sigma = self.alpha_sigma(t, torch.zeros(len(t), dtype=torch.float64))
        return alpha**2 * self.c**2 + sigma**2

    def call(self, net, x_t, t, cond):
        alpha, sigma = self.alpha_sigma(t, x_t)
        x0_hat = alpha * self.c**2 * x_t / self.variance(t)
        eps_hat = sigma * x_t / self.variance(t)
        return self.target(x0_hat, eps_hat, t)

    def integrate(self, t, s, steps):
        """From x_t = 1, one row, to x_s."""
        x = torch.ones(1, dtype=torch.float64)
        times = torch.linspace(t, s, steps + 1, dtype=torch.float64)
        for now, then in zip(times[:-1, None], times[1:, None]):
            x0_hat, eps_hat = self.guided(x, now, None, 1)
            x = self.step(x0_hat, eps_hat, then)
        return x


@pytest.mark.parametrize("config", (SDXL, ZERO_SNR))
@pytest.mark.parametrize("t, s", ((T, 0), (700, 100), (100, 900)))
def test_ode_carries_the_variance(config, t, s):
    """N(0, var_t) goes to N(0, var_s), with an error that falls as the first-order solver's should."""
    teacher = make_schedule(config, Gaussian)
    exact = (teacher.variance(torch.tensor([s])) / teacher.variance(torch.tensor([t]))).sqrt()
    coarse = abs(teacher.integrate(t, s, 250) / exact - 1).item()
    fine = abs(teacher.integrate(t, s, 1000) / exact - 1).item()
    assert fine < 5e-3
    assert fine < coarse / 3


# The tiny teacher -----------------------------------------------------------------------------------------


PROMPTS = ["a small red circle", "a large blue square on a white background", "a triangle"]


def count_rows(net):
    """-> (a list that receives the number of rows of every pass through `net`, a handle to end that)."""
    rows = []
    return rows, net.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))


def test_guidance(teacher):
    x = draw_normal(3, 4, 8, 8).float()
    t = torch.tensor([10.0, 500, 1000])
    cond = teacher.encode(PROMPTS)
    _, eps = teacher.predict(teacher.denoiser, x, t, cond)
    _, eps_null = teacher.predict(teacher.denoiser, x, t, teacher.null(3))
    assert (eps - eps_null).abs().mean() > 1e-3
    rows, hook = count_rows(teacher.denoiser)
    guided = {}
    for scale in (1, 0, 7.5):
        _, guided[scale] = teacher.guided(x, t, cond, scale)
    hook.remove()
    assert rows == [3, 3, 6]
    for scale, value in guided.items():
        # up to 1 the pipelines guide no more: 0 is not the prediction without the prompt
        expected = eps_null + scale * (eps - eps_null) if scale > 1 else eps
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", (1, 4, 8, 25))
def test_teacher_times_are_the_schedulers(teacher, steps):
    teacher.pipe.scheduler.set_timesteps(steps)
    assert teacher.times(steps) == [*(teacher.pipe.scheduler.timesteps + 1).tolist(), 0]
    assert teacher.times(steps)[0] == T


@pytest.mark.parametrize("steps, scale", ((4, 5.0), (10, 3.0), (4, 1)))
def test_sampler_is_diffusers_own(teacher, steps, scale):
    x_T = draw_normal(3, 4, 8, 8).float()
    teacher.pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "latent"}
    expected = teacher.pipe(PROMPTS, latents=x_T.clone(), **settings).images
    ours = teacher.sample(x_T, teacher.encode(PROMPTS), steps, scale)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def test_decoder_is_diffusers_own(teacher):
    latents = draw_normal(2, 4, 8, 8).float()
    expected = teacher.pipe.vae.decode(latents / teacher.pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(teacher.decode(latents), expected)


# Students -------------------------------------------------------------------------------------------------

STUDENT_TIMES = (
    (1, [1000]),
    (4, [1000, 750, 500, 250]),
    (8, [1000, 875, 750, 625, 500, 375, 250, 125]),
)


@pytest.mark.parametrize("steps, times", STUDENT_TIMES)
def test_student_times(steps, times):
    assert common.Student(make_schedule(SDXL), "teacher", steps).times == times


@pytest.mark.parametrize("prediction, parametrisation", (("epsilon", "velocity"), ("flow", "teacher")))
def test_a_straight_path_begins_at_T(prediction, parametrisation):
    teacher = SimpleNamespace(prediction=prediction, student_guidance=None)
    with pytest.raises(UserError, match="on a straight path x_t has the size of pure noise at t = T alone"):
        common.Student(teacher, parametrisation, 1, first_time=0.4)


@pytest.mark.parametrize(
    "parametrisation, timesteps", (("teacher", [999, 749, 499, 249]), ("velocity", [1000, 750, 500, 250]))
)
def test_backward_simulation_is_sampling_cut_short(teacher, monkeypatch, parametrisation, timesteps):
    """The same noise gives the same x at each of the student's times, and the network is called at those
    before only."""
    student = common.Student(teacher, parametrisation, 4)
    cond = teacher.encode(PROMPTS)
    inputs = []
    call = teacher.call

    def watch(net, x, t, cond):
        inputs.append((t, x))
        return call(net, x, t, cond)

    monkeypatch.setattr(teacher, "call", watch)
    make_rng = lambda: RowRNG(range(3), ("test", 7), CPU)
    student.sample(teacher.denoiser, make_rng(), cond)
    sampling = inputs.copy()
    assert [t.tolist() for t, _ in sampling] == [[value] * 3 for value in timesteps]
    for k in range(4):
        inputs.clear()
        x = student.simulate(teacher.denoiser, make_rng(), cond, k)
        assert [t[0].item() for t, _ in inputs] == timesteps[:k]
        assert x.equal(sampling[k][1])
        assert not x.requires_grad
    assert student.simulate(teacher.denoiser, make_rng(), cond, 0).equal(make_rng().normal(4, 8, 8))


# Losses, times and random numbers -------------------------------------------------------------------------


def test_hinge_values():
    real = torch.tensor([[2.0, 0.0], [0.5, -1.0]])
    fake = torch.tensor([[-2.0, 0.0], [0.5, 1.0]])
    by_hand = (0 + 1 + 0.5 + 2) / 4 + (0 + 1 + 1.5 + 2) / 4
    assert common.hinge_discriminator(real, fake).item() == pytest.approx(by_hand)
    assert common.hinge_generator(fake).item() == pytest.approx(0.125)

    weights = torch.tensor([0.85, 0.15])
    by_hand = (0.15 + (0.5 * 0.85 + 2 * 0.15)) / 2 + (0.15 + (1.5 * 0.85 + 2 * 0.15)) / 2
    assert common.hinge_discriminator(real, fake, weights).item() == pytest.approx(by_hand)
    by_hand = (2 * 0.85 - (0.5 * 0.85 + 0.15)) / 2
    assert common.hinge_generator(fake, weights).item() == pytest.approx(by_hand)


def test_cubic_generator_times(adp_arguments, monkeypatch):
    """ADP's own times have P(t/T <= x) = P(u^3 >= 1 - x) = 1 - (1 - x)^(1/3), by Kolmogorov and Smirnov."""
    words = "--warmup 2 --lambda-pixel 0 --batch 200 --no-checkpointing"
    method = helpers.make_method(adp, [*adp_arguments, *words.split()])
    times = []
    velocity = method.student.velocity

    def watch(net, x_t, t, cond):
        times.append(t)
        return velocity(net, x_t, t, cond)

    monkeypatch.setattr(method.student, "velocity", watch)
    for step in range(2):
        adp.iterate(method, step, adp.minimise)
    x = torch.cat(times).sort().values / T
    assert len(x) == 400
    expected = 1 - (1 - x) ** (1 / 3)
    observed = (torch.arange(400) + 0.5) / 400
    assert (expected - observed).abs().max() < 1.36 / math.sqrt(400)
    # biased to high noise
    assert (x > 0.5).double().mean() == pytest.approx(0.5 ** (1 / 3), abs=0.05)


@pytest.mark.parametrize("draw", (lambda rng: rng.normal(2, 2), lambda rng: rng.uniform()))
def test_random_rows_do_not_depend_on_who_draws_them(draw):
    key = ("test", 3, 1)
    together = draw(RowRNG(range(4), key, CPU))
    first = draw(RowRNG(range(2), key, CPU))
    second = draw(RowRNG(range(2, 4), key, CPU))
    assert together.equal(torch.cat([first, second]))
    for other_key in (("test", 3, 2), ("tests", 3, 1), ("tset", 3, 1)):
        assert not (together == draw(RowRNG(range(4), other_key, CPU))).any()
    assert together.unique().numel() == together.numel()


def test_integers_are_all_that_there_are():
    assert set(RowRNG(range(64), ("test", 0), CPU).integers(3)) == {0, 1, 2}


def test_ranks_and_micro_batches_share_the_rows_of_the_global_batch(monkeypatch):
    """Two ranks with three micro-batches of two rows: all twelve rows, each once, by their numbers, the
    seed and the key."""
    args = SimpleNamespace(accumulate=3, batch=2, seed=5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    drawn = {}
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        for part, rng in enumerate(make_rngs(args, CPU, "test", 7)):
            drawn[part, rank] = rng.uniform()
    expected = RowRNG(range(12), ("test", 5, 7), CPU).uniform()
    assert torch.cat([drawn[key] for key in sorted(drawn)]).equal(expected)


def test_pairs_are_the_guided_samplers(teacher, teacher_folder, prompts_file, tmp_path):
    """Pair i depends on the seed and i alone: its prompt, its noise, and what the sampler makes of it. The
    index has the prompts of pairs, not all of the file's."""
    words = "--count 5 --shard-size 3 --batch 2 --steps 2 --guidance 3 --seed 4"
    source = ["--teacher", teacher_folder, "--prompts", prompts_file, "--out", str(tmp_path)]
    helpers.collect(*source, *words.split())
    pairs = Pairs(str(tmp_path))
    x_T, x_0 = pairs.batch(range(5))
    prompts = pairs.prompts(range(5))
    rng = RowRNG(range(5), ("pairs", 4), CPU)
    chosen = rng.integers(20)
    noise = rng.normal(*teacher.latent_shape)
    of_file = read_prompts(prompts_file)
    assert prompts == [of_file[i] for i in chosen]
    assert pairs.index["prompts"] == [prompt for prompt in of_file if prompt in prompts]
    assert x_T.equal(noise.half().float())
    expected = teacher.sample(noise, teacher.encode(prompts), 2, 3.0)
    assert_near(x_0, expected, 2e-3 * float(expected.std()))


# Training -------------------------------------------------------------------------------------------------


def test_learning_rate_decays_over_the_last_share():
    args = SimpleNamespace(iterations=10, decay=0.4)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1)
    rates = []
    for step in range(10):
        set_lr(args, step, {optimizer: 2.0, None: 1.0})
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([2] * 7 + [1.5, 1, 0.5])


def test_moving_average():
    """The decay of update n is min(decay, (1 + n) / (10 + n)), that of the first zero."""
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0)
    ema = MovingAverage(net, 0.2)
    expected = 0.0
    for value, decay in ((1.0, 0), (2.0, 2 / 11), (3.0, 0.2)):
        net.weight.data.fill_(value)
        ema.step()
        expected = decay * expected + (1 - decay) * value
    with ema.use():
        assert net.weight.item() == pytest.approx(expected)
    assert net.weight.item() == 3


def test_no_moving_average():
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(3)
    ema = MovingAverage(net, 0)
    ema.step()
    with ema.use():
        assert net.weight.item() == 3


def test_pictures_are_decoded_in_parts_of_a_megapixel(teacher, monkeypatch):
    """The same pixels and gradients as at once."""
    latents = torch.randn(3, *teacher.latent_shape, generator=torch.manual_seed(0))
    decode, sizes, results = teacher._decode, [], []

    def watch(part):
        sizes.append(len(part))
        return decode(part)

    monkeypatch.setattr(teacher, "_decode", watch)
    for resolution in (teacher.resolution, [1024, 1024]):
        monkeypatch.setattr(teacher, "resolution", resolution)
        x = latents.clone().requires_grad_()
        pixels = teacher.decode(x)
        pixels.square().mean().backward()
        results.append((pixels.detach(), x.grad))
    assert sizes == [3, *[1, 1, 1], *[1, 1, 1]]  # a megapixel at a time, and once more for the gradients
    torch.testing.assert_close(*results)

    del sizes[:]
    teacher.pipe.vae.enable_gradient_checkpointing()  # it does that itself, and not twice
    x = latents.clone().requires_grad_()
    teacher.decode(x).square().mean().backward()
    teacher.pipe.vae.disable_gradient_checkpointing()
    assert sizes == [1, 1, 1]
    torch.testing.assert_close(x.grad, results[0][1])


def test_a_pass_in_bf16_keeps_no_copies_of_weights(teacher, monkeypatch):
    """Autocast would keep a copy of each weight that trains to the end of the pass, 5 GB for SDXL."""
    monkeypatch.setattr(teacher, "dtype", torch.bfloat16)
    seen = []

    def look(module, inputs):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))

    hook = teacher.denoiser.register_forward_pre_hook(look)
    teacher.predict(teacher.denoiser, draw_normal(1, 4, 8, 8).float(), torch.tensor([500.0]), teacher.null(1))
    hook.remove()
    assert seen == [(True, False)]


def test_a_penalised_discriminator_learns_the_line_to_x_real():
    """docs/paper-gaps.md#what-d-learns: L(tau) is least where grad D = (x_real - x_fake) / (4 w N dt)."""
    line = torch.tensor([[0.9, 0.2], [0.2, -0.5]], dtype=torch.float64)
    small, dt, weight = 1e-4, 1 / 64, 0.25
    x_fake = torch.randn(100_000, 2, dtype=torch.float64, generator=torch.manual_seed(0))
    x_real = x_fake + small * x_fake @ line  # this l is the gradient of a D, as a difference of scores is
    method = object.__new__(adm.ADM)
    method.log = Means()
    method.args = SimpleNamespace(r1=weight, r2=weight, r_noise=1e-4, dt=dt)
    method.teacher = SimpleNamespace(features=lambda x, s, cond: x)

    def compute_gradient(matrix):
        """Of L(tau) in a D(x) = x matrix x / 2, whose gradient in x is matrix x."""
        matrix = matrix.clone().requires_grad_()

        def judge(*maps):
            logits = [(x @ matrix * x).sum(1, keepdim=True) / 2 for x in maps]
            return logits if len(maps) > 1 else logits[0]

        method.heads_train = judge
        rng = SimpleNamespace(normal_like=torch.randn_like)
        b = adm.MicroBatch(rng, [], k=0, x_fake=x_fake, x_real=x_real, maps_fake=x_fake)
        (gradient,) = torch.autograd.grad(method.discriminator_loss(b), matrix)
        return (gradient + gradient.T) / 2

    best = small * line / (4 * weight * 2 * dt)
    at_start = compute_gradient(torch.zeros(2, 2, dtype=torch.float64))
    assert compute_gradient(best).norm() < 0.02 * at_start.norm()


def test_guidance_may_be_none_at_all(teacher):
    """0 is a scale, and not the default: the unconditional teacher."""
    assert System(teacher, guidance=0).guidance == 0


def test_the_seed_is_that_of_initial_weights():
    drawn = []
    for seed in (3, 3, 4):
        join_processes(seed)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_one_number_that_is_not_finite_is_found(dtype):
    numbers = torch.randn(1000, dtype=dtype)
    assert is_finite(numbers)
    assert is_finite(torch.arange(3))
    for number in (math.nan, math.inf, -math.inf):
        one = numbers.clone()
        one[500] = number
        assert not is_finite(one)
