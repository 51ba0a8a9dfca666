"""Samplers against diffusers' schedulers, step by step; calls, ends and orders of convergence.

Everything is compared in the frame of constant variance, x / sqrt(1 + sigma^2), in which the pictures have scale 1.
"""

import inspect
import math
from itertools import pairwise

import diffusers
import pytest
import torch

from diffusion.errors import GazeError
from diffusion.noise import NoiseSchedule, scaling
from diffusion.samplers import SAMPLERS, sampler
from diffusion.scheduler_config import READ
from diffusion.schedulers import prepare
from tests.parity.network import LATENT, Network

CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
OPTIONS = {"dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"}}
ZERO_OR_LOWEST = ("euler", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
EXPLODING = ("euler", "euler_ancestral", "heun")
LEADING = [{"timestep_spacing": "leading", "steps_offset": offset} for offset in (0, 1)]
TRAILING = {"timestep_spacing": "trailing"}
LINSPACE = {"timestep_spacing": "linspace"}
# DDIM with linspace is left out: diffusers' class steps to t - T // n, which is not the timestep it visits next.
CASES = [
    *[("ddim", {**spacing, "set_alpha_to_one": one}) for spacing in (*LEADING, TRAILING) for one in (False, True)],
    *[(name, spacing) for name in CLASSES if name != "ddim" for spacing in (*LEADING, TRAILING, LINSPACE)],
    *[(name, {**TRAILING, "final_sigmas_type": "sigma_min"}) for name in ZERO_OR_LOWEST],
    *[(name, {}) for name in CLASSES],
]
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def case_id(value):
    return "-".join(str(v) for v in value.values()) or "silent" if isinstance(value, dict) else str(value)


def unit_noise(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(2, 3, 5, 4, generator=generator)


def run_diffusers(name, config, steps, prediction_type):
    """The start, x after every step, and the timesteps, from diffusers."""
    if name == "euler_ancestral" and prediction_type == "sample":
        prediction_type = "epsilon"  # its class has no "sample"; the network's picture is the same
    scheduler = CLASSES[name].from_config({**config, **OPTIONS.get(name, {}), "prediction_type": prediction_type})
    scheduler.set_timesteps(steps)
    network = Network(scheduler.alphas_cumprod, prediction_type)
    generator = torch.Generator().manual_seed(1)
    extra = {"generator": generator} if sampler(name).stochastic else {}
    exploding = name in EXPLODING
    x = unit_noise()() * scheduler.init_noise_sigma
    path = [x / math.hypot(1, scheduler.sigmas[0]) if exploding else x]
    for i, timestep in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(x, timestep), timestep)
        x = scheduler.step(output, timestep, x, **extra).prev_sample
        if getattr(scheduler, "state_in_first_order", True) or i == len(scheduler.timesteps) - 1:
            path.append(x / math.hypot(1, scheduler.sigmas[i + 1]) if exploding else x)
    return path, network.timesteps


def run_ours(name, config, steps, prediction_type):
    schedule = NoiseSchedule.from_config({**config, "prediction_type": prediction_type})
    network = Network(1 / (1 + schedule.sigmas_T**2), prediction_type)

    def denoise(x, sigma):
        level = torch.tensor(sigma, dtype=torch.float64)
        c_skip, c_out, c_in = scaling(prediction_type, level)
        return c_skip * x + c_out * network(c_in * x, schedule.timestep(level))

    trajectory = prepare(name, schedule, steps)
    x = unit_noise()() * trajectory.start
    path = [x / math.hypot(1, trajectory.sigmas[0])]
    for step in trajectory.run(denoise, x, noise=unit_noise(1)):
        path.append(step.x_BCHW / math.hypot(1, step.sigma))
    return path, network.timesteps


def largest_difference(ours, theirs):
    assert len(ours) == len(theirs)
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("steps", [4, 10, 50])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)
def test_every_step_equals_diffusers(name, options, prediction_type, steps):
    config = {**LATENT, **options}
    theirs, their_timesteps = run_diffusers(name, config, steps, prediction_type)
    ours, our_timesteps = run_ours(name, config, steps, prediction_type)
    assert our_timesteps == pytest.approx(their_timesteps, abs=1e-3)
    assert largest_difference(ours, theirs) < 1e-4
    assert len(our_timesteps) == sampler(name).calls(steps)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_other_noise_schedules(name, beta_schedule):
    # Leading, because the cosine's last level is 20,291: there diffusers' slopes in fp32 are off by 1e-3 (next test).
    config = {"beta_schedule": beta_schedule, "clip_sample": False, "timestep_spacing": "leading", "beta_end": 0.02,
              "beta_start": 1e-4}  # fmt: skip
    theirs, _ = run_diffusers(name, config, 10, "v_prediction")
    ours, _ = run_ours(name, config, 10, "v_prediction")
    assert largest_difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("high", [{"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}])
def test_no_digits_are_lost_at_high_levels(name, high):
    schedule = NoiseSchedule.from_config({**LATENT, **TRAILING, **high})
    method = sampler(name)
    sigmas = method.sigmas(schedule, 10)

    def end(dtype):
        noise = unit_noise()

        def denoise(x, sigma):
            return torch.tanh(1.5 * x / math.hypot(1, sigma))

        start = noise().to(dtype) * method.start(schedule, sigmas)
        path = method.run(denoise, start, sigmas, lambda: noise().to(dtype))
        return torch.stack([step.x_BCHW / math.hypot(1, step.sigma) for step in path])

    exact = end(torch.float64)
    assert (end(torch.float32) - exact).abs().max() < 1e-5 * max(1, exact.abs().max())


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "ddim"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr(name, prediction_type):
    # Where diffusers' DDIM has alpha = 0, the others and we have 2^-12: 2.4e-4 of a picture, times the network's slope.
    limit = 1e-3 if name == "ddim" else 1e-4
    config = {**LATENT, **TRAILING, "rescale_betas_zero_snr": True}
    theirs, _ = run_diffusers(name, config, 10, prediction_type)
    ours, _ = run_ours(name, config, 10, prediction_type)
    assert largest_difference(ours, theirs) < limit


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_karras_levels(name, spacing):
    config = {**LATENT, "timestep_spacing": spacing, "steps_offset": 1, "use_karras_sigmas": True}
    theirs, their_timesteps = run_diffusers(name, config, 10, "epsilon")
    ours, our_timesteps = run_ours(name, config, 10, "epsilon")
    # diffusers goes back from level to timestep by interpolating the logarithm, we by the inverse of `sigma`. The
    # network here takes its level from the timestep, so an inexact inverse is also an inexact level.
    assert our_timesteps == pytest.approx(their_timesteps, abs=0.02)
    assert largest_difference(ours, theirs) < 1e-3


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "unipc"])
def test_levels_between_the_ends(name, spacing):
    config = {**LATENT, f"use_{spacing}_sigmas": True}
    scheduler = CLASSES[name].from_config(config)
    scheduler.set_timesteps(20)
    theirs = scheduler.sigmas.double().unique(sorted=True).flip(0)  # Heun's occur twice
    configured = sampler(name).sigmas(NoiseSchedule.from_config(config), 20)
    torch.testing.assert_close(configured, theirs, rtol=1e-4, atol=0)
    asked = sampler(name).sigmas(NoiseSchedule.from_config(LATENT), 20, spacing)
    assert torch.equal(asked, configured)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_spacing_that_is_asked_for_replaces_the_models(name, spacing):
    karras = NoiseSchedule.from_config({**LATENT, "use_karras_sigmas": True, "timestep_spacing": "leading"})
    plain = NoiseSchedule.from_config({**LATENT, "timestep_spacing": spacing})
    method = sampler(name)
    asked, own = method.prepare(karras, 12, spacing), method.prepare(plain, 12, spacing)
    assert torch.equal(asked.sigmas, own.sigmas)
    assert (asked.start, asked.steps, asked.spacing) == (own.start, 12, spacing)
    if name != "lcm":  # which is trailing if nothing is asked for
        assert torch.equal(own.sigmas, method.sigmas(plain, 12))
        assert own.start == method.start(plain, own.sigmas)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [4, 25])
