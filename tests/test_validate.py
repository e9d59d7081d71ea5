"""`dancegrpo validate`: green on right policies, and the right check with the right cause on broken ones."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from dancegrpo import cli
from dancegrpo.errors import ConfigError, ModelError
from dancegrpo.policies.flux import FluxPolicy
from dancegrpo.policies.stable_diffusion import StableDiffusionPolicy
from dancegrpo.sde import FlowDynamics
from dancegrpo.validate import Check, Report, _checks, _config, _run, _subject, as_json, as_table, validate
from dancegrpo.validate.causes import affine
from dancegrpo.validate.checks import equals_pipeline
from tiny import TINY_SIZE, _t5_tokenizer, _vae, build_sd
from tiny_hunyuan import IMAGE_TEMPLATE, TEMPLATE, build_hunyuan, build_hunyuan_i2v, build_skyreels
from tiny_pictures import build_qwen_image, build_sd3, build_sdxl
from tiny_wan import build_wan

PORTING = Path(__file__).parents[1] / "docs" / "porting.md"
CHECKS = {
    "latents": "latents equal the pipeline's",
    "decoding": "decoding equals the pipeline's",
    "log-probs": "log-probs are finite",
    "replay": "replay gives ratio 1",
    "gradients": "gradients reach all weights",
    "batch": "a batch equals one by one",
    "lora": "LoRA export round-trips",
}


# --- Deliberately broken ports --------------------------------------------------------------------------------------


class SignFlipped(FluxPolicy):
    def predict(self, x_t, step, condition):
        return -super().predict(x_t, step, condition)


class Scaled(FluxPolicy):
    def predict(self, x_t, step, condition):
        return 2 * super().predict(x_t, step, condition)


class TimeOffByOne(FluxPolicy):
    def _dynamics(self, rollout):
        dynamics = super()._dynamics(rollout)
        self._timesteps = torch.cat([self._timesteps[1:], self._timesteps[-1:]])
        return dynamics


class SigmasOffByOne(FluxPolicy):
    def _dynamics(self, rollout):
        dynamics = super()._dynamics(rollout)
        sigmas = dynamics.sigmas
        return FlowDynamics(torch.cat([sigmas[1:-1], sigmas[-2:-1] / 2, sigmas[-1:]]), dynamics.sde)


class OtherShift(FluxPolicy):
    def _schedule(self, num_steps, scheduler):
        return super()._schedule(num_steps, scheduler) | {"mu": 2.0}


class TimeScale(FluxPolicy):
    timestep_unit = 1000.0


class OtherGuidance(FluxPolicy):
    def _check(self, model, rollout):
        super()._check(model, rollout)
        self._guidance = 1000 * self._guidance


class OtherText(FluxPolicy):
    def _encode(self, prompt):
        condition = super()._encode(prompt)
        condition.tensors["pooled_projections"].mul_(1.5)
        return condition


class OtherStart(FluxPolicy):
    def start(self, noise, condition):
        return 0.5 * noise


class Dropout(FluxPolicy):
    def _freeze(self):
        super()._freeze()
        self.module.transformer_blocks[0].ff.net[1] = torch.nn.Dropout(0.1)

    def predict(self, x_t, step, condition):
        self.module.train()
        return super().predict(x_t, step, condition)


class TrainsAnotherStep(FluxPolicy):
    def predict(self, x_t, step, condition):
        return super().predict(x_t, (step + torch.is_grad_enabled()) % 4, condition)


class Leaky(FluxPolicy):
    def predict(self, x_t, step, condition):
        out = super().predict(x_t, step, condition)
        return out + 0.1 * (out.mean(0) - out)


class Forgetful(FluxPolicy):
    def decode(self, latents, condition):
        model = self.model
        return self._decode(
            self.pipeline._unpack_latents(latents, model.height, model.width, self.pipeline.vae_scale_factor)
        )


class Frozen(FluxPolicy):
    def _make_trainable(self, name, module, seed):
        super()._make_trainable(name, module, seed)
        if self.model.lora is None:
            module.x_embedder.requires_grad_(False)


class Detached(FluxPolicy):
    def predict(self, x_t, step, condition):
        out = super().predict(x_t, step, condition)
        return out.detach() if torch.is_grad_enabled() and self.model.lora is None else out


class NotANumber(FluxPolicy):
    def predict(self, x_t, step, condition):
        return torch.where((step == 2).reshape(-1, 1, 1), torch.nan, super().predict(x_t, step, condition))


class NotANumberAtFour(FluxPolicy):
    def predict(self, x_t, step, condition):
        return torch.where((step == 4).reshape(-1, 1, 1), torch.nan, super().predict(x_t, step, condition))


class TrainsOtherwiseAtFour(FluxPolicy):
    def predict(self, x_t, step, condition):
        out = super().predict(x_t, step, condition)
        return torch.where((step == 4).reshape(-1, 1, 1), 2 * out, out) if torch.is_grad_enabled() else out


class Unscaled(FluxPolicy):
    def _save_adapters(self, folder):
        held, self.model = (
            self.model,
            self.model.model_copy(update={"lora": self.model.lora.model_copy(update={"alpha": self.model.lora.rank})}),
        )
        super()._save_adapters(folder)
        self.model = held


class OneBranch(StableDiffusionPolicy):
    @property
    def guided(self):
        return False

    def pipeline_arguments(self, prompts, noise):
        return super().pipeline_arguments(prompts, noise) | {"negative_prompt": [p.negative for p in prompts]}


class Raising(FluxPolicy):
    def decode(self, latents, condition):
        raise KeyError("height")


BROKEN = {
    # policy: (check, first step, what the cause says)
    "SignFlipped": ("latents", 0, "the sign is flipped"),
    "Scaled": ("latents", 0, r"the prediction is scaled \(cosine 1.000 .* 2 times"),
    "TimeOffByOne": ("latents", 0, "schedule off by one: at step 0 the network is told the timestep of step 1"),
    "SigmasOffByOne": ("latents", 0, r"schedule off by one: our sigma k is the pipeline's sigma k\+1"),
    "OtherShift": ("latents", 0, "the schedule differs: our sigmas"),
    "TimeScale": ("latents", 0, "timestep scale: the network is told 1000 where the pipeline says 1, 1000 times"),
    "OtherGuidance": ("latents", 0, "guidance: the network is told 3500 where the pipeline says 3.5"),
    "OtherText": ("latents", 0, "condition: `pooled_projections` differs"),
    "OtherStart": ("latents", 0, "starts from 2 times the noise"),
    "Dropout": ("replay", 0, r"dropout is on in transformer.transformer_blocks.0.ff.net.1 \(p=0.1\)"),
    "TrainsAnotherStep": ("replay", 0, "schedule off by one: for step 1, training asks the network about step 2"),
    "Leaky": ("replay", 0, "a row depends on the rows beside it"),
    "Forgetful": ("decoding", None, r"scaling factor: .*scaling_factor 0.3611, shift_factor 0.1159"),
    "Frozen": ("gradients", None, r"x_embedder.bias, x_embedder.weight|x_embedder.weight, x_embedder.bias: frozen"),
    "Detached": ("gradients", 0, r"cuts them off \(detach, no_grad\)"),
    "NotANumber": ("log-probs", 2, "the network's prediction is not finite"),
    "Unscaled": ("lora", None, "act otherwise: look at alpha / rank"),
    "Raising": ("decoding", None, "KeyError: 'height'"),
}


def found(report: Report, check: str) -> Check:
    (one,) = [c for c in report.checks if c.name == CHECKS[check]]
    return one


def flux(path: Path, *overrides: str, **size) -> Report:
    return validate(str(path), ["model.max_sequence_length=32", "threads=1", *overrides], device="cpu", **size)


# --- Green ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [[], ["model.lora={rank: 4}", "rollout.sde=cps"]])
def test_flux_passes(tiny_flux_path: Path, overrides: list[str]) -> None:
    report = flux(tiny_flux_path, *overrides)
    assert report.ok, as_table(report)
    assert {c.name for c in report.checks} == set(CHECKS.values())


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_stable_diffusion_passes(tiny_sd_path: Path, guidance: float) -> None:
    report = validate(str(tiny_sd_path), [f"model.guidance_scale={guidance}", "threads=1"], device="cpu")
    assert report.ok, as_table(report)


def test_v_prediction_passes_to_rounding(tmp_path: Path) -> None:
    path = build_sd(tmp_path / "m", prediction_type="v_prediction", scheduler="DDIMScheduler")
    report = validate(str(path), ["threads=1"], device="cpu")
    assert report.ok, as_table(report)
    assert found(report, "latents").value != "difference 0"


def test_the_shipped_flux_passes() -> None:
    report = validate("shapes-flux", ["model.max_sequence_length=16", "threads=1"], device="cpu")
    assert report.ok, as_table(report)
    assert found(report, "latents").value == "difference 0"
    assert found(report, "replay").value.startswith("difference 0,")


TWO = {"networks": ("transformer", "transformer_2"), "boundary_ratio": 0.7}
FAMILIES = {
    # what it is: (how it is built, its options, overrides)
    "sdxl": (build_sdxl, {}, ["model.guidance_scale=5.0"]),
    "sd3": (build_sd3, {}, ["model.guidance_scale=4.0"]),
    "qwen-image": (build_qwen_image, {}, ["model.true_cfg_scale=4.0"]),
    "hunyuan": (build_hunyuan, {}, [TEMPLATE]),
    "hunyuan-i2v-replace": (build_hunyuan_i2v, {"kind": "token_replace"}, [IMAGE_TEMPLATE]),
    "hunyuan-i2v-concat": (build_hunyuan_i2v, {"kind": "latent_concat"}, [IMAGE_TEMPLATE]),
    "skyreels": (build_skyreels, {}, [TEMPLATE, "model.true_cfg_scale=4.0"]),
    "wan": (build_wan, {}, []),
    "wan-two": (build_wan, TWO, []),
    "wan-5b": (build_wan, {"expand_timesteps": True}, []),
    "wan-i2v": (build_wan, {"image": True, "clip": True}, []),
    "wan-i2v-5b": (build_wan, {"image": True, "expand_timesteps": True}, []),
}


def checked(folder: Path, overrides: list, **size) -> Report:
    told = [
        value if isinstance(value, str) else f"model.prompt_template={value.model_dump_json(exclude_none=True)}"
        for value in overrides
    ]
    return validate(str(folder), ["model.max_sequence_length=64", "threads=1", *told], device="cpu", **size)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(tmp_path: Path, family: str) -> None:
    build, options, overrides = FAMILIES[family]
    if family == "sdxl":  # its tokenizers have a length of their own
        overrides = [*overrides, "model.max_sequence_length=null"]
    report = checked(build(tmp_path / "m", **options), overrides)
    assert report.ok, as_table(report)
    assert len(report.checks) == len(CHECKS)


def test_two_networks_pass_where_every_sample_trains_steps_of_its_own(tmp_path: Path) -> None:
    report = checked(build_wan(tmp_path / "m", **TWO), ["rollout.timesteps.fraction=0.5"], steps=8)
    assert report.ok, as_table(report)


def test_half_precision_is_judged_by_its_own_limits(tiny_flux_path: Path) -> None:
    report = flux(tiny_flux_path, dtype="bfloat16")
    assert report.ok, as_table(report)
    assert report.settings["dtype"] == "bfloat16"


def test_the_smallest_size_is_not_square_and_the_users_own_stays(tiny_flux_path: Path) -> None:
    assert {(s := flux(tiny_flux_path).settings)["height"], s["width"]} == {16, 24}
    settings = flux(tiny_flux_path, width=TINY_SIZE, steps=3, seed=5).settings
    assert (settings["height"], settings["width"], settings["steps"], settings["seed"]) == (16, TINY_SIZE, 3, 5)


# --- Broken ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", BROKEN)
def test_a_broken_policy_fails_the_right_check_with_its_cause(tiny_flux_path: Path, policy: str) -> None:
    check, step, cause = BROKEN[policy]
    settings = [f"model.policy=test_validate:{policy}", "model.max_sequence_length=16", "threads=1"]
    subject = _subject(_config(str(tiny_flux_path), settings, 0, {"device": "cpu"}))
    failed = _run(CHECKS[check], _checks(subject)[CHECKS[check]])
    assert (failed.result, failed.step) == ("failed", step), failed
    assert re.search(cause, failed.cause), failed.cause
    assert "\n" not in failed.cause


@pytest.mark.parametrize(("policy", "check"), [("NotANumberAtFour", "log-probs"), ("TrainsOtherwiseAtFour", "replay")])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_step_is_the_failing_samples_own(tiny_flux_path: Path, policy: str, check: str, seed: int) -> None:
    """Where every sample trains other steps, a slot's are not the same in all of them."""
    settings = [f"model.policy=test_validate:{policy}", "model.max_sequence_length=16", "threads=1"]
    settings += ["rollout.timesteps.fraction=0.5"]
    subject = _subject(_config(str(tiny_flux_path), settings, seed, {"device": "cpu", "steps": 8}))
    failed = _run(CHECKS[check], _checks(subject)[CHECKS[check]])
    assert (failed.result, failed.step) == ("failed", 4), failed


