"""`dancegrpo doctor`: predictions against what a run needs, counts against closed forms, what is missing."""

from __future__ import annotations

import gc
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from typer.testing import CliRunner

from dancegrpo.cli import app
from dancegrpo.config import load_config
from dancegrpo.doctor import Plan, diagnose
from dancegrpo.doctor.advice import advise, total
from dancegrpo.doctor.architectures import architecture, shared_parts, shipped_architecture, shipped_names
from dancegrpo.doctor.calibrate import Speed
from dancegrpo.doctor.checks import check_run
from dancegrpo.doctor.counting import KINDS, Counter
from dancegrpo.doctor.passes import Work
from dancegrpo.doctor.places import PHASES
from dancegrpo.doctor.predict import Prediction, Predictor
from dancegrpo.doctor.pretend import CudaAutocast, Pretender, build_network
from dancegrpo.doctor.seconds import Seconds, _signal, by_operations, by_trial, run_seconds
from dancegrpo.doctor.text import as_table
from dancegrpo.errors import ConfigError, ModelError
from dancegrpo.memory import TensorBytes
from dancegrpo.policies import load_policy
from dancegrpo.recipes import recipe_names
from dancegrpo.rewards import FunctionReward, Scores
from dancegrpo.trainer import Trainer

TINY = [
    "prompts.per_iteration=2",
    "prompts.cache_mb=0",
    "rollout.group_size=4",
    "rollout.batch_size=4",
    "update.micro_batch_size=8",
    "evaluation.num_prompts=0",
    "tracking.backend=none",
]
SHAPES = ("shapes-flux", "shapes-sd", "shapes-video", "shapes-i2v", "shapes-t2i")


@pytest.fixture(scope="module")
def flux() -> Predictor:
    return Predictor(architecture(load_config("shapes-flux").model), torch.device("cpu"))


@pytest.fixture(scope="module")
def apart() -> Predictor:
    """The same on an accelerator, whose memory is not the host's."""
    return Predictor(architecture(load_config("shapes-flux").model), torch.device("cuda"))


def mean_brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A score that differs between any two samples: every pair is trained."""
    return images.flatten(1).mean(1)


def tracked(config: Any) -> dict[str, int]:
    """Peak of live bytes of each phase of a real iteration that is not the first."""
    trainer = Trainer(config, {"bright": FunctionReward(mean_brightness)})
    trainer.iterate(0)
    gc.collect()
    networks = [part for part in trainer.policy.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    held = [tensor for part in networks for tensor in (*part.parameters(), *part.buffers())]
    held += [tensor for kind in trainer.updater.state_dict().values() for tensor in kind.values()]
    held += trainer.updater._landmarks.values()
    peaks: dict[str, int] = {}
    with TensorBytes(held) as tracker:

        def around(owner: Any, name: str, phase: str, before: str) -> None:
            plain: Callable[..., Any] = getattr(owner, name)

            def called(*args: Any, **kwargs: Any) -> Any:
                peaks[before] = max(peaks.get(before, 0), tracker.restart())
                try:
                    return plain(*args, **kwargs)
                finally:
                    peaks[phase] = max(peaks.get(phase, 0), tracker.restart())

            setattr(owner, name, called)

        around(trainer.policy, "decode", "decode", "rollout")
        around(trainer.updater, "update", "update", "rollout")
        trainer.iterate(1)
    return peaks


def test_peaks_are_those_of_a_real_iteration(flux: Predictor) -> None:
    check_peaks("shapes-flux", TINY, flux)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SHAPES)
def test_peaks_of_every_miniature_recipe(recipe: str) -> None:
    overrides = ["evaluation.num_prompts=0", "tracking.backend=none", "prompts.cache_mb=0"]
    check_peaks(recipe, overrides, Predictor(architecture(load_config(recipe).model), torch.device("cpu")))


@pytest.mark.slow
def test_peaks_of_a_unet_are_those_of_a_real_iteration() -> None:
    check_peaks("shapes-sd", TINY, Predictor(architecture(load_config("shapes-sd").model), torch.device("cpu")))


def check_peaks(recipe: str, overrides: list[str], predictor: Predictor) -> None:
    config = load_config(recipe, overrides)
    config = load_config(config.model_dump() | {"rewards": {"bright": {"judge": "python:mean_brightness"}}})
    true, told = tracked(config), predictor(config)
    assert told.iteration_peak == pytest.approx(max(true.values()), rel=0.15)
    for phase in ("rollout", "decode", "update"):
        assert told.peak[phase] == pytest.approx(true[phase], rel=0.15), phase


def recipes() -> list[Any]:
    """All that ship; the large models' take most of a minute each."""
    return [
        name if name.startswith("shapes-") else pytest.param(name, marks=pytest.mark.slow) for name in recipe_names()
    ]


