"""A platform of verl for CPUs, which verl 0.9.1 does not have; by verl's registry of platforms.

Named in VERL_USE_EXTERNAL_MODULES with VERL_PLATFORM=cpu, it is registered in every worker. verl's
engine for FSDP is registered for cuda alone: VERL_ENGINE_DEVICE=cuda chooses it.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def nothing(*_: Any, **__: Any) -> None:
    """What a device would do."""


MODULE = SimpleNamespace(
    is_available=lambda: True,
    current_device=lambda: "cpu",
    device_count=lambda: 1,
    set_device=nothing,
    synchronize=nothing,
    empty_cache=nothing,
    manual_seed=nothing,
    max_memory_allocated=lambda *_: 0,
    max_memory_reserved=lambda *_: 0,
    memory_allocated=lambda *_: 0,
    memory_reserved=lambda *_: 0,
    get_device_name=lambda *_: "CPU",
    mem_get_info=lambda *_: (0, 0),
)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """Names and functions of a device, for a machine that has none."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = MODULE

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    set_device = synchronize = manual_seed = manual_seed_all = nothing
    set_allocator_settings = empty_cache = profiler_start = profiler_stop = cudart = nothing

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Any:
        yield

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False
