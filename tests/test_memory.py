"""Memory: what an iteration's peak grows with, and the settings that lower it without changing a bit of the result."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dancegrpo import sampling
from dancegrpo.algorithms import GRPO
from dancegrpo.config import load_config
from dancegrpo.errors import ConfigError
from dancegrpo.memory import TensorBytes
from dancegrpo.policies import Policy, load_policy, offload
from dancegrpo.policies.pipeline import PipelinePolicy
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import FunctionReward, Judges
from dancegrpo.sampling import fetch, put, rollout
from dancegrpo.settings import LoraConfig, ModelConfig, RolloutConfig
from dancegrpo.trainer import Trainer

LORA = LoraConfig(rank=2, alpha=4, target_modules=("to_q", "to_k", "to_v"))
PROMPTS = [Prompt(0, "a red circle"), Prompt(1, "two blue squares")]
SIZE = 32


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.flatten(1).mean(1)


def policy_of(path: Path, device: str = "cpu", **model: object) -> Policy:
    config = ModelConfig(path=str(path), height=SIZE, width=SIZE, device=device, guidance_scale=1.5, **model)
    return load_policy(config, RolloutConfig(num_steps=3))


def latents(policy: Policy, batch: int = 2) -> Tensor:
    noise = torch.randn(batch, *policy.latent_shape, generator=torch.Generator().manual_seed(5))
    return noise.to(policy.device)


@pytest.fixture(scope="module", params=["sd", "flux"])
def family(request: pytest.FixtureRequest, tiny_sd_path: Path, tiny_flux_path: Path) -> Path:
    return tiny_sd_path if request.param == "sd" else tiny_flux_path


def on_gpu(*values: object) -> object:
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    return pytest.param(*values, marks=[pytest.mark.gpu, absent])


# --- The counter ----------------------------------------------------------------------------------------------------


def test_a_storage_counts_once_from_its_making_to_its_end() -> None:
    with TensorBytes() as told:
        a = torch.zeros(1000)
        b = a + 1
        assert told.live == told.peak == 8000
        view = b.view(10, 100)[3]
        del a, b
        assert told.live == 4000
        del view
        assert told.live == 0
    assert told.peak == 8000


def test_what_only_autograd_holds_counts_until_the_backward_pass() -> None:
    weight = torch.ones(1000, requires_grad=True)
    with TensorBytes(held=[weight]) as told:
        assert told.live == 4000
        loss = weight.sin().sin().sin().sum()  # keeps two results; the third goes with the sum, which stays
        assert told.live == 4000 + 2 * 4000 + 4
        loss.backward()
        assert told.live == 4000 + 4000 + 4  # the weight, its gradient, the loss
        assert told.restart() > told.peak == told.live


def test_tensors_from_before_count_once_they_are_met() -> None:
    old = torch.zeros(1000)
    with TensorBytes() as told:
        old.view(10, 100)
        assert told.live == 4000


def test_one_device_can_be_counted_alone() -> None:
    with TensorBytes(device="meta") as told:
        kept = torch.zeros(1000), torch.zeros(500, device="meta")
    assert told.live == 2000 == kept[1].nbytes


# --- One iteration --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tiny_flux_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("memory")
    (folder / "train.txt").write_text("one dot\ntwo dots\nthree dots\n")
    return {
        "name": "memory",
        "threads": 1,
        "output": str(folder),
        "model": {
            "path": str(tiny_flux_path),
            "height": SIZE,
            "width": SIZE,
            "max_sequence_length": 16,
            "device": "cpu",
        },
        "prompts": {"train": str(folder / "train.txt"), "per_iteration": 2, "cache_mb": 0},
        "rollout": {"group_size": 4, "num_steps": 7, "noise_level": 0.7, "shift": 1.5},
        "rewards": {"bright": {"judge": "python:brightness"}},
        "update": {"micro_batch_size": 2},
        "tracking": {"backend": "none"},
    }


def trainer_of(settings: dict, trained: int = 2, **overrides: object) -> Trainer:
    chosen = [f"rollout.timesteps={{select: list, steps: {list(range(trained))}}}"]
    config = load_config(settings, chosen + [f"{key}={value}" for key, value in overrides.items()])
    trainer = Trainer(config, {"bright": FunctionReward(brightness)})
    trainer.iterate(0)  # the optimizer's state
    return trainer


def peak(settings: dict, trained: int = 2, **overrides: object) -> int:
    trainer = trainer_of(settings, trained, **overrides)
    parts = networks(trainer.policy).values()
    held = [tensor for part in parts for tensor in part.parameters()]
    held += [tensor for kind in trainer.updater.state_dict().values() for tensor in kind.values()]
    with TensorBytes(held) as told:
        trainer.iterate(1)
    return told.peak


@pytest.fixture(scope="module")
def base(settings: dict) -> int:
    return peak(settings)


PAIR = 2 * 64 * 16 * 4
"""Bytes of the two latents of one sample at one trained step: 8 x 8 tokens of 16 channels in float32."""
SAMPLES = 8


def test_the_peak_grows_with_trained_steps_by_their_latents(settings: dict, base: int) -> None:
    slope = (peak(settings, trained=6) - base) / 4
    assert SAMPLES * PAIR <= slope < 1.03 * SAMPLES * PAIR


def test_the_peak_does_not_grow_with_steps_that_are_not_trained(settings: dict, base: int) -> None:
    slope = (peak(settings, **{"rollout.num_steps": 15}) - base) / 8
    assert slope <= 0.001 * SAMPLES * PAIR  # noise levels and the schedule


def test_the_peak_does_not_grow_with_updates(settings: dict, base: int) -> None:
    assert peak(settings, **{"update.updates_per_rollout": 4}) <= 1.001 * base


def test_counting_changes_no_bit_of_an_iteration(settings: dict) -> None:
    plain, counted = trainer_of(settings), trainer_of(settings)
    plain.iterate(1)
    with TensorBytes():
        counted.iterate(1)
    ours = counted.policy.trainable()
    assert all(torch.equal(weight, ours[name]) for name, weight in plain.policy.trainable().items())


def test_media_are_let_go_once_they_are_scored() -> None:
    judges, media = Judges({"bright": FunctionReward(brightness, batch_size=2)}), torch.rand(3, 1, 3, 4, 4)
    held = weakref.ref(media.untyped_storage())
    with judges.scoring([PROMPTS[0]] * 3) as scoring:
        scoring.add(media)
        del media
        assert held() is not None  # one sample short of a batch
        assert len(judges.finish(scoring)["bright"]) == 3
        assert held() is None


# --- Latents in the host's memory -----------------------------------------------------------------------------------


class Elsewhere(Tensor):
    """A tensor in this memory that says it is on another device."""

    @property
    def device(self) -> torch.device:
        return torch.device("meta")


def test_rows_of_another_device_equal_an_index() -> None:
    generator = torch.Generator().manual_seed(0)
    there, here = torch.zeros(5, 3, 2, 2).as_subclass(Elsewhere), torch.zeros(5, 3, 2, 2)
    sample, slot = torch.tensor([4, 0, 2, 4]), torch.tensor([0, 2, 1, 1])
    values = torch.randn(4, 2, 2, generator=generator)
    for store in (there, here):
        put(store, sample, slot, values)
    assert torch.equal(there.as_subclass(Tensor), here)
    found = fetch(there, sample.flip(0), slot.flip(0), torch.device("cpu"))
    assert torch.equal(found.as_subclass(Tensor), values.flip(0))


@pytest.mark.parametrize("device", ["cpu", on_gpu("cuda")])
def test_latents_in_the_hosts_memory_train_to_the_same_bits(
    settings: dict, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []
    if device == "cpu":  # where host and device are one: as if they were not
        _keep_elsewhere(monkeypatch, asked)
    here, there = (
        trainer_of(settings, **{"model.device": device, "rollout.store": store, "update.updates_per_rollout": 2})
        for store in ("device", "host")
    )
    ours = there.policy.trainable()
    assert all(torch.equal(weight, ours[name]) for name, weight in here.policy.trainable().items())
    assert device != "cpu" or asked == [torch.device("cpu")]  # that one rollout, once


def _keep_elsewhere(monkeypatch: pytest.MonkeyPatch, asked: list[torch.device]) -> None:
    """Latents of `rollout.store=host` say that they are on another device than the CPU's. asked: who waited for it."""
    make = sampling._Kept.__init__

    def elsewhere(self: sampling._Kept, *told: object, means: bool) -> None:
        make(self, *told, means=means)
        store = told[3]
        if store == "host":
            self.x_t, self.x_next = self.x_t.as_subclass(Elsewhere), self.x_next.as_subclass(Elsewhere)

    monkeypatch.setattr(sampling._Kept, "__init__", elsewhere)
    monkeypatch.setattr(torch.accelerator, "synchronize", asked.append)


