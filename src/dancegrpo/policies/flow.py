"""What every rectified-flow family shares: the schedule, from the run's shift or the pipeline's own scheduler."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from dancegrpo.errors import ConfigError, ModelError
from dancegrpo.policies.export import Usage
from dancegrpo.policies.pipeline import PipelinePolicy
from dancegrpo.sde import FlowDynamics, flow_sigmas
from dancegrpo.settings import RolloutConfig


class FlowPolicy(PipelinePolicy):
    """A policy whose network predicts the velocity x1 - x0 of a rectified flow; sigma 1 is noise.

    Whichever scheduler the checkpoint ships, sampling takes Euler steps: the sampler with a known density per step.
    """

    timestep_unit: ClassVar[float] = 1000.0
    """What sigma is multiplied with to give the network's timestep: 1000, or 1 for the families that divide again."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Raises ValueError for a unit that `predict` would not get: bit for bit there are two ways to scale."""
        super().__init_subclass__(**options)
        if cls.timestep_unit not in (1, 1000):
            raise ValueError(f"{cls.__name__}.timestep_unit={cls.timestep_unit!r} must be 1 or 1000.")

    def _dynamics(self, rollout: RolloutConfig) -> FlowDynamics:
        sde = "dance" if rollout.sde == "auto" else rollout.sde
        if sde not in ("dance", "flow-grpo", "cps"):
            family = type(self.pipeline).__name__
            raise ConfigError(
                f"rollout.sde={sde} is for diffusion models; for {family} use auto, dance, flow-grpo or cps."
            )
        self._shift = rollout.shift
        if rollout.shift is not None:
            dynamics = FlowDynamics(flow_sigmas(rollout.num_steps, rollout.shift), sde)
        else:
            try:
                dynamics = FlowDynamics(self._pipeline_sigmas(rollout.num_steps), sde)
            except ValueError as error:
                reason = " ".join(str(error).split())
                raise ModelError(
                    f"the scheduler of {self.folder} is no flow schedule from noise to data: {reason}"
                ) from error
        # The pipelines scale sigma to the training steps, some of them back, in float32: so does this, bit for bit.
        scale = self.pipeline.scheduler.config.get("num_train_timesteps", 1000)
        timesteps = dynamics.sigmas[:-1] * scale
        self._timesteps = (timesteps if self.timestep_unit == 1000 else timesteps / 1000).to(self.device)
        return dynamics

    def _pipeline_sigmas(self, num_steps: int) -> Tensor:
        """The pipeline's own schedule at this resolution: (T + 1,) float32."""
        scheduler = self._euler()
        scheduler.set_timesteps(**self._schedule(num_steps, scheduler))
        return scheduler.sigmas

    def _euler(self) -> Any:
        """A new Euler scheduler with the settings of the one that the checkpoint ships."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)

    def pipeline_scheduler(self) -> Any:
        """Euler steps, on the shipped schedule or the run's shift: see `PipelinePolicy.pipeline_scheduler`."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return self._euler() if self._shift is None else FlowMatchEulerDiscreteScheduler(shift=self._shift)

    @abstractmethod
    def _schedule(self, num_steps: int, scheduler: Any) -> dict[str, Any]:
        """The arguments with which the pipeline calls `scheduler.set_timesteps`: sigmas, mu, num_inference_steps."""

    def _arguments(self) -> dict[str, object]:
        """The family's own arguments of a pipeline call, for the model card: guidance, frames, text tokens."""
        return {}

    def _usage(self) -> Usage:
        model, own = self.model, self._shift is None
        scheduler = ("", "") if own else ("FlowMatchEulerDiscreteScheduler", f"(shift={self._shift})")
        size = {"height": model.height, "width": model.width, "num_inference_steps": self.dynamics.num_steps}
        return Usage(*scheduler, size | self._arguments(), fps=model.fps)


def resolution_mu(num_tokens: int, scheduler: Any) -> float:
    """The exponent of the time shift for a picture of num_tokens patches: linear, by the scheduler's config."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    return calculate_shift(num_tokens, *(scheduler.config[name] for name in names))
