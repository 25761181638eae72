"""The published name of HELM's clients, as `model_deployments.yaml` files have it."""

from squeeze.helm.client import ReplayClient, SqueezeClient

__all__ = ["ReplayClient", "SqueezeClient"]