@pytest.mark.parametrize("device", [on_gpu("cuda")])
def test_latents_in_the_hosts_memory_leave_the_accelerator(settings: dict, device: str) -> None:
    config = load_config(settings, [f"model.device={device}", "rollout.store=host"])
    policy = load_policy(config.model, config.rollout)
    told = GRPO(config).collect(policy, policy.encode(PROMPTS), 0)
    assert told.x_t.device.type == told.x_next.device.type == "cpu"
    assert told.x_t.is_pinned()
    assert told.log_prob.device.type == told.condition.tensors["pooled_projections"].device.type == device
    beside = rollout(policy, policy.encode(PROMPTS), config.rollout.model_copy(update={"store": "device"}))
    assert torch.equal(told.x_next, beside.x_next.cpu())


def test_an_unknown_place_for_latents_is_refused(settings: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(settings, ["rollout.store=disk"])
    assert str(caught.value) == "rollout.store='disk' must be 'device' or 'host'"


# --- Offloading -----------------------------------------------------------------------------------------------------


def places(part: torch.nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*part.parameters(), *part.buffers())}


def networks(policy: Policy) -> dict[str, torch.nn.Module]:
    return {n: part for n, part in policy.pipeline.components.items() if isinstance(part, torch.nn.Module)}


def test_idle_networks_are_lent_to_the_device_and_come_back_untouched(family: Path) -> None:
    policy = policy_of(family, offload=True)
    before = {n: [(id(p), p.data_ptr()) for p in part.parameters()] for n, part in networks(policy).items()}
    policy.device = torch.device("meta")  # a device from which no value could be copied back
    with policy._awake("text_encoder", "vae", policy.denoisers[0]):
        found = {name: places(part) for name, part in networks(policy).items()}
        assert policy.pipeline.vae.device.type == "meta"
    lent = {"text_encoder", "vae"}
    assert found == {name: {"meta"} if name in lent else {"cpu"} for name in found}
    assert {n: [(id(p), p.data_ptr()) for p in part.parameters()] for n, part in networks(policy).items()} == before


