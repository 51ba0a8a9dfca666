"""Every option of the objective does to a recipe's loss what its formula says: noise levels, noise, targets, weights,
what the network is told; the same stream for any number of processes; and models that other code opens."""

import copy
import json

import diffusers
import pytest
import torch
from torch.special import ndtri

from diffusion.errors import GazeError
from diffusion.pretrained import load_model
from pipelines import TextToImage
from tests.train.tiny import open_phase, run_here, tiny_recipe, weights
from train.randomness import normal, randomness

BATCH = 8
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
EDM = {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "sigma_max": 30.0}
SCHEDULERS = {
    "epsilon": {"prediction_type": "epsilon"},
    "v_prediction": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "zero": {"rescale_betas_zero_snr": True},
    "flow": FLOW,
    "edm": EDM,
}


@pytest.fixture(scope="module")
def make(data, vae, tmp_path_factory):
    """A phase and the samples of its first global batch."""

    def make(phase="diffusion", **changes):
        kind = {} if phase == "diffusion" else {"phase": phase}
        recipe = tiny_recipe(tmp_path_factory.mktemp("out"), data, vae, **{"batch_size": BATCH, **kind, **changes})
        stream, phase = open_phase(recipe)
        return phase, [stream[n] for n in range(BATCH)]

    return make


def reweighted(phase, weighting, gamma=5.0):
    """The same phase with another weighting."""
    objective = phase.recipe.objective.model_copy(update={"weighting": weighting, "gamma": gamma})
    changed = copy.copy(phase)
    changed.recipe = phase.recipe.model_copy(update={"objective": objective})
    return changed


class Network(torch.nn.Module):
    """Says zero, and notes what it was given."""

    def forward(self, x_BCHW, timestep_B, tokens, **told):
        self.x, self.timestep, self.told = x_BCHW, timestep_B, told
        return torch.zeros_like(x_BCHW)


def given(phase, samples, u=None):
    """The loss of a network that says zero: what the target weighs; and what the network was given."""
    network = Network()
    return phase.loss(network, samples, u), network


def level(phase, network):
    return phase.model.schedule.sigma(network.timestep)[:, None, None, None]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_inputs_and_targets(make, name):
    phase, samples = make(model={"scheduler": SCHEDULERS[name]})
    clean, noise = phase.latents.draw(samples), phase.latents.normal(samples, "noise")
    loss, network = given(phase, samples)
    sigma = level(phase, network).float()
    root = (1 + sigma**2).sqrt()
    x, target = {
        "epsilon": ((clean + sigma * noise) / root, noise),
        "v_prediction": ((clean + sigma * noise) / root, (noise - sigma * clean) / root),
        "sample": ((clean + sigma * noise) / root, clean),
        "zero": ((clean + sigma * noise) / root, (noise - sigma * clean) / root),
        "flow": ((clean + sigma * noise) / (1 + sigma), noise - clean),
        # Karras et al. 2022, eq. 8 with table 1: (clean - c_skip x) / c_out.
        "edm": ((clean + sigma * noise) / root, (sigma * clean - noise) / root),
    }[name]
    torch.testing.assert_close(network.x, x, rtol=0, atol=1e-4)
    torch.testing.assert_close(loss, target.square().mean((1, 2, 3)), rtol=1e-3, atol=1e-5)
    assert sigma.flatten().unique().numel() == BATCH
    if name == "edm":
        torch.testing.assert_close(network.timestep, sigma.flatten().log() / 4, rtol=1e-4, atol=1e-5)


