"""What a run is said to take: against torch's own counts, the phases themselves, and a run."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion.recompute import recompute
from tests.small_pipeline import small_pipeline
from tests.train.tiny import make_pictures, make_vae, open_phase, run_here, tiny_recipe
from train import __main__ as command
from train import plan as planning
from train.config import Recipe
from train.devices import DEVICES, device_here, find_device, mfu
from train.optimizer import make_optimizer, parameter_groups
from train.plan import compare, drawn, plan, state_bytes, step_seconds, table, utilization
from train.processes import Processes
from train.rehearsal import Rehearsal, rehearse
from train.workload import Cost, Tally, count, make_workload

CPU, META = torch.device("cpu"), torch.device("meta")
BATCH = 4
SD: dict = {"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    small_pipeline().save_pretrained(folder / "model")
    return SimpleNamespace(folder=folder, data=make_pictures(folder / "pictures"), vae=make_vae(folder / "vae"))


@pytest.fixture
def diffusion(places, tmp_path):
    return lambda **changes: tiny_recipe(tmp_path / "run", places.data, places.vae, **changes)


@pytest.fixture
def tuned(places, tmp_path):
    """A fine-tuning recipe."""

    def make(data: dict | None = None, **model) -> Recipe:
        options = {"init_from": str(places.folder / "model")} | model
        values = {"phase": "diffusion", "out": tmp_path / "run", "pictures": 80, "batch_size": 8, "model": options}
        return Recipe.model_validate(values | {"data": {"folder": places.data, "size": 32} | (data or {})})

    return make


# Arithmetic and memory


def real_step(recipe: Recipe):
    """The phase's own loss and its backward, as the loop calls it."""
    samples, phase = open_phase(recipe)
    if recipe.gradient_checkpointing:
        recompute(phase.module)
    batch = [samples[n] for n in range(BATCH)]
    return lambda: phase.loss(phase.module, batch).mean().backward()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"data": {"cache_latents": False}},
        {"phase": "text", "data": {"cache_latents": False}},
        {"phase": "autoencoder"},
        {"phase": "autoencoder", "gradient_checkpointing": True},
    ],
)
def test_a_step_costs_what_the_phase_itself_costs(diffusion, places, tmp_path, changes, monkeypatch):
    monkeypatch.setattr("train.cache.pack", lambda network: None)  # counters see nothing of weights that are laid out
    if changes.get("phase") == "autoencoder":
        recipe = tiny_recipe(tmp_path / "run", places.data, **changes)
    else:
        recipe = diffusion(**changes)
    cost = count(recipe, BATCH)
    # The counter does not know the CPU's fused kernel, but the products that it stands for.
    step, again = real_step(recipe), real_step(recipe)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    with Tally() as tally:
        again()
    assert cost.flops == counter.get_total_flops()
    assert (cost.flops > cost.model_flops) == recipe.gradient_checkpointing
    assert cost.bytes == pytest.approx(tally.most, rel=0.15)


def test_the_arithmetic_grows_with_the_batch_and_checkpointing_saves_memory(diffusion):
    one, two, again = count(diffusion(), 2), count(diffusion(), 4), count(diffusion(gradient_checkpointing=True), 4)
    assert two.flops == 2 * one.flops
    assert again.model_flops == two.flops < again.flops
    assert again.bytes < two.bytes
    assert count(diffusion(mixed_precision="bf16"), 4).bytes < two.bytes


def counted(recipe: Recipe) -> tuple[int, int]:
    """FLOPs of a step, and the trained parameters, of real networks."""
    work = make_workload(recipe, CPU)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work.forward(BATCH).sum().backward()
    return counter.get_total_flops(), sum(p.numel() for p in work.module.parameters() if p.requires_grad)


def test_what_is_frozen_costs_less(tuned):
    """All of the U-Net, its cross-attention, LoRA; text read in each step, remembered, or trained too."""
    recipes = {
        "unet": tuned(),
        "cross": tuned(train=["unet.*attn2*"]),
        "lora": tuned(lora={"rank": 2}),
        "uncached": tuned(data={"cache_text": False}),
        "text": tuned(train=["*"]),
    }
    found = {name: count(recipe, BATCH).flops for name, recipe in recipes.items()}
    real = {name: counted(recipe) for name, recipe in recipes.items()}
    assert found == {name: flops for name, (flops, _) in real.items()}
    assert found["cross"] < found["unet"] < found["uncached"] < found["text"]
    assert found["lora"] < found["unet"]
    assert plan(recipes["lora"], "h100")["trained"] == real["lora"][1]
    assert 0 < real["lora"][1] < real["cross"][1] < real["unet"][1] < real["text"][1]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizers_state_is_as_large_as_said(diffusion, name):
    recipe = diffusion(optimizer={"name": name})
    module = make_workload(recipe, CPU).module
    optimizer = make_optimizer(module, recipe.optimizer)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    groups = parameter_groups(make_workload(recipe, META).module, recipe.optimizer)
    assert state_bytes(groups, name) == pytest.approx(4 * sum(value.numel() for value in states), rel=0.01)


