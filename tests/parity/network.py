"""A stand-in for a network, and the noise levels of latent diffusion: what samplers are compared on."""

import math

import numpy as np
import torch

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


class Network:
    """A network whose picture depends on the input and, without being smooth to the eye, on the timestep.

    It gets its levels from diffusers' own table and notes the timesteps that it was called with.
    """

    def __init__(self, alphas_cumprod, prediction_type):
        signal = alphas_cumprod.double().clamp(min=1e-20)  # DDIM's is 0 at zero terminal SNR
        self.sigmas = ((1 - signal) / signal).sqrt().numpy()
        self.prediction_type, self.timesteps = prediction_type, []

    def __call__(self, x, timestep):
        timestep = float(timestep)
        self.timesteps.append(timestep)
        sigma = np.interp(timestep, np.arange(len(self.sigmas)), self.sigmas)
        alpha, beta = 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)
        pattern = torch.linspace(-1, 1, x[0].numel()).reshape(x.shape[1:])
        clean = torch.tanh(1.5 * x + math.sin(timestep / 40) + pattern)
        if self.prediction_type == "epsilon":
            return (x - alpha * clean) / beta
        return (alpha * x - clean) / beta if self.prediction_type == "v_prediction" else clean