def test_a_template_that_does_not_fit_is_said_so_by_every_check(tmp_path: Path) -> None:
    wrong = IMAGE_TEMPLATE.model_copy(update={"image_emb_len": 9, "image_emb_end": 15})
    report = checked(build_hunyuan_i2v(tmp_path / "m", "latent_concat"), [wrong])
    assert all("set its image_emb_len" in check.cause for check in report.checks), as_table(report)


def test_a_decoder_that_is_wrong_fails_no_other_check(tiny_flux_path: Path) -> None:
    report = flux(tiny_flux_path, "model.policy=test_validate:Forgetful")
    assert [c.name for c in report.checks if c.result == "failed"] == [CHECKS["decoding"]]


def test_guidance_that_is_left_out_is_named(tiny_sd_path: Path) -> None:
    settings = ["model.policy=test_validate:OneBranch", "threads=1"]
    subject = _subject(_config(str(tiny_sd_path), settings, 0, {"device": "cpu"}))
    assert "the pipeline evaluates 2 rows per sample, `predict` 1" in equals_pipeline(subject).cause


def test_an_affine_difference_is_recovered() -> None:
    theirs = torch.randn(200, generator=torch.Generator().manual_seed(0))
    slope, offset, rest = affine(0.36 * theirs + 0.12, theirs)
    assert (slope, offset) == pytest.approx((0.36, 0.12), abs=1e-5)
    assert rest < 1e-5
    assert affine(theirs.flip(0), theirs)[2] > 0.5


