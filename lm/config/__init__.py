"""The config of a run: every key, its default and its checks."""

from lm.config.schema import NEVER, ConfigError, Duration, flatten, to_dict
from lm.config.sections import (
    RESUMABLE,
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EarlyStoppingConfig,
    EvalConfig,
    GenerateConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    MonitorConfig,
    MupConfig,
    OptimConfig,
    ProfileConfig,
    RopeScalingConfig,
    TaskConfig,
    TokenizerConfig,
    TrainConfig,
    build,
    check,
    check_model,
    diff,
    to_json,
)