def test_zero_terminal_snr_is_trained_to_its_end(make):
    u = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 0.998, 0.9999], dtype=torch.float64)
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        options = {"rescale_betas_zero_snr": True, "prediction_type": prediction_type}
        phase, samples = make(model={"scheduler": options})
        for weighting in ("uniform", "min_snr", "soft_min_snr", "edm"):
            loss = reweighted(phase, weighting).loss(phase.module, samples, u)
            loss.sum().backward()
            assert loss.isfinite().all()
            assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in phase.module.parameters())
        _, network = given(phase, samples, u)
        assert network.timestep[-1] == 999
        torch.testing.assert_close(network.x[-1], phase.latents.normal(samples, "noise")[-1], rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_weightings(make, name):
    plain, samples = make(model={"scheduler": SCHEDULERS[name]})
    unweighted, network = given(plain, samples)
    sigma = level(plain, network).flatten()
    c_out_2 = {
        "epsilon": sigma**2,
        "sample": torch.ones_like(sigma),
        "flow": (sigma / (1 + sigma)) ** 2,
    }.get(name, sigma**2 / (1 + sigma**2))
    for weighting, counts in {
        "min_snr": sigma.pow(-2).clamp(max=2.0),
        "soft_min_snr": 1 / (sigma**2 + 0.5),
        "edm": sigma.pow(-2) + 1,
    }.items():
        weighted, _ = given(reweighted(plain, weighting, 2.0), samples)
        torch.testing.assert_close(weighted, (unweighted * counts * c_out_2).float(), rtol=1e-3, atol=0)


def draws(recipe):
    return torch.tensor([randomness(recipe.seed, n, "sigma").random() for n in range(BATCH)], dtype=torch.float64)


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("density", ["uniform", "log_normal"])
def test_densities(make, density, stratified):
    objective = {"density": density, "log_mean": 0.5, "log_std": 0.8, "stratified": stratified}
    phase, samples = make(objective=objective)
    u = draws(phase.recipe)
    if stratified:
        u = (torch.arange(BATCH) + u) / BATCH
    table = phase.model.schedule.sigmas_T
    expected = table[(u * 1000).long()] if density == "uniform" else (0.5 + 0.8 * ndtri(u)).exp()
    _, network = given(phase, samples)
    torch.testing.assert_close(level(phase, network).flatten(), expected, rtol=1e-3, atol=0)
    # Two processes, or accumulation, see parts of the batch.
    _, half = given(phase, samples[1::2])
    assert torch.equal(half.timestep, network.timestep[1::2])
    assert torch.equal(half.x, network.x[1::2])


def test_given_quantiles_replace_drawn_ones(make):
    phase, samples = make(objective={"density": "log_normal"})
    u = torch.linspace(0.1, 0.9, BATCH, dtype=torch.float64)
    loss, network = given(phase, samples, u)
    torch.testing.assert_close(level(phase, network).flatten(), (1.2 * ndtri(u)).exp(), rtol=1e-3, atol=0)
    assert not torch.equal(loss, given(phase, samples)[0])
    assert phase.levels(u) == pytest.approx((1.2 * ndtri(u)).exp().tolist())
    for other in ("text", "autoencoder"):  # they have no noise levels
        changes = {"model": {"autoencoder_from": None, "unet": {}}} if other == "autoencoder" else {}
        phase, samples = make(other, **changes)
        assert torch.equal(phase.loss(phase.module, samples, u), phase.loss(phase.module, samples))
        assert phase.levels(u) == []


def test_offset_noise(make):
    plain, samples = make()
    phase, _ = make(objective={"offset_noise": 0.3})
    _, before = given(plain, samples)
    loss, after = given(phase, samples)
    channels = before.x.shape[1]
    constant = 0.3 * normal(0, samples, "offset", (channels, 1, 1))
    sigma = level(phase, after).float()
    torch.testing.assert_close(after.x - before.x, (constant * sigma / (1 + sigma**2).sqrt()).expand_as(before.x))
    # It belongs to the noise, so the target has it too.
    noise, clean = plain.latents.normal(samples, "noise") + constant, plain.latents.draw(samples)
    target = (noise - sigma * clean) / (1 + sigma**2).sqrt()
    torch.testing.assert_close(loss, target.square().mean((1, 2, 3)), rtol=1e-3, atol=1e-5)
    # A column of its own for each sample and channel, whoever is beside it.
    assert constant.flatten().unique().numel() == BATCH * channels
    assert torch.equal(given(phase, samples[3:5])[1].x, after.x[3:5])


def test_the_nearest_of_several_noises(make):
    phase, samples = make(objective={"noises": 5})
    clean = phase.latents.draw(samples)
    streams = ["noise", "noise 1", "noise 2", "noise 3", "noise 4"]
    each = torch.stack([phase.latents.normal(samples, stream) for stream in streams])
    nearest = (each - clean).square().sum((2, 3, 4)).argmin(0)
    assert len(set(nearest.tolist())) > 1
    noise = each[nearest, torch.arange(BATCH)]
    _, network = given(phase, samples)
    sigma = level(phase, network).float()
    torch.testing.assert_close(network.x, (clean + sigma * noise) / (1 + sigma**2).sqrt(), rtol=0, atol=1e-4)
    assert torch.equal(given(phase, samples[3:5])[1].x, network.x[3:5])


def test_padding_is_hidden_in_training_and_sampling(make, tmp_path):
    """States past an empty prompt's end, start and end token, are changed."""
    for mask in (True, False):
        phase, samples = make(model={"mask_padding": mask}, data={"caption_dropout": 1.0})
        _, network = given(phase, samples)
        assert network.told.keys() == ({"seen_BS"} if mask else set())
        with torch.no_grad():  # a fresh U-Net's residual branches end in zeros
            for parameter in phase.model.unet.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        phase.export(tmp_path / "model")
        defaults = json.loads((tmp_path / "model" / "generation_config.json").read_text())
        assert defaults == ({"mask_padding": True} if mask else {})
        pipe, options = TextToImage(load_model(tmp_path / "model")), {"seed": 1, "num_inference_steps": 2}
        before = phase.loss(phase.module, samples), pipe("", **options).pixels_BCHW
        with torch.no_grad():
            for model in (phase.model, pipe.model):
                model.text.model.get_parameter("embeddings.position_embedding.weight")[2:] += 1
        after = phase.loss(phase.module, samples), pipe("", **options).pixels_BCHW
        assert all(torch.equal(*both) == mask for both in zip(before, after, strict=True))


def test_a_schedule_of_another_kind_has_its_own_options_alone(make):
    assert make(model={"scheduler": FLOW})[0].model.schedule.config == FLOW
    assert make(model={"scheduler": EDM})[0].model.schedule.config == EDM
    assert make(model={"scheduler": {"beta_end": 0.02}})[0].model.schedule.config["beta_start"] == 0.00085
    for options, kind in ((FLOW, "flow"), (EDM, "edm")):
        with pytest.raises(GazeError, match=rf"model\.scheduler\.beta_end is of a schedule of betas, and a.*{kind}"):
            make(model={"scheduler": {**options, "beta_end": 0.02}})
    with pytest.raises(GazeError, match="use_flow_sigmas and prediction_type 'flow_prediction' together"):
        make(model={"scheduler": {"prediction_type": "flow_prediction"}})


@pytest.mark.parametrize("name", ["flow", "edm"])
def test_a_run_from_recipe_to_picture(data, vae, tmp_path, name):
    scheduler, few = SCHEDULERS[name], {"num_inference_steps": 4, "guidance_scale": 2.0}
    objective = {"density": "log_normal", "weighting": "soft_min_snr", "offset_noise": 0.1, "noises": 2}
    recipe = tiny_recipe(tmp_path, data, vae, pictures=32, model={"scheduler": scheduler}, objective=objective)
    folder = run_here(recipe)
    assert all(bool(value.isfinite().all()) for value in weights(tmp_path).values())
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) == scheduler
    pipe = TextToImage.from_pretrained(folder)
    ours = pipe("red square", seed=3, **few)
    assert ours.settings[0]["scheduler"] == "euler"
    assert torch.equal(pipe("red square", scheduler="euler", seed=3, **few).pixels_BCHW, ours.pixels_BCHW)
    if name == "edm":
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
        theirs.set_progress_bar_config(disable=True)
        assert type(theirs.scheduler) is diffusers.EDMEulerScheduler
        generator, size = torch.Generator().manual_seed(3), {"height": 16, "width": 16}
        pixels = theirs("red square", generator=generator, output_type="pt", **size, **few).images * 2 - 1
        assert (pixels - ours.pixels_BCHW.clamp(-1, 1)).abs().max() < 1e-3