def test_ddim_with_eta(steps, eta):
    config = {**LATENT, "steps_offset": 1, "set_alpha_to_one": False}
    scheduler = diffusers.DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    theirs, generator = unit_noise()(), torch.Generator().manual_seed(1)
    network = Network(scheduler.alphas_cumprod, "epsilon")
    for timestep in scheduler.timesteps:
        output = network(theirs, timestep)
        theirs = scheduler.step(output, timestep, theirs, eta=eta, generator=generator).prev_sample
    ours, _ = run_ours(f"ddim:eta={eta}", config, steps, "epsilon")
    assert (ours[-1] - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize("spacing", [*LEADING, TRAILING, LINSPACE], ids=case_id)
def test_dpmpp_3m_without_noise(spacing, steps):
    options = {**LATENT, **spacing, "solver_order": 3, "solver_type": "heun"}
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(options)
    scheduler.set_timesteps(steps)
    theirs, network = unit_noise()(), Network(scheduler.alphas_cumprod, "epsilon")
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, timestep), timestep, theirs).prev_sample
    ours, _ = run_ours("dpmpp_3m_sde:eta=0", {**LATENT, **spacing}, steps, "epsilon")
    assert (ours[-1] - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_dpmpp_3m_sde_is_k_diffusions_formula(eta):
    # diffusers' third order with noise has a wrong sign (its last coefficient ends in - 0.5), so it is no reference.
    schedule = NoiseSchedule.from_config({**LATENT, **TRAILING})
    trajectory = prepare(f"dpmpp_3m_sde:eta={eta}", schedule, 20)
    sigmas = trajectory.sigmas.tolist()

    def denoise(x, sigma):
        return torch.tanh(1.5 * x / math.hypot(1, sigma) + math.sin(sigma))

    start = unit_noise()().double() * trajectory.start
    noise = unit_noise(1)
    found = [step.x_BCHW for step in trajectory.run(denoise, start, noise=lambda: noise().double())]
    x, noise, seen, lengths = start, unit_noise(1), [], []
    for i, (sigma, lower) in enumerate(pairwise(sigmas)):
        seen.append(denoise(x, sigma))
        if lower == 0:
            x = seen[-1]
        else:
            h = math.log(sigma) - math.log(lower)
            lengths.append(h)
            g = h * (1 + eta)
            x = math.exp(-g) * x + (1 - math.exp(-g)) * seen[-1]
            phi_2 = math.expm1(-g) / g + 1
            if i == 1:
                x = x + phi_2 * (seen[-1] - seen[-2]) / (lengths[-2] / h)
            if i > 1:
                r0, r1 = lengths[-2] / h, lengths[-3] / h
                d0, d1 = (seen[-1] - seen[-2]) / r0, (seen[-2] - seen[-3]) / r1
                x = x + phi_2 * (d0 + (d0 - d1) * r0 / (r0 + r1)) - (phi_2 / g - 0.5) * (d0 - d1) / (r0 + r1)
            x = x + noise().double() * lower * math.sqrt(-math.expm1(-2 * h * eta))
        torch.testing.assert_close(found[i], x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 25])  # those that divide its 50 are trailing timesteps
