"""The dtype that a run's models are in: one rule, for trainer and memory plan. No torch here."""

from __future__ import annotations

from typing import Any


def own_dtype(data: dict[str, Any]) -> str:
    """The dtype of published weights, as their config.json names it; float32 if it does not."""
    inner = data.get("text_config")
    own = {**data, **(inner if isinstance(inner, dict) else {})}
    named = own.get("dtype") or own.get("torch_dtype") or "float32"
    return str(named).removeprefix("torch.")


def run_dtype(*, bf16: bool, own: str, on_gpu: bool) -> str:
    """bfloat16 where `bf16` asks for it; without, on a GPU the checkpoint's own, else float32.

    LLaMA-Factory's rule for a GPU, but for weights in float16: they run in bfloat16, which is as
    large and needs no loss scaler.
    """
    half = bf16 or (on_gpu and own in ("bfloat16", "float16"))
    return "bfloat16" if half else "float32"
