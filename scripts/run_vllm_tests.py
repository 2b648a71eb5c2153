"""Run vLLM's own tests of attention backends with ADAMAS as the backend under test.

They compare prefill and decode over a paged cache with FlexAttention, in causal and in sliding-window
layers. The budget is above every context, so the expected output is that of dense attention. The cache has
the backend's pages instead of plain K and V. The tests come from vLLM's source distribution of the
installed version, fetched from pip's package index or given as a folder.
"""

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import downloads
import pytest
from packaging.version import Version

from vllm_adamas.serving import checks, compat, plugin

#: Of the source distributions, by version.
SHA256 = {
    "0.32.0": "d2c957d5eee3d0985012151315ddc62cbe0cd368fc96a5fc3510438d9dddf2ad",
    "0.33.0": "f4c33c2503d52bb411146afa9618a4f48bed68912f617e6803ac8d76e4c74112",
}
MODULE = "tests/v1/attention/test_attention_backends.py"
NEEDED = ("tests/__init__.py", "tests/v1/attention/")
TESTS = ("test_causal_backend_correctness", "test_sliding_window_backend_correctness")

#: Attention shapes of the models that the tests name; their own files would have to be downloaded.
MODELS = {
    "meta-llama/Meta-Llama-3-8B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "microsoft/Phi-tiny-MoE-instruct": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "sliding_window": 2047,
    },
}
SHAPE = {
    "hidden_size": 4096,
    "head_dim": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


def fetch(version: str, folder: Path) -> None:
    """Unpacks the tests of vLLM's source distribution from pip's package index into the folder."""
    if version not in SHA256:
        sys.exit(f"No sha256 of vLLM {version} is recorded here: give --tests FOLDER.")
    archive = downloads.fetch("vllm", f"vllm-{version}.tar.gz", SHA256[version])
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            member.name = member.name.partition("/")[2]  # without vllm-VERSION
            if member.name.startswith(NEEDED):
                tar.extract(member, folder, filter="data")


class UnderTest:
    """A pytest plugin that makes ADAMAS the backend under test, in a sparse and in a dense layer.

    Args:
        models: folder with one folder per model, which holds its config.json.
    """

    def __init__(self, models: Path):
        self.models = models

    @pytest.fixture(autouse=True, params=[1, 0], ids=["sparse layer", "dense layer"])
    def layer(self, request, monkeypatch):
        name = f"model.layers.{request.param}.self_attn.attn"
        monkeypatch.setattr(request.module.MockAttentionLayer, "layer_name", name, raising=False)

    @pytest.fixture
    def default_vllm_config(self):
        """The fixture of vLLM's conftest, which imports packages that a server does not need."""
        from vllm.config import VllmConfig, set_current_vllm_config

        with set_current_vllm_config(VllmConfig()):
            yield

    def pytest_collection_modifyitems(self, items):
        for item in items:
            item.callspec.params["model"] = str(self.models / item.callspec.params["model"])
        for module in {item.module for item in items}:
            adapt(module)


def adapt(module) -> None:
    """Restricts the tests to ADAMAS, and sets its options, its block size and its pages."""
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_adamas.layout import PageLayout
    from vllm_adamas.serving.backend import AdamasBackend
    from vllm_adamas.serving.shared import Shared

    test, configure = module._test_backend_correctness, module.create_vllm_config
    fill, run = module.create_and_prepopulate_kv_cache, module.run_attention_backend
    backends = [AttentionBackendEnum[compat.NAME]]
    module.BACKENDS_TO_TEST = module.SLIDING_WINDOW_BACKENDS_TO_TEST = backends
    # Otherwise the tests also run FlexAttention as a backend.
    module.is_torch_equal_or_newer = lambda version: False

    def test_backend(*args, **kwargs):
        if current_platform.is_cpu():
            kwargs.setdefault("block_size", 32)  # the smallest that vLLM's CPU kernel takes
        return test(*args, **kwargs)

    def create_vllm_config(*args, **kwargs):
        config = configure(*args, **kwargs)
        config.cache_config.num_gpu_blocks = 1 + 2**16 // config.cache_config.block_size
        options = {"token_budget": 2**20, "metrics": False, "log_interval": 0}
        config.additional_config = {"adamas": options}
        return config

    def create_pages(*args, block_size, num_kv_heads, head_size, **kwargs):
        sizes = {"block_size": block_size, "num_kv_heads": num_kv_heads, "head_size": head_size}
        stock = fill(*args, **sizes, **kwargs)  # [B, H, N, 2 D]
        layout = PageLayout(head_size, block_size, stock.dtype)
        content = layout.token_bytes // stock.dtype.itemsize
        page = stock.new_zeros(*stock.shape[:3], content)
        layout.k(page).copy_(stock[..., :head_size])
        layout.v(page).copy_(stock[..., head_size:])
        return page

    def run_backend(
        backend, kv_cache_spec, names, config, device, metadata, query, *args, **kwargs
    ):
        if config.cache_config.cache_dtype.startswith("fp8"):
            # The expected output is computed from fp8 queries, so round them for every kernel.
            query = query.to(current_platform.fp8_dtype()).to(query.dtype)
        spec = AdamasBackend.customize_spec(kv_cache_spec)
        # The tests build the layer after the metadata, but an engine builds it before.
        shared = Shared(checks.read_config(config), device.type)
        layer = SimpleNamespace(impl=SimpleNamespace(shared=shared))
        compat.layers_of(config).update(dict.fromkeys(names, layer))
        with set_default_torch_dtype(query.dtype):  # as while a model is built
            return run(backend, spec, names, config, device, metadata, query, *args, **kwargs)

    module._test_backend_correctness = test_backend
    module.create_vllm_config = create_vllm_config
    module.create_and_prepopulate_kv_cache = create_pages
    module.run_attention_backend = run_backend


def start_vllm(folder: Path) -> None:
    """Registers the backend and creates the process group that vLLM's workers have."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    plugin.register()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/group", 0, "gloo")
        initialize_model_parallel(backend="gloo")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--tests",
        type=Path,
        metavar="FOLDER",
        help="an unpacked vLLM: the folder that holds tests/",
    )
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    args = parser.parse_args()
    version = Version(compat.vllm_version()).public
    with tempfile.TemporaryDirectory(prefix="vllm-tests-") as name:
        folder = Path(name)
        if args.tests is None:
            fetch(version, folder)
        tests = args.tests or folder
        if not (tests / MODULE).is_file():
            sys.exit(f"{tests} has no {MODULE}: give the folder of an unpacked vLLM {version}.")
        for model, config in MODELS.items():
            (folder / model).mkdir(parents=True)
            (folder / model / "config.json").write_text(json.dumps({**SHAPE, **config}))
        (folder / "pytest.ini").write_text("[pytest]\n")
        start_vllm(folder)
        sys.path.insert(0, str(tests))
        options = ["-c", str(folder / "pytest.ini"), "--noconftest", "-p", "no:cacheprovider"]
        options += ["-p", "no:logging"]  # torch's tracing logs too much
        cases = [f"{tests / MODULE}::{test}" for test in TESTS]
        return pytest.main([*options, "-q", *args.pytest, *cases], plugins=[UnderTest(folder)])


if __name__ == "__main__":
    sys.exit(main())
