"""An OpenAI-compatible endpoint over a model, and a page to try it on. Needs `pip install vishwamai-mp[serve]`."""

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from vishwamai_mp.serving.app import WEB_OPTIONS, build_app
from vishwamai_mp.serving.limits import Limits
from vishwamai_mp.serving.service import Service

__all__ = ["WEB_OPTIONS", "Limits", "Service", "build_app"]
