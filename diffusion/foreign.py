"""The scheduler classes of diffusers: which fit a model with a table of noise levels, which a flow-matching model,
which one with EDM's scalings, and why the others fit none."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .scheduler_config import FLOW, PREDICTION_TYPES
from .spacing import LEVEL_SPACINGS, SPACINGS

VELOCITY = ("epsilon", "v_prediction")  # what classes without the prediction type "sample" read


@dataclass(frozen=True)
class Foreign:
    """A diffusers class that fits a kind of model.

    order: how fast the error falls with the step's length, rounded, as benchmarks/convergence.py measures it; of a
        stochastic method that of its formula without the noise, not measured.
    exploding: its x is clean + sigma * noise; else the network's input.
    calls_per_step: network calls in each step but the last, which has one; extra_calls: how many more from 2 steps on.
    outputs: the prediction types it reads. A model that predicts something else
        fits too, if it is of this kind: the denoiser's answer is turned into one of them.
    spacings: the spacings of timesteps that it reads and converges with; none where it has timesteps of its own.
    levels: the spacings of levels that work, where the class has the option.
    levels_of: another class that it hands its options to, for its levels.
    options: what the name stands for beside the class. needs: a package beside diffusers.
    """

    class_name: str
    order: int
    stochastic: bool = False
    exploding: bool = False
    calls_per_step: int = 1
    extra_calls: int = 0
    outputs: Sequence[str] = PREDICTION_TYPES
    spacings: Sequence[str] = SPACINGS
    levels: Sequence[str] = LEVEL_SPACINGS
    levels_of: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: str = ""

    def calls(self, steps: int) -> int:
        """How many times a run of `steps` steps calls the network."""
        return self.calls_per_step * (steps - 1) + 1 + self.extra_calls * (steps > 1)


# They step to timestep - T // n: with linspace that is not the timestep they visit next.
even = partial(Foreign, spacings=("leading", "trailing"))
# A class that samplers.py has under its short name goes by its own name alone.
FOREIGN = {
    "DDIMParallelScheduler": even("DDIMParallelScheduler", 1),
    "DDIMScheduler": even("DDIMScheduler", 1),
    "DDPMParallelScheduler": Foreign("DDPMParallelScheduler", 1, stochastic=True),
    "EulerAncestralDiscreteScheduler": Foreign(
        "EulerAncestralDiscreteScheduler", 1, stochastic=True, exploding=True, outputs=VELOCITY
    ),
    "EulerDiscreteScheduler": Foreign("EulerDiscreteScheduler", 1, exploding=True),
    "HeunDiscreteScheduler": Foreign("HeunDiscreteScheduler", 2, exploding=True, calls_per_step=2),
    "LCMScheduler": Foreign("LCMScheduler", 1, stochastic=True, spacings=()),
    "UniPCMultistepScheduler": Foreign("UniPCMultistepScheduler", 3),
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
    "lms": Foreign("LMSDiscreteScheduler", 3, exploding=True, needs="scipy"),
    "pndm": even("PNDMScheduler", 2, extra_calls=1, outputs=VELOCITY, options={"skip_prk_steps": True}),
    "sasolver": Foreign("SASolverScheduler", 2, stochastic=True),
    "sde-dpmsolver++": Foreign(
        "DPMSolverMultistepScheduler", 2, stochastic=True, options={"algorithm_type": "sde-dpmsolver++"}
    ),
    "tcd": Foreign("TCDScheduler", 1, stochastic=True, spacings=()),
}

flow = partial(Foreign, outputs=(FLOW,), spacings=())
# With the other spacings these classes take their levels, above 1, from a table of betas that no flow model has.
solver = partial(flow, levels=())
FLOW_FOREIGN = {
    "FlowMapEulerDiscreteScheduler": flow("FlowMapEulerDiscreteScheduler", 1),
    "FlowMatchEulerDiscreteScheduler": flow("FlowMatchEulerDiscreteScheduler", 1),
    "FlowMatchHeunDiscreteScheduler": flow("FlowMatchHeunDiscreteScheduler", 2, calls_per_step=2),
    "FlowMatchLCMScheduler": flow("FlowMatchLCMScheduler", 1, stochastic=True),
    "UniPCMultistepScheduler": solver("UniPCMultistepScheduler", 2, levels=("karras",)),
    "deis": solver("DEISMultistepScheduler", 2),
    "dpmsolver++": solver("DPMSolverMultistepScheduler", 2),
    "dpmsolver_singlestep": solver("DPMSolverSinglestepScheduler", 2, options={"lower_order_final": True}),
    "euler_ancestral_rf": flow(
        "LTXEulerAncestralRFScheduler", 1, stochastic=True, levels_of="FlowMatchEulerDiscreteScheduler"
    ),
    "sasolver": solver("SASolverScheduler", 2, stochastic=True),
    "sde-dpmsolver++": solver(
        "DPMSolverMultistepScheduler", 2, stochastic=True, options={"algorithm_type": "sde-dpmsolver++"}
    ),
}

# Their levels are an option of their own, sigma_schedule.
edm = partial(Foreign, exploding=True, outputs=("epsilon", "v_prediction"), spacings=(), levels=())
EDM_FOREIGN = {
    "EDMDPMSolverMultistepScheduler": edm("EDMDPMSolverMultistepScheduler", 2),
    "EDMEulerScheduler": edm("EDMEulerScheduler", 1),
}


def of_class(rows: Mapping[str, Foreign]) -> dict[str, Foreign]:
    """The same by the names of the classes, without what a name stands for beside."""
    return {row.class_name: dataclasses.replace(row, options={}) for row in rows.values()}


OTHER_SCALINGS = "it is for networks with scalings of its own"
INVERSE = "it goes from a picture to noise"
DISCRETE = "it fills in discrete tokens"
STAGES = "it steps through the stages of a pyramid of picture sizes"
OTHER = "it belongs to another kind of model"
MISFITS = {
    "AmusedScheduler": DISCRETE,
    "BlockRefinementScheduler": DISCRETE,
    "CMStochasticIterativeScheduler": OTHER_SCALINGS,
    "CogVideoXDDIMScheduler": "its noise table is shifted for video",
    "CogVideoXDPMScheduler": "its noise table is shifted for video",
    "ConsistencyDecoderScheduler": OTHER,
    "CosineDPMSolverMultistepScheduler": OTHER_SCALINGS,
    "DDIMInverseScheduler": INVERSE,
    "DDPMWuerstchenScheduler": OTHER,
    "DPMSolverMultistepInverseScheduler": INVERSE,
    "DiscreteDDIMScheduler": DISCRETE,
    "EntropyBoundScheduler": DISCRETE,
    "HeliosDMDScheduler": STAGES,
    "HeliosScheduler": STAGES,
    "IPNDMScheduler": "its noise table is its own, not the model's",
    "KarrasVeScheduler": OTHER_SCALINGS,
    "MiniMaxH3Scheduler": "its networks are told 1 - t and predict the flow with the other sign",
    "PiflowScheduler": "its networks predict several pictures at once",
    "RFD4ProteinaScheduler": OTHER,
    "RePaintScheduler": "it repaints a masked picture",
    "SCMScheduler": "its networks are told an angle and predict along a circle",
    "ScoreSdeVeScheduler": OTHER,
    "ScoreSdeVpScheduler": OTHER,
    "UnCLIPScheduler": OTHER,
    "VQDiffusionScheduler": DISCRETE,
}
