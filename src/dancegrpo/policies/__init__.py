"""Generators under training: one file per model family, around its diffusers pipeline."""

from dancegrpo.policies.base import Condition, Policy
from dancegrpo.policies.export import ModelCard
from dancegrpo.policies.loading import load_policy

__all__ = ["Condition", "ModelCard", "Policy", "load_policy"]
