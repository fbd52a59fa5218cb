"""The differentiable cache: latents pooled from past segments, read by attention with importance and a null slot."""

from vishwamai_mp.cache_augmentation.cache_module import DifferentiableCacheAugmentation
from vishwamai_mp.config import CacheConfig

__all__ = ["CacheConfig", "DifferentiableCacheAugmentation"]
