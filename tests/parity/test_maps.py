"""What our recorder takes down is what diffusers' own attention computes, layer by layer."""

import pytest
import torch

from diffusion.attention_maps import Recorder, by_word, read_words, spread
from diffusion.attention_sites import sites
from diffusion.unet import UNet
from tests.narrow_models import FAMILIES, narrow_pipeline

OF = (2, 0, 0, 1, 1, 3, 3, 3)


class Written:
    """diffusers' attention with its weights written out and kept."""

    def __init__(self, name, kept):
        self.name, self.kept = name, kept

    def __call__(self, attention, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attention.head_to_batch_dim(project(x))
            for project, x in ((attention.to_q, hidden_states), (attention.to_k, source), (attention.to_v, source))
        )
        weights = attention.get_attention_scores(q, k, attention_mask)
        self.kept[self.name] = weights.unflatten(0, (-1, attention.heads)).mean(1)
        out = attention.batch_to_head_dim(weights @ v)
        return attention.to_out[1](attention.to_out[0](out))


@pytest.mark.parametrize("size", [(16, 16), (11, 7)])
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_of_diffusers(tmp_path, family, size):
    theirs = narrow_pipeline(family).unet.eval()
    theirs.save_pretrained(tmp_path / "unet")
    ours = UNet.from_pretrained(tmp_path / "unet").eval()
    kept = {}
    names = [name.removesuffix(".processor") for name in theirs.attn_processors]
    theirs.set_attn_processor({f"{name}.processor": Written(name, kept) for name in names})
    torch.manual_seed(0)
    x_BCHW, context_BSE = torch.randn(2, 4, *size), torch.randn(4, len(OF), ours.config.cross_attention_dim)
    vector_BV = torch.randn(4, ours.config.projection_class_embeddings_input_dim) if family == "sdxl" else None
    added = None
    if vector_BV is not None:
        ids = torch.arange(24.0).view(4, 6)
        added = {"text_embeds": vector_BV[:, : -6 * 32], "time_ids": ids}
        vector_BV = ours.vector(added["text_embeds"], ids)
    with torch.inference_mode():
        theirs(x_BCHW.repeat(2, 1, 1, 1), 500, context_BSE, added_cond_kwargs=added)
        places = sites(ours, cross=True)
        recorder = Recorder(places, read_words(torch.tensor([OF, OF]), 4), steps=(1,))
        # As guidance calls it: two pictures, four rows of text, of which the last two count.
        rows = 1 if vector_BV is None else 2
        recorder.around(lambda x, sigma: ours(x.repeat(rows, 1, 1, 1), sigma, context_BSE, vector_BV))(x_BCHW, 500.0)
        recorded = recorder.end_step()
        expected = [spread(by_word(kept[site.name][2:], OF, 4), site.size(*size), size) for site in places]
    assert recorded.steps == (1,)
    assert torch.allclose(recorded.mean_BWHW, torch.stack(expected).mean(0), atol=1e-5)
