"""Activations and frozen weights in host memory; used alone or by the trainer."""
