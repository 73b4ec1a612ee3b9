"""All metadata of the project; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

SCORES = [
    "sacrebleu>=2.6",  # BLEU and chrF of translations
    "scikit-learn>=1.9",  # seqeval's own
    "seqeval>=1.2.2",  # F1 of named entities
]


def version() -> str:
    """`__version__` of lm/__init__.py, read without importing it: its dependencies may not be installed yet."""
    text = (ROOT / "lm" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('lm/__init__.py has no line `__version__ = "X.Y.Z"`')
    return match[1]


HF = ["gguf>=0.19", "jinja2>=3.1", "safetensors>=0.8", "tokenizers>=0.23"]  # published models
SERVE = ["starlette>=1.10", "uvicorn>=0.54"]  # tools/serve.py
PARQUET = ["pyarrow>=25.0,<26"]  # apache-beam needs < 26

setup(
    name="lm",
    version=version(),
    description="Pre-train language models, carry them over, and fine-tune them, in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["lm", "lm.*"]),
    # An editable install of this layout puts the checkout itself on the import path, so that `python tools/NAME.py` and
    # studies find `lm`, `configs` and `experiments` from any folder. A wheel has `lm` alone.
    package_dir={"": "."},
    # Lower bounds are the oldest versions that the tests were run with. jax >= 0.11 needs Python >= 3.12.
    install_requires=[
        "absl-py>=2.5",
        "array-record>=0.8.6",
        "etils[epath]>=1.15",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "importlib_resources>=7.1",  # tensorflow-datasets imports it without requiring it
        "jax>=0.10.2",
        "jaxtyping>=0.3.11",
        "matplotlib>=3.11",
        "ml-collections>=1.1",
        "numpy>=2.4",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=12.3",
        "rich>=15.0",
        "sentencepiece>=0.2.3",
        "tensorboardX>=2.6.5",
        "tensorflow-datasets>=4.9.10",
        "zstandard>=0.25",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"],
        "gpu": ["jax[cuda13]>=0.10.2"],
        "quantization": ["qwix>=0.1.8"],  # model.dtype int8 and fp8
        "scores": SCORES,
        "parquet": PARQUET,  # and Arrow files
        "hf": HF,
        "serve": SERVE,
        "harness": ["lm_eval>=0.4.13"],  # tools/harness.py
        "search": ["optuna>=5.0"],  # sampler='tpe' of a study's SEARCH
        "wandb": ["wandb>=0.31"],  # a tracker, as the next
        "mlflow": ["mlflow-skinny>=3.17", "alembic>=1.20", "sqlalchemy>=2.1"],  # the latter two: its SQLite file
        "peer": ["peft>=0.21", "torch>=2.13", "transformers>=5.24"],  # lm/benchmark/transformers_gpt2.py; tests
        # Not part of `test`: it holds pillow and protobuf below the newest, which the tests are run with.
        "beam": ["apache-beam>=2.77"],
        # ruff and mypy are held to one minor version: a new one may find new faults in unchanged code.
        "test": [
            *SCORES,
            *PARQUET,
            *HF,
            *SERVE,
            "hypothesis>=6.170",
            "import-linter>=2.17",
            "mypy>=2.4.1,<2.5",
            "pytest>=9.2",
            "pytest-xdist>=3.8",
            "ruff>=0.17.6,<0.18",
        ],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