@pytest.mark.parametrize("recipe", recipes())
def test_every_shipped_recipe_is_predicted_without_a_network(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    started = time.process_time()
    found = diagnose(recipe, plan=Plan(memory=1000, tflops=100))
    assert [phase["name"] for phase in found.phases] == list(PHASES)
    assert found.fits
    assert found.run_seconds is not None
    assert found.run_seconds > 0
    assert time.process_time() - started < 120


def test_a_base_in_8_bits_is_predicted_as_it_is_stored(flux: Predictor) -> None:
    config = load_config("shapes-flux", ["model.lora={rank: 4}", "model.quantize=int8"])
    policy: Any = load_policy(config.model, config.rollout)
    told = flux(config)
    for name in ("transformer", "text_encoder_2"):
        part = getattr(policy.pipeline, name)
        assert told.resident[name] == sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))


@pytest.mark.slow
def test_the_recipe_for_24_gb_fits_them() -> None:
    told = Predictor(architecture(load_config("flux-hps-24gb").model), torch.device("cuda"))(
        load_config("flux-hps-24gb")
    )
    assert total(told) <= 22.5e9  # what CUDA and an allocator's fragments take is not in it


@pytest.mark.parametrize(
    ("model", "part", "count"),
    [
        ("flux1-dev", "transformer", 11_901_408_320),
        ("flux1-dev", "text_encoder_2", 4_762_310_656),
        pytest.param("hunyuan-video", "transformer", 12_821_012_544, marks=pytest.mark.slow),
        ("stable-diffusion-1", "unet", 859_520_964),
        pytest.param("stable-diffusion-1", "vae", 83_653_863, marks=pytest.mark.slow),
        pytest.param("stable-diffusion-1", "text_encoder", 123_060_480, marks=pytest.mark.slow),
        pytest.param("stable-diffusion-xl", "unet", 2_567_463_684, marks=pytest.mark.slow),
        pytest.param("stable-diffusion-xl", "text_encoder_2", 694_659_840, marks=pytest.mark.slow),
        pytest.param("wan2.1-t2v-1.3b", "transformer", 1_418_996_800, marks=pytest.mark.slow),
        pytest.param("wan2.1-t2v-1.3b", "text_encoder", 5_680_910_336, marks=pytest.mark.slow),
        pytest.param("qwen-image", "transformer", 20_430_401_088, marks=pytest.mark.slow),
    ],
)
def test_published_models_have_as_many_parameters_as_published(model: str, part: str, count: int) -> None:
    found = shipped_architecture(model).parts[part]
    assert found is not None
    network = build_network(found)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_shared_parts_are_all_used() -> None:
    folder = shipped_names()
    named = {id(part.config) for name in folder for part in shipped_architecture(name).parts.values() if part}
    assert all(id(entry.get("config")) in named for entry in shared_parts().values())


def test_a_model_of_unknown_sizes_is_one_line() -> None:
    config = load_config("shapes-flux", ["model.path=someone/else"])
    with pytest.raises(ModelError, match=r"^model\.path=someone/else is not here, and its sizes are not"):
        architecture(config.model)


# ------------------------------------------------------------------------------------------------- counting, pretending


def test_sequences_that_cannot_be_split_are_refused_as_the_run_would(flux: Predictor) -> None:
    config = load_config("shapes-flux", [*TINY, "parallel.context=7"])
    flux.gpus = 7
    with pytest.raises(ConfigError, match=r"parallel\.context=7 does not divide"):
        flux(config)
    flux.gpus = 1


def test_products_are_counted_as_two_operations_each_and_twice_again_backwards() -> None:
    pretender = Pretender()
    layer: Any = pretender.dress(torch.nn.Linear(6, 10, bias=False, device="meta"))
    with Counter(layer.parameters()) as counter:
        layer(pretender.empty(4, 6).requires_grad_()).sum().backward()
    assert counter.flops["product"] == 3 * 2 * 4 * 6 * 10


