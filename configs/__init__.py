"""Configuration: a schema of frozen dataclasses, YAML files, and `key=value` overrides."""

from configs.load import ConfigError, load
from configs.schema import Config, ProfileConfig, RayConfig, RingConfig, SchedulerConfig

__all__ = [
    "Config",
    "ConfigError",
    "ProfileConfig",
    "RayConfig",
    "RingConfig",
    "SchedulerConfig",
    "load",
]