def test_a_network_that_fails_at_work_comes_back_too(tiny_sd_path: Path) -> None:
    policy = policy_of(tiny_sd_path, offload=True)
    policy.device = torch.device("meta")
    with pytest.raises(RuntimeError, match="out of memory"), policy._awake("vae"):
        raise RuntimeError("out of memory")
    assert places(policy.pipeline.vae) == {"cpu"}


def test_tied_weights_are_lent_as_one() -> None:
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = first.weight
    with offload.lent([first, second], torch.device("meta")):
        assert first.weight is second.weight
        assert first.weight.is_meta


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("device", ["copies", on_gpu("cuda")])
def test_offloading_changes_no_bit(
    family: Path, lora: LoraConfig | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`copies`: where there is no second device, what is lent is a copy in the same memory."""
    lent: list[Tensor] = []

    def copy(tensor: Tensor, device: torch.device) -> Tensor:
        lent.append(tensor.detach().clone())
        return torch.nn.Parameter(lent[-1], False) if isinstance(tensor, torch.nn.Parameter) else lent[-1]

    name = "cpu" if device == "copies" else device
    plain = policy_of(family, device=name, lora=lora)
    if device == "copies":
        monkeypatch.setattr(offload, "_copy", copy)
    saving = policy_of(family, device=name, lora=lora, offload=True)
    if device != "copies":
        assert {n: places(part) for n, part in networks(saving).items() if n not in saving.modules} == {
            n: {"cpu"} for n in networks(saving) if n not in saving.modules
        }
    conditions = [policy.encode(PROMPTS) for policy in (plain, saving)]
    assert all(torch.equal(t, conditions[1].tensors[n]) for n, t in conditions[0].tensors.items())
    found = []
    for policy, condition in zip((plain, saving), conditions, strict=True):
        x = latents(policy).requires_grad_()
        x0 = x - 0.1 * policy.predict(x, torch.tensor([0, 1], device=policy.device), condition)
        media = policy.decode(x0, condition)
        if policy is saving and device == "copies":
            for weight in policy.pipeline.vae.parameters():
                weight.fill_(torch.nan)  # what the backward pass must not read: it is not on the device any more
        media.square().sum().backward()
        found.append((media.detach(), x.grad, *(p.grad for p in policy.trainable().values() if p.grad is not None)))
    assert len(found[0]) > 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert bool(lent) == (device == "copies")


@pytest.mark.parametrize("device", [on_gpu("cuda")])
def test_offloading_leaves_only_the_denoiser_on_the_accelerator(family: Path, device: str) -> None:
    policy = policy_of(family, device=device, offload=True)
    condition = policy.encode(PROMPTS)
    with torch.no_grad():
        policy.decode(latents(policy), condition)
    assert {n for n, part in networks(policy).items() if places(part) != {"cpu"}} == set(policy.modules)


# --- Tiles and slices -----------------------------------------------------------------------------------------------


def tiny_vaes() -> dict[str, tuple[torch.nn.Module, tuple[int, ...]]]:
    """Autoencoders by name, each with the shape of two samples' latents."""
    import diffusers

    video = {"dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True], "z_dim": 4, "base_dim": 4}
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
        )
        hunyuan = diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        )
        return {
            "AutoencoderKL": (image, (2, 4, 16, 16)),
            "AutoencoderKLHunyuanVideo": (hunyuan, (2, 4, 2, 4, 4)),
            "AutoencoderKLWan": (diffusers.AutoencoderKLWan(**video, **statistics), (2, 4, 2, 4, 4)),
            "AutoencoderKLQwenImage": (diffusers.AutoencoderKLQwenImage(**video, **statistics), (2, 4, 1, 4, 4)),
        }