def test_lcm(steps, prediction_type):
    scheduler = diffusers.LCMScheduler.from_config({**LATENT, "prediction_type": prediction_type})
    scheduler.set_timesteps(steps)
    theirs, generator = unit_noise()(), torch.Generator().manual_seed(1)
    network = Network(scheduler.alphas_cumprod, prediction_type)
    for timestep in scheduler.timesteps:
        output = network(theirs, timestep)
        theirs = scheduler.step(output, timestep, theirs, generator=generator).prev_sample
    ours, timesteps = run_ours("lcm", {**LATENT, "timestep_spacing": "leading"}, steps, prediction_type)
    assert timesteps == pytest.approx(network.timesteps, abs=1e-3)
    assert (ours[-1] - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("name", CLASSES)
def test_options_and_defaults_are_those_of_the_class(name):
    model = {"beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps", "prediction_type"}
    model |= {"flow_shift", "shift", "shift_terminal", "use_flow_sigmas"}
    about_levels = READ - model - {"rescale_betas_zero_snr"}
    parameters = inspect.signature(CLASSES[name]).parameters
    assert sampler(name).options == {key: parameters[key].default for key in about_levels if key in parameters}


def test_ddim_with_linspace_goes_to_the_next_timestep():
    schedule = NoiseSchedule.from_config({**LATENT, **LINSPACE})
    timesteps = schedule.timestep(sampler("ddim").sigmas(schedule, 10)[:-1])
    torch.testing.assert_close(timesteps, torch.linspace(999, 0, 10, dtype=torch.float64).round())


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25, 50, 100])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_number_of_steps_and_calls(name, spacing, steps):
    schedule = NoiseSchedule.from_config({**LATENT, "timestep_spacing": spacing, "steps_offset": 1})
    method = sampler(name)
    calls = []

    def denoise(x, sigma):
        assert sigma > 0
        calls.append(sigma)
        return x / (1 + sigma**2)

    sigmas = method.sigmas(schedule, steps)
    noise = unit_noise()
    taken = list(method.run(denoise, noise() * method.start(schedule, sigmas), sigmas, noise))
    assert len(taken) == steps == len(sigmas) - 1
    assert len(calls) == method.calls(steps) == (2 * steps - 1 if name == "heun" else steps)
    assert taken[-1].sigma == 0 == sigmas[-1]
    assert all(step.x_BCHW.isfinite().all() and step.x_BCHW.dtype == torch.float32 for step in taken)
    assert torch.equal(taken[-1].x_BCHW, taken[-1].clean_BCHW)


