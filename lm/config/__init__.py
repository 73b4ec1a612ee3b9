"""The config of a run: every key, its default and its checks."""

from lm.config.schema import NEVER, ConfigError, Duration, flatten, to_dict
from lm.config.sections import (
    BEFORE,
    RESUMABLE,
    TASK_PACKINGS,
    AdapterConfig,
    CheckpointConfig,
    Config,
    CorruptConfig,
    DataConfig,
    EvalConfig,
    GenerateConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    TokenizerConfig,
    TrainConfig,
    build,
    build_saved,
    defaults,
    diff,
    to_json,
)
