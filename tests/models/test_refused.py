"""What the published configurations of models that cannot be served end in, before a server starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import REFUSED, digest
from checkpoints import write_config
from common import refused

from vllm_adamas.serving.plugin import register


@pytest.mark.refuses("{name}", table="refused models")
@pytest.mark.parametrize("name", REFUSED)
def test_a_model(record_property, tmp_path: Path, name: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    register()
    config, named = REFUSED[name]
    model = write_config(tmp_path, config)
    args = EngineArgs(str(model), attention_backend="adamas", skip_tokenizer_init=True)
    record_property("config", digest(config))
    record_property("sentence", refused(args.create_engine_config, *named))
