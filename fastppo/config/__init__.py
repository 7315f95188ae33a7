"""The configuration (YAML): every key with its type, range and meaning. No torch here."""

from fastppo.config.schema import Config, config_from_dict, load_config

__all__ = ["Config", "config_from_dict", "load_config"]
