"""diffusers schedulers with which a teacher's pipeline samples as a student does."""

import math

from support.errors import UserError

STEPS = 1000  # of every schedule
EXACT = 1e6  # LCMScheduler's timestep_scaling, with which its step is x0_hat exactly, not nearly


def read_alphas_cumprod(scheduler, name):
    """abar at the timesteps 0 ... 999 of a teacher's variance-preserving schedule, float64 on the CPU.
    UserError for one that is none, or of which noise prediction says nothing. name: the teacher's."""
    abar = scheduler.alphas_cumprod.double().cpu()
    # some schedulers have 2**-24 in the place of 0
    falls = (abar.diff() < 1e-6).all() and (abar >= 0).all() and (abar <= 1 + 1e-6).all()
    if len(abar) != STEPS or not falls:
        raise UserError(
            f"the teacher {name} has no noise schedule of {STEPS} steps that falls from 1 towards 0 "
            "(trained_betas, beta_start, beta_end)"
        )
    if scheduler.config.prediction_type == "epsilon" and abar[-1] < 1e-6:
        raise UserError(
            f"the teacher {name} predicts noise (prediction_type: epsilon) at zero terminal SNR "
            "(rescale_betas_zero_snr, beta_schedule), where noise says nothing of the picture"
        )
    return abar


def space_timesteps(config, steps):
    """The timesteps of so many steps with the spacing of a scheduler's config. UserError where they leave
    the schedule."""
    from diffusers import DDIMScheduler

    spacing = config.get("timestep_spacing", "linspace")  # of a scheduler that has no other
    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=config.get("steps_offset", 0))
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    if timesteps[0] >= STEPS:
        raise UserError(
            f"the teacher's steps_offset moves the first of {steps} steps beyond its schedule: give fewer"
        )
    return timesteps


def make_lcm_scheduler(alphas_cumprod, prediction, steps):
    """For students of a variance-preserving teacher: abar at t = 0, 1, ..., T, the teacher's prediction type,
    and the student's number of steps. UserError for T steps, the last of which is at diffusers' timestep 0,
    where an LCMScheduler returns its input."""
    from diffusers import LCMScheduler

    if steps == len(alphas_cumprod) - 1:
        raise UserError(
            f"a student of {steps} steps cannot be exported: its last step is at timestep 0, where "
            f"diffusers' LCMScheduler makes none; train one of at most {steps - 1} steps"
        )
    betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    return LCMScheduler(
        trained_betas=betas.tolist(),
        prediction_type=prediction,
        clip_sample=False,
        original_inference_steps=len(betas),
        steps_offset=1,  # nothing reads it, but a StableDiffusionPipeline complains of any other
        timestep_scaling=EXACT,
    )


def read_shift(config, tokens):
    """The shift S of a flow scheduler's config, for pictures of so many tokens."""
    if not config.get("use_dynamic_shifting"):
        return config.get("shift", config.get("flow_shift"))
    fewest, most = config.base_image_seq_len, config.max_image_seq_len
    share = (tokens - fewest) / (most - fewest)
    return math.exp(config.base_shift + share * (config.max_shift - config.base_shift))


def make_flow_scheduler(sigmas):
    """For students that step through these noise levels (1 first; 0 follows the last).

    Given a number of steps n, diffusers takes u = 1 ... 0.001 in n equal steps, shifts them to a u / (1 +
    (a - 1) u), and stretches the result to end at `shift_terminal`. Both maps are fractional linear and
    keep 1, as the student's own levels are such a map of 1 - i/n: two of them fix a and the end, and all
    agree."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if len(sigmas) == 1:
        return FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    a = 1.0
    if len(sigmas) > 2:
        end = 1e-3
        d = (1 - end) / (len(sigmas) - 1)
        ratio = (1 - end) * (1 - sigmas[1]) / (1 - sigmas[-1])
        a = 1 + (d - ratio) / (ratio * (1 - d) - d * end)
    # with dynamic shifting the range of u stays as it is; base = max makes it the same at every resolution
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=math.log(a),
        max_shift=math.log(a),
        shift_terminal=sigmas[-1],
        stochastic_sampling=True,
    )


def make_fixed_scheduler(sigmas):
    """The same, for pipelines that give diffusers their number of steps n but no mu, as dynamic shifting
    wants it. UserError where there is none, which is so for hundreds of steps.

    Without it the range of u ends at k = 0.001 shifted by a. The two conditions then make a the smaller root
    of A a^2 - B a + C."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    steps = len(sigmas) - 1
    if steps == 0:
        return make_flow_scheduler(sigmas)
    a = 1.0
    if steps > 1:
        end = 1e-3
        ratio = (1 - sigmas[1]) / (1 - sigmas[-1])
        A = end * (1 - ratio * steps)
        B = (1 - end) * ratio * (steps - 1)
        C = (1 - end) * (1 - ratio)
        if B * B < 4 * A * C:
            raise UserError(
                f"a student of {steps + 1} steps cannot be exported: diffusers' flow scheduler has no shift "
                "with its noise levels; train one of fewer steps"
            )
        a = 2 * C / (B + math.sqrt(B * B - 4 * A * C))
    return FlowMatchEulerDiscreteScheduler(shift=a, shift_terminal=sigmas[-1], stochastic_sampling=True)


def make_shifted_scheduler(sigmas):
    """The same, for pipelines that give diffusers the levels 1, 1 - 1/n ... 1/n themselves: it has but to
    shift them."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    shift = 1.0
    if len(sigmas) > 1:
        u = 1 - 1 / len(sigmas)
        shift = sigmas[1] * (1 - u) / (u * (1 - sigmas[1]))
    return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)


def make_velocity_scheduler():
    """For one-step velocity students of a variance-preserving teacher: one step of flow from noise level 1,
    the network's timestep 1000, x_0 = x_T - v. A shift without end makes the first level exactly 1."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1e30,
        solver_order=1,
        final_sigmas_type="zero",
        steps_offset=1,  # as above
    )


def choose_timesteps(scheduler, times):
    """The `timesteps` that a pipeline has to be given to sample at a student's times, None where its number
    of steps is enough. LCMScheduler takes the floor of i T / n as floating point has it, which falls just
    short of some whole numbers: of 19 x 1000 / 38, for one."""
    from diffusers import LCMScheduler

    if not isinstance(scheduler, LCMScheduler):
        return None
    wanted = [int(t) - 1 for t in times]
    scheduler.set_timesteps(len(times))
    return None if scheduler.timesteps.tolist() == wanted else wanted
