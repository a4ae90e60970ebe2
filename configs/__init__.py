"""Configuration: a schema of frozen dataclasses, YAML files, and `key=value` overrides."""

from configs.load import ConfigError, load
from configs.schema import (
    Config,
    KVStoreConfig,
    ProfileConfig,
    RayConfig,
    RingConfig,
    SchedulerConfig,
    ServerConfig,
)

__all__ = [
    "Config",
    "ConfigError",
    "KVStoreConfig",
    "ProfileConfig",
    "RayConfig",
    "RingConfig",
    "SchedulerConfig",
    "ServerConfig",
    "load",
]
