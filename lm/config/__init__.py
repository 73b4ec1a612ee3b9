"""The config of a run: every key, its default and its checks."""

from lm.config.schema import NEVER, ConfigError, Duration, flatten, to_dict
from lm.config.sections import (
    RESUMABLE,
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    GenerateConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    TaskConfig,
    TokenizerConfig,
    TrainConfig,
    build,
    diff,
    to_json,
)
