"""The loader: a deterministic plan of an epoch, and the gather that turns it into batches."""

from ddcache.loading.loader import Batch, FeatureLoader

__all__ = ["Batch", "FeatureLoader"]
