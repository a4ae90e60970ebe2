"""Configuration: a schema of frozen dataclasses, YAML files, and `key=value` overrides."""

from configs.load import ConfigError, load
from configs.schema import Config, RayConfig, RingConfig, SchedulerConfig

__all__ = ["Config", "ConfigError", "RayConfig", "RingConfig", "SchedulerConfig", "load"]
