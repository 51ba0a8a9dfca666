"""Every option of a recipe counts: for each one the test that fails when the option does nothing, here or elsewhere."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file

from pipelines import TextToImage
from tests.train.sources import Pictures, recipe_of
from tests.train.tiny import make_pictures, make_vae, open_phase, rows, run_here, tiny_recipe
from train.autoencoder_phase import AutoencoderPhase
from train.config import Recipe
from train.data.stream import Stream
from train.ema import exponential_decay
from train.processes import Processes
from train.run import load

TEXT_PHASE = "test_loop::test_the_text_phase_learns_what_the_captions_show_and_the_diffusion_phase_begins_from_it"
ELSEWHERE = {
    "phase": TEXT_PHASE,
    "resume": "test_checkpoint::test_a_run_begins_from_the_checkpoint_it_is_given",
    "gradient_checkpointing": "test_finetune::test_checkpointed_and_compiled_runs_give_the_same_weights",
    "mixed_precision": "test_loop::test_bf16_trains_float32_weights",
    "compile": "test_finetune::test_checkpointed_and_compiled_runs_give_the_same_weights",
    "log_samples": "test_loop::test_the_log_of_samples_is_of_the_stream_and_outlives_a_stop",
    "trackers": "test_trackers::test_a_run_feeds_its_trackers_and_changes_no_bit",
    "data.folder": "test_loop::test_a_run_leaves_its_recipe_metrics_checkpoints_and_model",
    "data.shards": "test_shards::test_the_recipe_opens_shards",
    "data.table": "test_tables::test_the_recipe_opens_a_folder_of_tables",
    "data.dataset": "test_tables::test_the_recipe_opens_a_data_set",
    "data.drawn": "test_loop::test_drawn_pictures_need_no_data",
    "data.image_column": "test_tables::test_other_columns_of_a_data_set",
    "data.text_column": "test_tables::test_other_columns_of_a_data_set",
    "data.split": "test_tables::test_the_recipe_opens_a_data_set",
    "data.size": "test_cache::test_another_transform_or_autoencoder_is_another_item",
    "data.bucket_step": "test_cache::test_another_transform_or_autoencoder_is_another_item",
    "data.longest": "test_stream::test_longest_bounds_the_sizes",
    "data.crop": "test_stream::test_the_crop_is_where_the_sample_says",
    "data.flip": "test_stream::test_the_share_that_is_asked_for_is_mirrored",
    "data.background": "test_stream::test_transparency_lies_on_the_background",
    "data.caption_dropout": "test_stream::test_captions_are_dropped_and_chosen_anew_at_every_visit",
    "data.held_out": "test_stream::test_the_parts_share_the_pictures_by_their_content",
    "data.cache_latents": "test_cache::test_cached_or_not_gives_the_same_bits",
    "data.cache_text": "test_cache::test_states_of_captions_cached_or_not_are_the_same_bits",
    "model.init_from": "test_finetune::test_only_what_patterns_name_is_trained_averaged_and_kept",
    "model.train": "test_finetune::test_only_what_patterns_name_is_trained_averaged_and_kept",
    "model.lora.rank": "test_lora_training::test_the_base_is_frozen_to_the_bit_and_nothing_of_it_is_kept",
    "model.lora.alpha": "test_lora_training::test_the_file_holds_the_average_and_alpha",
    "model.lora.layers": "test_lora_training::test_layers_that_are_not_there_are_named",
    "model.text_from": TEXT_PHASE,
    "model.text.token_std": "test_loop::test_fresh_token_embeddings_have_the_spread_asked_for",
    "model.mask_padding": "test_objectives::test_padding_is_hidden_in_training_and_sampling",
    "model.scheduler": "test_objectives::test_inputs_and_targets",
    "model.save_as": "test_loop::test_the_export_can_be_half_as_large",
    "model.defaults": "test_finetune::test_what_the_recipe_says_of_the_scheduler_and_defaults_is_exported",
    "objective.density": "test_objectives::test_densities",
    "objective.log_mean": "test_objectives::test_densities",
    "objective.log_std": "test_objectives::test_densities",
    "objective.stratified": "test_objectives::test_densities",
    "objective.weighting": "test_objectives::test_weightings",
    "objective.gamma": "test_objectives::test_weightings",
    "objective.offset_noise": "test_objectives::test_offset_noise",
    "objective.grounding": "test_grounding::test_it_is_added_to_the_loss_as_often_as_the_recipe_says",
    "objective.noises": "test_objectives::test_the_nearest_of_several_noises",
    "optimizer.name": "test_optimizer::test_muon_trains_what_maps_states_to_states",
    "optimizer.learning_rate": "test_optimizer::test_the_learning_rate_is_its_closed_form",
    "optimizer.text_share": "test_optimizer::test_each_group_gets_its_share",
    "optimizer.muon_share": "test_optimizer::test_muon_has_its_momentum_and_its_share_of_the_rate",
    "optimizer.weight_decay": "test_optimizer::test_weight_decay_acts_on_matrices_and_kernels_only",
    "optimizer.betas": "test_optimizer::test_adamw_has_the_recipes_betas",
    "optimizer.momentum": "test_optimizer::test_muon_has_its_momentum_and_its_share_of_the_rate",
    "optimizer.warmup": "test_optimizer::test_the_learning_rate_is_its_closed_form",
    "optimizer.decay": "test_optimizer::test_the_learning_rate_is_its_closed_form",
    "optimizer.decay_from": "test_optimizer::test_the_learning_rate_is_its_closed_form",
    "optimizer.final_share": "test_optimizer::test_the_learning_rate_is_its_closed_form",
    "ema.snapshots_every": "test_snapshots::test_a_run_stores_them_resumes_them_and_exports_any_width",
    "ema.widths": "test_snapshots::test_a_run_stores_them_resumes_them_and_exports_any_width",
    "validation.every": "test_loop::test_validation_on_or_off_gives_the_same_bits",
    "validation.prompts": "test_loop::test_validation_on_or_off_gives_the_same_bits",
    "validation.attention": "test_attention::test_a_run_logs_and_reports_it_and_changes_no_bit",
    "validation.bins": "test_validation::test_bins_and_pictures_are_what_the_recipe_says",
    "validation.judges": "test_best::test_a_run_scores_keeps_and_trains_the_same_bits",
    "validation.judging.every": "test_best::test_how_often_a_run_looks_at_itself",
    "validation.judging.prompts": "test_judges::test_shapes_are_marked_as_gaze_evaluate_scores_them",
    "validation.judging.split": "test_judges::test_shapes_are_marked_as_gaze_evaluate_scores_them",
    "validation.judging.seed": "test_judges::test_each_picture_has_its_seed_and_the_settings",
    "validation.judging.batch": "test_best::test_any_number_of_processes_finds_the_same_with_equally_many_calls",
    "validation.judging.num_inference_steps": "test_judges::test_each_picture_has_its_seed_and_the_settings",
    "validation.judging.guidance_scale": "test_judges::test_each_picture_has_its_seed_and_the_settings",
    "validation.judging.best": "test_best::test_the_best_stays_until_weights_score_as_much",
    "validation.pictures": "test_validation::test_bins_and_pictures_are_what_the_recipe_says",
}

HERE: dict[str, Callable] = {}

OPTIONS = {"out": "elsewhere", "pictures": 48, "batch_size": 16, "gradient_accumulation_steps": 2,
           "checkpoint_every": 16, "keep": 3, "log_every": 1, "ema": {"half_life": 2},
           "optimizer": {"clip": 1e-3, "warmup": 0}}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("places")
    return SimpleNamespace(folder=folder, data=make_pictures(folder / "pictures"), vae=make_vae(folder / "vae"))


@pytest.fixture(scope="module")
def run(places) -> SimpleNamespace:
    """Three steps of two micro-batches, none of the options at its default; and how many samples each loss was of."""
    sizes, loss = [], AutoencoderPhase.loss

    def counted(self, module, samples, u_B=None):
        sizes.append(len(samples))
        return loss(self, module, samples, u_B)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoencoderPhase, "loss", counted)
        out = places.folder / OPTIONS["out"]
        run_here(tiny_recipe(places.folder, places.data, **{**OPTIONS, "out": out}))
    saved = {int(path.name): path for path in sorted((out / "checkpoints").iterdir())}

    def tensors(pictures: int, part: str) -> dict[str, torch.Tensor]:
        return load_file(saved[pictures] / f"{part}-00000.safetensors")

    return SimpleNamespace(out=out, sizes=sizes, saved=[*saved], tensors=tensors)


def diffusion(places, **changes: Any) -> Any:
    """The phase of a recipe with these changes."""
    return open_phase(tiny_recipe(places.folder / "phase", places.data, places.vae, **changes))[1]


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def shows(option: str) -> Callable[[Callable], Callable]:
    """Marks the test of an option that has none elsewhere."""
    return lambda test: HERE.setdefault(option, test)


@shows("out")
def _(run, places):
    assert (run.out / "recipe.yaml").is_file()


@shows("pictures")
def _(run, places):
    assert rows(run.out)[-1]["pictures"] == 48


@shows("batch_size")
def _(run, places):
    assert [row["pictures"] for row in rows(run.out)] == [16, 32, 48]


@shows("gradient_accumulation_steps")
def _(run, places):
    assert run.sizes == [8] * 6


@shows("checkpoint_every")
def _(run, places):
    assert run.saved[-2:] == [32, 48]


@shows("keep")
def _(run, places):
    assert run.saved == [16, 32, 48]


@shows("log_every")
def _(run, places):
    assert [row["pictures"] for row in rows(run.out)] == [16, 32, 48]


@shows("seed")
def _(run, places):
    one, other = (open_phase(tiny_recipe(places.folder, places.data, seed=seed)) for seed in (0, 1))
    assert not torch.equal(flat(one[1].module.state_dict()), flat(other[1].module.state_dict()))
    assert [one[0][n].index for n in range(20)] != [other[0][n].index for n in range(20)]


@shows("optimizer.clip")
def _(run, places):
    moments = {name: value for name, value in run.tensors(16, "optimizer").items() if name.endswith("exp_avg")}
    assert float(flat(moments).norm()) == pytest.approx((1 - 0.9) * 1e-3, rel=1e-3)


@shows("ema.half_life")
def _(run, places):
    before, after, weights = (flat(run.tensors(*of)) for of in ((32, "ema"), (48, "ema"), (48, "model")))
    kept = (after - weights) @ (before - weights) / (before - weights).square().sum()
    assert float(kept) == pytest.approx(exponential_decay(2, 48, 16), rel=0.05)


@shows("data.window")
def _(run, places):
    """Of one shard each, a window shows its pictures before any other."""
    recipe = recipe_of(window=1)
    stream = Stream(Pictures([(16, 16)] * 40, blocks=[10] * 4), recipe, with_pixels=False)
    shards = [stream[n].index // 10 for n in range(40)]
    assert all(len({*shards[n : n + 10]}) == 1 for n in range(0, 40, 10))


@shows("data.workers")
def _(run, places):
    asked, make = [], torch.utils.data.DataLoader.__init__
    recipe = tiny_recipe(places.folder / "workers", places.data, places.vae, data={"workers": 3})

    def alone(self, *args, num_workers=0, **options):
        asked.append(num_workers)
        make(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data.DataLoader, "__init__", alone)
        next(load(recipe, open_phase(recipe)[0], 0, Processes()))
    assert asked == [3, 3, 3], "looking at pictures, encoding them, training"


@shows("data.cache")
def _(run, places):
    kept = places.folder / "kept"
    diffusion(places, data={"cache": kept})
    assert [path.name.split("-")[0] for path in kept.iterdir()] == ["latents"]


@shows("objective.kl_weight")
def _(run, places):
    losses = []
    for weight in (0.0, 1.0, 3.0):
        stream, phase = open_phase(tiny_recipe(places.folder, places.data, objective={"kl_weight": weight}))
        with torch.no_grad():
            losses.append(phase.loss(phase.module, [stream[0]]).double())
    assert float((losses[2] - losses[0]) / (losses[1] - losses[0])) == pytest.approx(3, rel=1e-3)


@shows("model.autoencoder")
def _(run, places):
    options = {"autoencoder": {"block_out_channels": [4, 20]}}
    phase = open_phase(tiny_recipe(places.folder, places.data, model=options))[1]
    assert phase.autoencoder.config.to_diffusers()["block_out_channels"] == (4, 20)


@shows("model.autoencoder_from")
def _(run, places):
    stored = load_file(places.vae / "diffusion_pytorch_model.safetensors")
    assert torch.equal(
        diffusion(places).model.autoencoder.state_dict()["quant_conv.weight"], stored["quant_conv.weight"]
    )


@shows("model.unet")
def _(run, places):
    unet = diffusion(places, model={"unet": {"block_out_channels": [4, 20]}}).model.unet
    assert unet.conv_in.weight.shape[0] == 4


@shows("model.text.vocab_size")
def _(run, places):
    assert diffusion(places, model={"text": {"vocab_size": 520}}).model.text.model.config.vocab_size == 520


@shows("model.text.window")
def _(run, places):
    assert diffusion(places, model={"text": {"window": 9}}).model.text.window == 9


@shows("model.text.width")
def _(run, places):
    assert diffusion(places, model={"text": {"width": 10}}).model.text.width == 10


@shows("model.text.layers")
def _(run, places):
    assert len(diffusion(places, model={"text": {"layers": 2}}).model.text.model.encoder.layers) == 2


@shows("model.text.heads")
def _(run, places):
    assert diffusion(places, model={"text": {"heads": 1}}).model.text.model.config.num_attention_heads == 1


@shows("validation.seed")
def _(run, places):
    options = {"model": {"defaults": {"num_inference_steps": 1}}, "validation": {"prompts": ["a", "b"], "seed": 3}}
    phase = diffusion(places, **options)
    assert torch.equal(phase.pictures([1]), TextToImage(phase.model)("b", seed=4).pixels_BCHW)


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@pytest.mark.parametrize("option", HERE)
def test_every_option_changes_something(option, run, places):
    HERE[option](run, places)


def test_every_option_has_a_test():
    assert not HERE.keys() & ELSEWHERE.keys()
    assert HERE.keys() | ELSEWHERE.keys() == {*leaves(Recipe)}
    for test in {*ELSEWHERE.values()}:
        file, name = test.split("::")
        tree = ast.parse(Path(__file__).with_name(f"{file}.py").read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body), test