def test_memory_is_the_sum_of_its_parts_and_sharding_divides_it(diffusion):
    recipe = diffusion(batch_size=16, ema={"snapshots_every": 8})
    one, two = plan(recipe, "h100"), plan(recipe, "h100", 2)
    shared = plan(recipe, "h100", 2, shard=True)
    trained = 4 * one["trained"]
    memory = one["memory"]
    assert memory["peak"] == sum(memory[name] for name in ("weights", "optimizer", "averages", "step"))
    assert memory["weights"] == 4 * one["parameters"]
    assert memory["averages"] == 3 * trained
    assert plan(diffusion(), "h100")["memory"]["averages"] == trained
    assert two["memory"]["step"] == count(recipe, 8).bytes + trained, "gradients travel in copies"
    assert shared["memory"]["optimizer"] == two["memory"]["optimizer"] // 2
    assert shared["memory"]["averages"] == two["memory"]["averages"] // 2
    assert shared["memory"]["peak"] < two["memory"]["peak"]
    later = plan(diffusion(batch_size=16, gradient_accumulation_steps=2), "h100")
    assert later["memory"]["step"] == count(recipe, 8, keep=False).bytes + trained, (
        "gradients of the micro-batch before"
    )
    assert shared["memory"]["step"] == count(recipe, 8, keep=False).bytes + trained // 2
    assert plan(diffusion(optimizer={"name": "adamw_8bit"}), "h100")["memory"]["optimizer"] == 2 * one["trained"]


def test_stable_diffusion_takes_what_is_published(diffusion):
    """.80 TFLOP a forward at 512 pixels, three times that with backward; MLPerf's pictures per second on an H100."""
    vae = {"autoencoder_from": None, "text": {"width": 768, "heads": 12, "window": 77}}
    recipe = diffusion(batch_size=32, mixed_precision="bf16", data={"size": 256}, model=vae | {"unet": SD | {
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "layers_per_block": 2, "norm_num_groups": 32,
    }})  # fmt: skip
    found = plan(recipe, "h100", price=2.5)
    assert found["flops_per_picture"] == pytest.approx(3 * 0.80e12, rel=0.02)  # latents of 64x64, as at 512 pixels
    assert 130 < found["pictures_per_second"] < 155
    assert found["fits"]
    assert found["days"] == pytest.approx(80 / found["pictures_per_second"] / 86400)
    assert found["cost"] == pytest.approx(found["days"] * 24 * 2.5)


# Time


def test_what_judges_have_drawn_is_told_beside_the_time(diffusion):
    judging = {"prompts": 6, "num_inference_steps": 3, "guidance_scale": 1}

    def recipe(**changes):
        return diffusion(validation={"every": 60, "judges": ["shapes"], "judging": judging | changes})

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        make_workload(diffusion(), CPU).forward(BATCH)
    cost, forward = count(diffusion(), BATCH), counter.get_total_flops()
    once = drawn(recipe(), cost)
    assert once == pytest.approx(6 * 2 / 80 * 3 * forward), "after 60 pictures and at the end, 80"
    assert drawn(recipe(every=20, guidance_scale=2), cost) == pytest.approx(4 * once)
    assert drawn(recipe(guidance_scale=None, num_inference_steps=None), cost) == pytest.approx(100 / 3 * once)
    assert drawn(diffusion(), cost) == 0
    found = plan(recipe(), "h100")
    assert found["judges"] == pytest.approx(once / cost.model_flops)
    assert "judges      0.15 times the arithmetic of training" in table(found)
    assert "judges" not in table(found | {"judges": 0.0})


