"""A model is known to have QK-norm before its weights are here as it is by the names of its tensors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from architectures import HYBRIDS, SERVED
from checkpoints import write_model

from vllm_adamas.identity import QK_NORM_TYPES, has_qk_norm


@pytest.mark.parametrize("name", [*SERVED, *HYBRIDS])
def test_a_model(tmp_path: Path, name: str) -> None:
    made = {**SERVED, **HYBRIDS}[name]
    kind, folder = made["model_type"], write_model(tmp_path, made)
    config = SimpleNamespace(model_type=kind)
    named = has_qk_norm(SimpleNamespace(model=folder, revision=None, hf_text_config=config))
    assert named == (kind in QK_NORM_TYPES)