@pytest.fixture(scope="module")
def vaes() -> dict[str, tuple[torch.nn.Module, tuple[int, ...]]]:
    return {name: (vae.eval(), shape) for name, (vae, shape) in tiny_vaes().items()}


def use_tiles(vae: torch.nn.Module, **settings: bool) -> None:
    model = ModelConfig(path="any", **settings)
    PipelinePolicy._use_tiles(SimpleNamespace(pipeline=SimpleNamespace(vae=vae), model=model))


@torch.no_grad()
def decoded(vae: torch.nn.Module, z: Tensor) -> tuple[Tensor, set[int]]:
    """Media, and the batch sizes that the decoder saw."""
    sizes: set[int] = set()
    hook = vae.decoder.register_forward_pre_hook(lambda _, args: sizes.add(len(args[0])))
    media = vae.decode(z, return_dict=False)[0]
    hook.remove()
    return media, sizes


@pytest.mark.parametrize(
    "name", ["AutoencoderKL", "AutoencoderKLHunyuanVideo", "AutoencoderKLWan", "AutoencoderKLQwenImage"]
)
def test_slices_equal_the_whole_batch(vaes: dict, name: str) -> None:
    vae, shape = vaes[name]
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    vae.double()  # in float32 kernels round a batch otherwise than a sample, up to 6e-6 here
    whole, together = decoded(vae, z)
    use_tiles(vae, vae_slicing=True)
    sliced, apart = decoded(vae, z)
    vae.disable_slicing()
    assert (together, apart) == ({2}, {1})
    torch.testing.assert_close(sliced, whole, atol=1e-12, rtol=0)


def test_tiles_lower_the_peak_and_keep_the_size(vaes: dict) -> None:
    vae, shape = vaes["AutoencoderKL"]
    z, found = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(vae.dtype), []
    for _ in range(2):
        with TensorBytes(held=vae.parameters()) as told:
            found.append((decoded(vae, z)[0].shape, told))
        use_tiles(vae, vae_tiling=True)
    vae.disable_tiling()
    (whole, plain), (tiled, saving) = found
    assert whole == tiled
    assert saving.peak < 0.6 * plain.peak


@pytest.mark.parametrize("setting", ["vae_tiling", "vae_slicing"])
def test_an_autoencoder_without_tiles_is_refused_in_one_line(setting: str) -> None:
    from diffusers import VQModel

    with pytest.raises(ConfigError) as caught:
        use_tiles(VQModel(block_out_channels=(4,), norm_num_groups=4), **{setting: True})
    assert str(caught.value) == f"model.{setting}=true: VQModel cannot decode like that, set it to false"


# --- Activation checkpointing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lora", "dtype"), [(None, "float32"), (LORA, "float32"), (LORA, "bfloat16")])
def test_gradient_checkpointing_lowers_the_peak_and_changes_no_bit(
    family: Path, lora: LoraConfig | None, dtype: str
) -> None:
    peaks, gradients = [], []
    for saving in (False, True):
        policy = policy_of(family, lora=lora, dtype=dtype, gradient_checkpointing=saving)
        condition, x = policy.encode(PROMPTS), latents(policy)
        with TensorBytes() as told:
            policy.predict(x, torch.tensor([0, 1]), condition).square().mean().backward()
        peaks.append(told.peak)
        gradients.append([weight.grad for weight in policy.trainable().values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert peaks[1] < 0.9 * peaks[0]


def test_a_network_without_gradient_checkpointing_is_refused_in_one_line() -> None:
    from diffusers import ModelMixin

    class Plain(ModelMixin):
        _supports_gradient_checkpointing = False

    model = ModelConfig(path="any", gradient_checkpointing=True)
    with pytest.raises(ConfigError) as caught:
        PipelinePolicy._make_trainable(SimpleNamespace(model=model), "transformer", Plain(), 0)
    assert str(caught.value) == "model.gradient_checkpointing=true: Plain has none, set it to false"