@pytest.mark.parametrize("total", [7, 1000])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_any_number_of_steps_is_that_number_or_refused(name, spacing, total):
    schedule = NoiseSchedule.from_config(
        {**LATENT, "num_train_timesteps": total, "timestep_spacing": spacing, "steps_offset": 1}
    )
    for steps in {*range(1, 8), total // 2, total // 2 + 1, total - 1, total}:
        try:
            sigmas = sampler(name).sigmas(schedule, steps)
        except GazeError:
            assert steps >= total - 1
            continue
        assert sigmas.shape == (steps + 1,)
        assert (sigmas.diff() < 0).all()
        assert sigmas[0] <= schedule.sigmas_T[-1]
    for steps in (0, -1, total + 1):
        with pytest.raises(GazeError, match="steps"):
            sampler(name).sigmas(schedule, steps)


def test_every_timestep_can_be_visited():
    schedule = NoiseSchedule.from_config({**LATENT, **TRAILING})
    sigmas = sampler("euler").sigmas(schedule, 1000)
    torch.testing.assert_close(sigmas[:-1].flip(0), schedule.sigmas_T)


def test_unknown_name():
    with pytest.raises(GazeError, match="'euler'"):
        sampler("eular")


def test_runs_do_not_share_anything():
    schedule = NoiseSchedule.from_config(LATENT)
    for method in SAMPLERS.values():
        sigmas = method.sigmas(schedule, 5)

        def run(seed, method=method, sigmas=sigmas):
            noise = unit_noise(seed)
            return method.run(lambda noisy, sigma: torch.tanh(noisy), noise(), sigmas, noise)

        alone = [list(run(seed))[-1].x_BCHW for seed in (0, 1)]
        together = list(zip(run(0), run(1), strict=True))[-1]
        assert all(torch.equal(step.x_BCHW, x) for step, x in zip(together, alone, strict=True))


@pytest.mark.parametrize(
    ("name", "low", "high"), [("euler", 0.9, 1.1), ("ddim", 0.9, 1.1), ("heun", 1.9, 2.2), ("dpmpp_2m", 1.8, 2.2)]
)
def test_order_of_convergence(name, low, high):
    # Pictures from a normal distribution: the best denoiser and the path of the probability flow are known exactly.
    mean, variance, first, last = 0.3, 0.25, 10.0, 0.05
    x = torch.tensor([[-8.0, 3.0, 12.0]], dtype=torch.float64)
    exact = mean + (x - mean) * math.sqrt((variance + last**2) / (variance + first**2))

    def denoise(x, sigma):
        return (variance * x + sigma**2 * mean) / (variance + sigma**2)

    def error(steps):
        sigmas = torch.linspace(math.log(first), math.log(last), steps + 1, dtype=torch.float64).exp()
        *_, end = sampler(name).run(denoise, x, sigmas, unit_noise())
        return (end.x_BCHW - exact).abs().max().item()

    order = math.log2(error(80) / error(320)) / 2
    assert low < order < high


@pytest.mark.parametrize("name", ["euler_ancestral", "ddim:eta=0.5", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_noise_keeps_the_distribution(name):
    # From a unit normal the pictures of a unit normal again: fresh noise must add exactly the variance taken away.
    schedule = NoiseSchedule.from_config({**LATENT, **TRAILING})
    trajectory = prepare(name, schedule, 100)
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(20000, generator=generator)

    start = noise() * math.hypot(1, trajectory.sigmas[0])
    *_, end = trajectory.run(lambda x, sigma: x / (1 + sigma**2), start, noise=noise)
    assert end.x_BCHW.std().item() == pytest.approx(1, abs=0.03)
