"""A config.json with any option set to anything: an error of ours, or a model that can be made, at once."""

import itertools
import json
import math
import time

import pytest
import torch

from diffusion.autoencoder import Autoencoder, AutoencoderConfig
from diffusion.clip import CLIPText, CLIPTextConfig
from diffusion.errors import GazeError
from diffusion.unet import UNet, UNetConfig
from tests.narrow_models import narrow_pipeline

# Config, module, and a part of the names of the options that are tried.
KINDS = {
    "sd1 unet": (UNetConfig, UNet, ""),
    "sdxl unet": (UNetConfig, UNet, "embed"),
    "sd1 vae": (AutoencoderConfig, Autoencoder, ""),
    "sd1 text_encoder": (CLIPTextConfig, CLIPText, ""),
}
VALUES = [
    *(0, -1, 10**9, 2**63, 10**400, 999, 0.5, math.nan, math.inf, True, None, "", "../x", "\0", {}, {"a": 1}),
    *([], [0], [-1], [10**9], [10**9] * 2, [32] * 2000, [[1]], [None], ["x"], [1.5], ["DownBlock2D"] * 2, [32, "64"]),
]


@pytest.mark.parametrize("name", KINDS)
def test_every_option_may_be_hostile(name):
    kind, module, asked = KINDS[name]
    family, part = name.split()
    written = getattr(narrow_pipeline(family), part).config
    config = json.loads(written.to_json_string()) if part == "text_encoder" else dict(written)
    kind.from_diffusers(config)
    for option, value in itertools.product([option for option in config if asked in option], VALUES):
        begin = time.process_time()
        try:
            read = kind.from_diffusers(config | {option: value})
            with torch.device("meta"):
                module(read)
        except GazeError as error:
            said = str(error)
        else:
            said = ""
        assert time.process_time() - begin < 1, (option, value)
        assert len(said.splitlines()) <= 3, (option, value)
