"""Runnable benchmarks, one folder each: data, model, configurations and a README."""
