"""The published name of HELM's plugin: `helm-run --plugins squeeze.helm_plugin`."""

from squeeze.helm.plugin import ArticlesScenario

__all__ = ["ArticlesScenario"]