def test_pretended_and_real_tensors_peak_alike() -> None:
    real = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8))
    pretender = Pretender()
    with torch.device("meta"):
        bare = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8))
    pretended = pretender.dress(bare)
    peaks = []
    for network, x in ((real, torch.randn(32, 64)), (pretended, pretender.empty(32, 64))):
        with Counter(network.parameters()) as counter:
            network(x).square().mean().backward()
        peaks.append(counter.peak)
    assert peaks[0] == peaks[1]


def test_tied_weights_stay_tied() -> None:
    with torch.device("meta"):
        first, second = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
        second.weight = first.weight
    both: Any = Pretender().dress(torch.nn.ModuleList([first, second]))
    assert both[0].weight is both[1].weight


def test_an_accelerators_autocast_holds_where_activations_are_recomputed() -> None:
    pretender = Pretender()
    norm: Any = pretender.dress(torch.nn.LayerNorm(8, device="meta"))
    x = pretender.empty(2, 8, dtype=torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), CudaAutocast():
        out = torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False)
    with CudaAutocast():
        out.sum().backward()  # torch compares what is recomputed with what was
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_an_accelerators_autocast_keeps_norms_in_float32() -> None:
    x = Pretender().empty(2, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.layer_norm(x, (8,)).dtype == torch.bfloat16
        with CudaAutocast():
            assert torch.nn.functional.layer_norm(x, (8,)).dtype == torch.float32


# --------------------------------------------------------------------------------------------------- what settings save


def test_offloaded_parts_lie_on_the_device_only_while_they_work(apart: Predictor) -> None:
    plain, lent = (apart(load_config("shapes-flux", [*TINY, f"model.offload={w}"])) for w in ("false", "true"))
    idle = sum(size for name, size in plain.resident.items() if name in ("vae", "text_encoder", "text_encoder_2"))
    assert idle > 0
    assert plain.peak["update"] - lent.peak["update"] == idle
    assert plain.peak["decode"] - lent.peak["decode"] == idle - plain.resident["vae"]
    assert lent.host["update"] - plain.host["update"] == idle


def test_transitions_in_the_hosts_memory_leave_the_device(apart: Predictor) -> None:
    config = load_config("shapes-flux", TINY)
    plain, kept = apart(config), apart(load_config(config, ["rollout.store=host"]))
    latents = 2 * 2 * 4 * 2 * (16 * 32) * 4  # before and after; prompts, samples, trained steps; elements; bytes
    assert plain.peak["update"] - kept.peak["update"] == latents
    assert kept.host["update"] - plain.host["update"] == latents


def test_on_one_memory_offloading_changes_nothing(flux: Predictor) -> None:
    config = load_config("shapes-flux", TINY)
    assert flux(load_config(config, ["model.offload=true", "rollout.store=host"])).peak == flux(config).peak


def test_advice_is_what_its_settings_give_and_ends_where_it_fits(flux: Predictor) -> None:
    config = load_config("shapes-flux", TINY)
    capacity = int(0.9 * total(flux(config)))
    steps = advise(config, flux, capacity)
    assert steps[-1].after <= capacity < steps[-1].before
    changed = load_config(config, [step.setting for step in steps])
    assert total(flux(changed)) == steps[-1].after


def test_a_run_that_fits_gets_no_advice(flux: Predictor) -> None:
    config = load_config("shapes-flux", TINY)
    assert advise(config, flux, total(flux(config))) == []


# -------------------------------------------------------------------------------------------------------------- seconds


def a_prediction() -> Prediction:
    flops = {"product": 100, "convolution": 20, "attention": 0}
    work = {name: Work(0, 0, flops, 3) for name in ("encode", "rollout", "decode", "score", "update")}
    return Prediction(dict.fromkeys(PHASES, 50), {}, work, {}, {}, checkpoint_bytes=60)


def test_seconds_are_operations_over_the_speed_of_their_kind() -> None:
    speed = Speed({"product": 10.0, "convolution": 4.0, "attention": 1.0}, disk=30.0)
    told = by_operations(a_prediction(), speed, load_rate=25.0)
    assert told.phases["update"] == pytest.approx(3 * (100 / 10 + 20 / 4))
    assert (told.phases["load"], told.phases["save"]) == (2.0, 2.0)
    assert told.iteration == pytest.approx(5 * 45)


def test_a_run_takes_its_iterations_saves_and_evaluations() -> None:
    config = load_config(
        "shapes-flux", ["iterations=7", "checkpoint.every=3", "evaluation.every=5", "evaluation.num_prompts=64"]
    )
    phases: dict[str, float | None] = {"encode": 1.0, "rollout": 8.0, "decode": 4.0, "score": 4.0, "update": 3.0}
    told = Seconds(phases | {"load": 10.0, "save": 2.0}, measured=True)
    # 256 samples take 16 s to draw: 64 take 4 s, thrice. Saved after 3, 6 and 7.
    assert run_seconds(config, told, a_prediction()) == pytest.approx(10 + 7 * 20 + 3 * 2 + 3 * 4)


def test_groups_that_every_trained_judge_scores_alike_have_no_signal() -> None:
    valid = torch.ones(6, dtype=torch.bool)
    flat, one = (Scores(torch.tensor(values), valid) for values in ([1.0] * 6, [0.0, 1.0, 0.2, 0.3, 0.5, 0.5]))
    judged = {"flat": flat, "one": one}
    assert _signal(judged, ["flat"], 2, 0.0) == 0.0
    assert _signal(judged, ["flat", "one"], 2, 0.0) == pytest.approx(2 / 3)
    assert _signal(judged, ["one"], 2, 0.5) == pytest.approx(1 / 3)


def test_miniatures_are_timed_on_their_own_networks() -> None:
    config = load_config("shapes-flux", [*TINY, "rollout.batch_size=8", "threads=1"])
    prediction = Predictor(architecture(config.model), torch.device("cpu"))(config)
    told = by_trial(config, prediction, disk=1e8, budget=0.1).phases
    assert told.keys() == set(PHASES)
    assert all(seconds is not None and seconds > 0 for name, seconds in told.items() if name != "update")
    assert told["save"] == prediction.checkpoint_bytes / 1e8


# -------------------------------------------------------------------------------------------------- checks, the command


def test_what_is_missing_is_told_with_its_remedy() -> None:
    found = {check.name: check for check in check_run(load_config("flux-hps"))}
    assert not found["model"].ok
    assert "hf download black-forest-labs/FLUX.1-dev" in found["model"].remedy
    assert not found["prompts.train"].ok
    assert found["prompts.train"].remedy == "name a file of yours: prompts.train=FILE"
    assert not found["judge hps (hps)"].ok


def test_everything_that_ships_is_here() -> None:
    assert all(check.ok for check in check_run(load_config("shapes-flux")))


def test_a_service_that_does_not_answer_is_missing() -> None:
    reward = {"judge": "service", "options": {"urls": "http://127.0.0.1:9"}}
    config = load_config(load_config("shapes-flux").model_dump() | {"rewards": {"far": reward}})
    (check,) = [check for check in check_run(config) if "far" in check.name]
    assert not check.ok
    assert "http://127.0.0.1:9" in check.told


def test_a_plan_needs_positive_numbers() -> None:
    with pytest.raises(ConfigError, match=r"^--memory 0 is not above 0: give a positive number$"):
        diagnose("shapes-flux", plan=Plan(memory=0))


def test_the_machine_alone_needs_no_recipe() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["machine"]["ram"]["total"] > 0


def test_the_command_tells_phases_and_whether_it_fits() -> None:
    words = ["doctor", "shapes-flux", *TINY, "--tflops", "1", "--price-per-hour", "3.6", "--json"]
    result = CliRunner().invoke(app, words)
    told = json.loads(result.stdout)
    assert (result.exit_code, told["fits"]) == (0, True)
    assert [phase["name"] for phase in told["phases"]] == list(PHASES)
    assert all(phase["peak_bytes"] > 0 for phase in told["phases"])
    assert told["cost"] == pytest.approx(told["run_seconds"] / 1000)


def test_a_run_that_does_not_fit_exits_with_1_and_says_why() -> None:
    found = diagnose("shapes-flux", TINY, Plan(memory=0.038))
    assert not found.ok
    assert "of 38.0 MB (cuda of 0.038 GB, planned)" in as_table(found)


def test_kinds_of_operations_are_those_of_the_calibration() -> None:
    assert set(KINDS) == {"product", "convolution", "attention"}