def test_a_steps_time_is_its_arithmetic_unless_kernels_or_gradients_are_slower(diffusion):
    recipe, device = diffusion(mixed_precision="bf16"), DEVICES["h100"]
    rate = 0.37 * 989e12
    long, short = Cost(10**15, 10**15, 0, 0, 1000), Cost(10**9, 10**9, 0, 0, 1000)
    assert step_seconds(device, recipe, long, 0, 0, 1) == pytest.approx(1e15 / rate)
    assert step_seconds(device, recipe, long, 1e15, 0, 1) == pytest.approx(2e15 / rate)
    assert step_seconds(device, diffusion(), long, 0, 0, 1) == pytest.approx(1e15 / (0.37 * 67e12))
    twice = diffusion(mixed_precision="bf16", gradient_accumulation_steps=2)
    assert step_seconds(device, twice, long, 0, 0, 1) == pytest.approx(2e15 / rate)
    assert step_seconds(device, recipe, short, 0, 0, 1) == pytest.approx(1000 * 8e-6)
    hidden = step_seconds(device, recipe, long, 0, 4 * 10**9, 8)
    assert hidden == pytest.approx(1e15 / rate), "beside the backward pass"
    assert step_seconds(device, recipe, short, 0, 4 * 10**9, 8) == pytest.approx(
        0.008 + 2 * 4e9 * 7 / 8 / 450e9 - 2 / 3 * 0.008
    )
    between = step_seconds(device, recipe, short, 0, 4 * 10**9, 16)
    assert between == pytest.approx(0.008 + 2 * 4e9 * 15 / 16 / 400e9 - 2 / 3 * 0.008), "slower between machines"


def test_muons_arithmetic_takes_time(diffusion):
    speeds = [
        plan(diffusion(optimizer={"name": name}, model={"unet": {"block_out_channels": [64, 512]}}), "rtx3090")
        for name in ("adamw", "muon")
    ]
    assert speeds[1]["pictures_per_second"] < speeds[0]["pictures_per_second"]


def test_this_machine_is_measured_and_the_rest_follows(diffusion, monkeypatch):
    recipe = diffusion(batch_size=16, gradient_accumulation_steps=4)
    monkeypatch.setattr(planning, "rehearse", lambda recipe, batch, device: Rehearsal(0.5, 2.0))
    assert plan(recipe, "this")["pictures_per_second"] == pytest.approx(16 / (4 * 0.5 + 2))
    found = plan(recipe, "this", 2)
    assert found["micro_batch"] == 2
    assert found["memory"]["device"] > 1e8


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("phase", ["diffusion", "text"])
def test_every_phase_can_be_rehearsed(diffusion, monkeypatch, phase, name):
    monkeypatch.setattr("train.rehearsal.ENOUGH", 0.0)
    recipe = diffusion(phase=phase, mixed_precision="bf16", optimizer={"name": name}, ema={"snapshots_every": 8})
    state = torch.get_rng_state()
    assert min(rehearse(recipe, 2, CPU)) > 0
    assert torch.equal(torch.get_rng_state(), state)


# The share of a device's peak


def test_the_share_of_the_peak(monkeypatch):
    assert mfu(1e12, 100, CPU) is None
    named = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "NVIDIA L40S": "l40s",
        "NVIDIA L4": "l4",
    }
    for called, name in named.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, called=called: called)
        assert device_here(torch.device("cuda")) is DEVICES[name]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert mfu(2.4e12, 100, torch.device("cuda")) == pytest.approx(240 / 989)
    assert mfu(2.4e12, 10, torch.device("cuda"), "no") == pytest.approx(24 / 67)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Quadro P600")
    assert mfu(2.4e12, 100, torch.device("cuda")) is None


def test_the_log_tells_the_share_of_all_devices_peaks(diffusion, monkeypatch):
    """Of two H100, so to say; and nothing where no peak is known, or by the processes that write no log."""
    recipe = diffusion(pictures=8)
    run_here(recipe)
    assert "mfu" not in json.loads((recipe.out / "metrics.jsonl").read_text())
    assert utilization(recipe, Processes(0, 2, CPU))(100) is None
    for place in ("train.plan", "train.devices"):
        monkeypatch.setattr(f"{place}.device_here", lambda device: DEVICES["h100"])
    expected = count(recipe, 8).model_flops / 8 * 100 / 67e12
    assert utilization(recipe, Processes(0, 2, CPU))(200) == pytest.approx(expected)
    assert utilization(recipe, Processes(1, 2, CPU))(200) is None
    again = recipe.model_copy(update={"out": recipe.out.with_name("again")})
    run_here(again)
    line = json.loads((again.out / "metrics.jsonl").read_text())
    assert line["mfu"] == pytest.approx(expected * line["pictures_per_second"] / 100)


def test_every_device_says_where_its_share_comes_from():
    assert all(device.source and 0 < device.share < 1 and device.half > device.single for device in DEVICES.values())


# How wrong the plan was


def save_plan(recipe, pictures_per_second):
    recipe.out.mkdir()
    saved = {
        "pictures_per_second": pictures_per_second,
        "memory": {"peak": 9e8},
        "identity": recipe.identity(),
        "count": 1,
        "gpu": "h100",
    }
    (recipe.out / "plan.json").write_text(json.dumps(saved))


