"""Servers that a run asks over HTTP: a reward's, and vLLM's."""
