"""What the package uses of vLLM is there: in the installed release, and in the newest that is accepted.

Both are read and not imported. Of the newest release the facts are kept in ``tests/data``, since it
need not be installed.
"""

import json
import sys
from pathlib import Path

import pytest
from common import ROOT
from packaging.version import Version

from vllm_adamas.serving import compat

sys.path.insert(0, str(ROOT / "scripts"))

import check_vllm_names as names

RECORDED = json.loads(names.RECORD.read_text())


@pytest.fixture(scope="module")
def uses() -> list[names.Use]:
    return names.collect(names.installed())


def test_the_installed_vllm_has_every_name(uses) -> None:
    assert names.problems(uses, names.facts(uses, names.installed())) == []


def test_the_newest_accepted_vllm_has_every_name(uses) -> None:
    """A name that is missing may be new here: `make vllm-names WHEEL=...` looks it up."""
    major, minor = Version(RECORDED["version"]).release[:2]
    assert (major, minor + 1) == compat.VLLM_MAX
    assert names.problems(uses, RECORDED["names"]) == []


def test_uses_of_every_kind_are_found(uses) -> None:
    found = {(use.path, use.kind) for use in uses}
    backend = "vllm.v1.attention.backend"
    assert found >= {
        ("vllm.platforms.current_platform.is_cpu", "call"),
        ("vllm.config.VllmConfig.cache_config.user_specified_block_size", "exists"),
        ("vllm._custom_ops.cpu_attention_with_kv_cache", "call"),
        (f"{backend}.AttentionImpl.forward", "override"),
        (f"{backend}.AttentionMetadataBuilder", "subclass"),
        (f"{backend}.AttentionMetadataBuilder._cudagraph_support", "exists"),
        (f"{backend}.AttentionMetadataBuilder.build_for_cudagraph_capture", "call"),
        (f"{backend}.CommonAttentionMetadata.seq_lens_cpu_upper_bound", "exists"),
        ("vllm.v1.kv_cache_interface.AttentionSpec.state_content_bytes", "exists"),
        ("vllm.platforms.cpu.CpuPlatform.get_attn_backend_cls", "override"),
        (names.FLASH, "call"),
    }


class Changed(names.Sources):
    """The installed vLLM with a passage of one file replaced."""

    def __init__(self, file: str, old: str, new: str):
        self._change = (f"vllm/{file}", old, new)
        super().__init__(names.installed().place)

    def _read(self, name: str) -> str | None:
        file, old, new = self._change
        text = super()._read(name)
        if name == file:
            assert old in text, f"{file} of this vLLM has no {old!r}"
            return text.replace(old, new)
        return text


BACKEND, UTILS = "v1/attention/backend.py", "v1/attention/backends/utils.py"
CHANGES = {  # of vLLM: file, passage, what comes in its place, the problem
    "a field is renamed": (
        *(BACKEND, "seq_lens_cpu_upper_bound:", "seq_lens_bound:"),
        "seq_lens_cpu_upper_bound: there is no such name",
    ),
    "a setting is gone": (
        *("config/cache.py", "user_specified_block_size", "has_block_size"),
        "cache_config.user_specified_block_size: there is no such name",
    ),
    "a function moves": (
        *(UTILS, "def split_decodes_and_prefills(", "def split_batch("),
        "utils.split_decodes_and_prefills: there is no such name",
    ),
    "a function wants more": (
        *(UTILS, "def split_decodes_and_prefills(\n", "def split_decodes_and_prefills(mode,\n"),
        "split_decodes_and_prefills: missing a required argument",
    ),
    "an operation loses a keyword": (
        *("_custom_ops.py", "scheduler_metadata: torch.Tensor", "schedule: torch.Tensor"),
        "cpu_attention_with_kv_cache: got an unexpected keyword argument 'scheduler_metadata'",
    ),
    "FlashAttention loses a keyword that travels in a dictionary": (
        *("vllm_flash_attn/flash_attn_interface.py", "seqused_k=None", "lens_k=None"),
        "flash_attn_varlen_func: got an unexpected keyword argument 'seqused_k'",
    ),
    "a hook gets another argument": (
        *(BACKEND, 'def customize_spec(cls, spec: "AttentionSpec")', "def customize_spec(cls, spec, config)"),
        "customize_spec: overridden as (spec), which does not take config",
    ),
    "a hook is gone": (
        *(BACKEND, "def supported_kv_cache_layouts(", "def kv_cache_layouts("),
        "AttentionBackend.supported_kv_cache_layouts: there is no such name",
    ),
    "a method becomes abstract": (
        *(BACKEND, "    @classmethod\n    def full_cls_name", "    @classmethod\n    @abstractmethod\n    def full_cls_name"),
        "AttentionBackend: abstract methods are missing: full_cls_name",
    ),
    "a patched method gets another argument": (
        *("platforms/cpu.py", "def check_and_update_config(cls, ", "def check_and_update_config(cls, stage, "),
        "CpuPlatform.check_and_update_config: overridden as (vllm_config)",
    ),
    "the selector tells backends more": (
        *("v1/attention/selector.py", "    use_mla: bool = False\n", "    use_mla: bool = False\n    use_x: bool = False\n"),
        "validate_configuration: got an unexpected keyword argument 'use_x'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("file", "old", "new", "named"), CHANGES.values(), ids=CHANGES)
def test_a_change_of_vllm_is_noticed(uses, file: str, old: str, new: str, named: str) -> None:
    problems = names.problems(uses, names.facts(uses, Changed(file, old, new)))
    assert problems
    assert any(named in problem for problem in problems), problems


def test_a_wheel_is_read_as_a_folder_is(tmp_path: Path) -> None:
    import zipfile

    files = {
        "vllm/__init__.py": "from .a import *\nfrom vllm.b import f as g",
        "vllm/a.py": "class A:\n    x: 'A | None' = None\n    def f(self, y, z=1) -> 'A': ...",
        "vllm/b.py": "def f(*, k): ...",
        "vllm/_version.py": "__version__ = version = '1.2.3'",
    }
    with zipfile.ZipFile(tmp_path / "vllm.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
    for place in (tmp_path / "vllm.whl", tmp_path):
        sources = names.Sources(place)
        assert sources.version == "1.2.3"
        assert sources.fact("vllm.A.x.x.f().f") == "function(y, z=...)"
        assert sources.fact("vllm.g") == "function(*, k)"
        assert sources.fact("vllm.A.y") is None
        assert sources.fact("vllm.c") is None
