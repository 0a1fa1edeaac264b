"""LlamaGen's transformer: raster, any order, masked."""
