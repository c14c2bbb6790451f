"""The cache: a Zarr v3 store of teacher features that can be trusted (format 1)."""