def test_a_run_can_say_how_wrong_the_plan_was(diffusion):
    recipe = diffusion()
    assert compare(recipe, {"pictures_per_second": 10}, 1) == ""
    save_plan(recipe, 12.0)
    assert compare(recipe, {"pictures_per_second": 10, "memory": 10**9}, 1) == (
        "pictures per second: planned 12, measured 10 (the plan was 20.0% too high); "
        "memory: planned 9e+08, measured 1e+09 (the plan was 10.0% too low)"
    )
    assert compare(recipe, {}, 1) == "", "a run that found itself at its end has measured nothing"
    assert "for 1 of h100" in compare(recipe, {"pictures_per_second": 10}, 2)
    assert "another recipe" in compare(diffusion(seed=1), {"pictures_per_second": 10}, 1)
    (recipe.out / "plan.json").write_text("{}")
    assert "cannot be read" in compare(recipe, {"pictures_per_second": 10}, 1)


def test_a_run_that_ends_says_how_wrong_the_plan_was(diffusion, capfd):
    """Once, of the speed; a CPU's memory holds more than the plan counts."""
    recipe = diffusion(pictures=24, log_every=8)
    save_plan(recipe, 1e9)
    run_here(recipe)
    lines = [json.loads(line) for line in (recipe.out / "metrics.jsonl").read_text().splitlines()]
    median = sorted(line["pictures_per_second"] for line in lines)[1]
    said = [line for line in capfd.readouterr().err.splitlines() if "planned" in line]
    assert said == [compare(recipe, {"pictures_per_second": median}, 1)]


# The command


@pytest.fixture
def ask(diffusion, tmp_path, monkeypatch, capsys):
    def asked(*words: str, **changes):
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(diffusion(**changes).model_dump(mode="json")))
        monkeypatch.setattr("sys.argv", ["train", "plan", str(file), *words])
        monkeypatch.setattr("warnings.showwarning", None)
        code = command.main()
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return asked


def test_the_command_prints_a_table_or_json_and_saves(ask, diffusion):
    code, out, err = ask("--gpu", "h100", "--count", "8", "batch_size=16", "--price", "2.5")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == [
        "parameters", "arithmetic", "memory", "batch", "speed", "time", "cost",
    ]  # fmt: skip
    assert "2 pictures at once on each of 8 x h100" in out
    assert "MLPerf" in out
    code, out, err = ask("--gpu", "a100", "--json", "--save")
    found = json.loads(out)
    assert (found["count"], found["cost"], found["fits"]) == (1, None, True)
    assert compare(diffusion(), {"pictures_per_second": found["pictures_per_second"]}, 1).endswith("0.0% too low)")


@pytest.mark.parametrize(
    "words, says, hint",
    [
        (["--gpu", "h10"], "no device is called 'h10'", "'h100'"),
        (["--gpu", "h100", "--count", "0"], "--count is 0", "--count 1"),
        (["--gpu", "h100", "--count", "-2"], "--count is -2", "--count 1"),
        (["--gpu", "h100", "--count", "3"], "batch_size 8 does not divide by 3 devices", "batch_size=9"),
        (["--gpu", "h100", "--price", "-1"], "--price is -1", "2.5"),
        (["--gpu", "h100", "--price", "nan"], "--price is nan", "2.5"),
        (["--gpu", "h100", "data.size=15"], "data.size 15 does not divide by 2", "data.size=14"),
        (["--gpu", "h100", "model.autoencoder_from=nowhere"], "nowhere", ""),
        (["--gpu", "h100", "optimizer.nam=x"], "nam", "'name'"),
    ],
)
def test_bad_words_are_answered(ask, words, says, hint):
    code, out, err = ask(*words)
    assert (code, out) == (1, "")
    assert says in err
    assert hint in err


def test_a_run_that_does_not_fit_says_what_to_change(ask, diffusion, monkeypatch):
    step = count(diffusion(batch_size=64), 64).bytes
    tight = find_device("h100")._replace(memory=0.6 * step / 1e9)
    monkeypatch.setitem(DEVICES, "h100", tight)
    code, out, err = ask("--gpu", "h100", batch_size=64)
    assert code == 1
    assert out.startswith("parameters"), "the plan is printed all the same"
    assert "the run does not fit" in err
    changes = err.split("try: ")[1].split()
    assert [change.split("=")[0] for change in changes] == ["gradient_accumulation_steps"]
    assert ask("--gpu", "h100", *changes, batch_size=64)[0] == 0
    monkeypatch.setitem(DEVICES, "h100", tight._replace(memory=1e-6))
    assert "a smaller model" in ask("--gpu", "h100", batch_size=64)[2]