# --- The command ----------------------------------------------------------------------------------------------------


def call(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["dancegrpo", "validate", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_json_and_exit_code_of_a_right_model(monkeypatch, capsys, tiny_flux_path: Path) -> None:
    words = (tiny_flux_path, "model.max_sequence_length=16", "threads=1", "--steps", 3, "--device", "cpu", "--json")
    code, out, _ = call(monkeypatch, capsys, *words)
    told = json.loads(out)
    assert (code, told["ok"], told["settings"]["steps"], len(told["checks"])) == (0, True, 3, len(CHECKS))
    assert all(check["result"] == "ok" and check["seconds"] >= 0 for check in told["checks"])


def test_table_and_exit_code_of_a_broken_model(monkeypatch, capsys, tiny_flux_path: Path) -> None:
    words = ("model.policy=test_validate:SignFlipped", "model.max_sequence_length=16", "threads=1", "--device", "cpu")
    code, out, _ = call(monkeypatch, capsys, tiny_flux_path, *words)
    assert code == 1
    assert "latents equal the pipeline's: failed, first at step 0" in out
    assert "the sign is flipped" in out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["/no/such/model"], "/no/such/model"),
        (["{flux}", "model.policy=test_validate:Nobody"], "test_validate has no 'Nobody'"),
        (["{flux}", "model.policy=no_such_module:P"], "cannot be imported"),
        (["{flux}", "model.policy=test_validate:found"], "is no subclass of PipelinePolicy"),
        (["{flux}", "model.policy=nocolon"], "model.policy"),
        (["{flux}", "--height", 17], "model.height=17: sizes must be multiples of 4 for this pipeline, use 16"),
        (["{flux}", "--frames", 5], "model.num_frames=5 is not known to FluxPipeline"),
        (["{flux}", "--dtype", "float12"], "model.dtype"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys, tiny_flux_path: Path, words, named: str) -> None:
    code, out, err = call(monkeypatch, capsys, *[str(word).format(flux=tiny_flux_path) for word in words])
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert named in err


# --- docs/porting.md ------------------------------------------------------------------------------------------------


def build_aura(folder: Path) -> Path:
    """A tiny random AuraFlowPipeline, saved to `folder`."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = _t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        )
        text = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        pipeline = AuraFlowPipeline(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(text),
            vae=_vae(scaling_factor=0.13025),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def aura_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_aura(tmp_path_factory.mktemp("models") / "auraflow")


def page_blocks() -> tuple[str, str]:
    """The class as the page first has it, and the line that mends it."""
    first, line = re.findall(r"```python\n(.*?)```", PORTING.read_text(encoding="utf-8"), re.DOTALL)
    return first, line


def port(folder: Path, monkeypatch, *, mended: bool) -> None:
    first, line = page_blocks()
    anchor = "    denoisers = "
    assert first.count(anchor) == 1
    (folder / "my_port.py").write_text(first.replace(anchor, line + anchor) if mended else first)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "my_port", raising=False)


AURA = ("model.policy=my_port:AuraFlowPolicy", "model.max_sequence_length=64", "threads=1")


def test_the_pages_port_passes(aura_path: Path, tmp_path: Path, monkeypatch) -> None:
    port(tmp_path, monkeypatch, mended=True)
    for guidance in (1.0, 3.5):
        report = validate(str(aura_path), [*AURA, f"model.guidance_scale={guidance}"], device="cpu")
        assert report.ok, as_table(report)


def test_the_pages_first_try_fails_as_the_page_says(aura_path: Path, tmp_path: Path, monkeypatch) -> None:
    port(tmp_path, monkeypatch, mended=False)
    report = validate(str(aura_path), list(AURA), device="cpu")
    failed = [check for check in report.checks if check.result == "failed"]
    assert failed
    page = " ".join(PORTING.read_text(encoding="utf-8").split())
    for check in failed:
        assert f"{check.name}: failed, first at step {check.step} {check.cause}" in page


def test_a_pipeline_without_a_policy_is_told_how_to_get_one(aura_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a AuraFlowPipeline, .* policy of your own \(model.policy"):
        validate(str(aura_path))


def test_a_setting_is_refused_for_a_checkpoint_without_its_first_network(tmp_path: Path) -> None:
    path = build_wan(tmp_path / "m", networks=("transformer_2",), boundary_ratio=1.0)
    with pytest.raises(ConfigError, match=r"true_cfg_scale=2\.0 is not known to WanPipeline"):
        validate(str(path), ["model.true_cfg_scale=2.0"])
    with pytest.raises(ModelError, match="has no transformer, which the first step needs"):
        validate(str(path))


def test_a_settings_error_is_not_taken_for_a_size(tiny_flux_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no layer"):
        flux(tiny_flux_path, "model.lora={target_modules: [nothing]}")


def test_the_report_is_plain_data(tiny_flux_path: Path) -> None:
    told = as_json(Report("m", "P", "q:P", {}, (Check("a", "failed", "-", 0.1, 2, "why"),)))
    assert told["ok"] is False
    assert json.loads(json.dumps(told)) == told | {"checks": list(map(dict, told["checks"]))}
