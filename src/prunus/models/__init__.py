"""Architectures: everything known about the shape of a model, and nothing about methods."""

from prunus.models.spec import BlockSpec, Group, LinearSpec, ModelSpec, Stage
from prunus.models.streamed import StreamedModel, open_model

__all__ = ["BlockSpec", "Group", "LinearSpec", "ModelSpec", "Stage", "StreamedModel", "open_model"]
