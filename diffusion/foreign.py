"""The scheduler classes of diffusers: which fit a model with a table of noise levels, and why the others do not."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .noise import PREDICTION_TYPES

VELOCITY = ("epsilon", "v_prediction")  # what classes without the prediction type "sample" read


@dataclass(frozen=True)
class Foreign:
    """A diffusers class that fits a model with a table of noise levels.

    order: how fast the error falls with the step's length, of a stochastic method without its noise.
    exploding: its x is clean + sigma * noise; else that divided by sqrt(1 + sigma^2).
    calls_per_step: network calls in each step but the last, which has one; extra_calls: how many more from 2 steps on.
    outputs: the prediction types it reads. Any model fits: the denoiser's answer is turned into one of them.
    own_timesteps: it takes the option timestep_spacing and does not read it.
    options: what the name stands for beside the class. needs: a package beside diffusers.
    """

    class_name: str
    order: int
    stochastic: bool = False
    exploding: bool = False
    calls_per_step: int = 1
    extra_calls: int = 0
    outputs: Sequence[str] = PREDICTION_TYPES
    own_timesteps: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: str = ""

    def calls(self, steps: int) -> int:
        """How many times a run of `steps` steps calls the network."""
        return self.calls_per_step * (steps - 1) + 1 + self.extra_calls * (steps > 1)


# A class that samplers.py has under its short name goes by its own name alone.
FOREIGN = {
    "DDIMParallelScheduler": Foreign("DDIMParallelScheduler", 1),
    "DDIMScheduler": Foreign("DDIMScheduler", 1),
    "DDPMParallelScheduler": Foreign("DDPMParallelScheduler", 1, stochastic=True),
    "EulerAncestralDiscreteScheduler": Foreign(
        "EulerAncestralDiscreteScheduler", 1, stochastic=True, exploding=True, outputs=VELOCITY
    ),
    "EulerDiscreteScheduler": Foreign("EulerDiscreteScheduler", 1, exploding=True),
    "HeunDiscreteScheduler": Foreign("HeunDiscreteScheduler", 2, exploding=True, calls_per_step=2),
    "LCMScheduler": Foreign("LCMScheduler", 1, stochastic=True, own_timesteps=True),
    "UniPCMultistepScheduler": Foreign("UniPCMultistepScheduler", 2),
    "ddpm": Foreign("DDPMScheduler", 1, stochastic=True),
    "deis": Foreign("DEISMultistepScheduler", 2),
    "dpmsolver": Foreign(
        "DPMSolverMultistepScheduler", 2, options={"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    ),
    "dpmsolver++": Foreign("DPMSolverMultistepScheduler", 2),
    "dpmsolver_sde": Foreign(
        "DPMSolverSDEScheduler",
        2,
        stochastic=True,
        exploding=True,
        calls_per_step=2,
        outputs=VELOCITY,
        needs="torchsde and scipy",
    ),
    "dpmsolver_singlestep": Foreign("DPMSolverSinglestepScheduler", 2, options={"lower_order_final": True}),
    "kdpm2": Foreign("KDPM2DiscreteScheduler", 2, exploding=True, calls_per_step=2, outputs=VELOCITY),
    "kdpm2_ancestral": Foreign(
        "KDPM2AncestralDiscreteScheduler", 2, stochastic=True, exploding=True, calls_per_step=2, outputs=VELOCITY
    ),
    "lms": Foreign("LMSDiscreteScheduler", 4, exploding=True, needs="scipy"),
    "pndm": Foreign("PNDMScheduler", 4, extra_calls=1, outputs=VELOCITY, options={"skip_prk_steps": True}),
    "sasolver": Foreign("SASolverScheduler", 2, stochastic=True),
    "sde-dpmsolver++": Foreign(
        "DPMSolverMultistepScheduler", 2, stochastic=True, options={"algorithm_type": "sde-dpmsolver++"}
    ),
    "tcd": Foreign("TCDScheduler", 1, stochastic=True, own_timesteps=True),
}
OF_CLASS = {row.class_name: dataclasses.replace(row, options={}) for row in FOREIGN.values()}

FLOW = "it integrates a flow-matching model"
EDM = "it is for networks with EDM's own scalings"
INVERSE = "it goes from a picture to noise"
DISCRETE = "it fills in discrete tokens"
OTHER = "it belongs to another kind of model"
MISFITS = {
    "AmusedScheduler": DISCRETE,
    "BlockRefinementScheduler": DISCRETE,
    "CMStochasticIterativeScheduler": EDM,
    "CogVideoXDDIMScheduler": "its noise table is shifted for video",
    "CogVideoXDPMScheduler": "its noise table is shifted for video",
    "ConsistencyDecoderScheduler": OTHER,
    "CosineDPMSolverMultistepScheduler": EDM,
    "DDIMInverseScheduler": INVERSE,
    "DDPMWuerstchenScheduler": OTHER,
    "DPMSolverMultistepInverseScheduler": INVERSE,
    "DiscreteDDIMScheduler": DISCRETE,
    "EDMDPMSolverMultistepScheduler": EDM,
    "EDMEulerScheduler": EDM,
    "EntropyBoundScheduler": DISCRETE,
    "FlowMapEulerDiscreteScheduler": FLOW,
    "FlowMatchEulerDiscreteScheduler": FLOW,
    "FlowMatchHeunDiscreteScheduler": FLOW,
    "FlowMatchLCMScheduler": FLOW,
    "HeliosDMDScheduler": FLOW,
    "HeliosScheduler": FLOW,
    "IPNDMScheduler": "its noise table is its own, not the model's",
    "KarrasVeScheduler": EDM,
    "LTXEulerAncestralRFScheduler": FLOW,
    "MiniMaxH3Scheduler": FLOW,
    "PiflowScheduler": FLOW,
    "RFD4ProteinaScheduler": OTHER,
    "RePaintScheduler": "it repaints a masked picture",
    "SCMScheduler": FLOW,
    "ScoreSdeVeScheduler": OTHER,
    "ScoreSdeVpScheduler": OTHER,
    "UnCLIPScheduler": OTHER,
    "VQDiffusionScheduler": DISCRETE,
}
