"""Entry point of the ``vllm.general_plugins`` group.

vLLM calls :func:`register` while it parses arguments, in the engine core and in each worker. It must
therefore be cheap, idempotent and free of side effects for servers that use another backend.
"""

from __future__ import annotations

import warnings


def register() -> None:
    """Makes ``--attention-backend adamas`` a valid choice in this process.

    With a vLLM outside the supported range, choosing it ends the command; other backends still work.
    """
    from vllm_adamas.serving import compat

    problem = compat.unsupported_vllm()
    try:
        compat.register_backend()
        compat.check_config_with(_check)
        compat.select_on_cpu(_problems)
    except Exception:
        if problem is None:
            raise
        warnings.warn(f"vllm-adamas: {problem}", stacklevel=2)


def _check(vllm_config) -> None:
    from vllm_adamas.serving import compat

    compat.require_supported_vllm()
    from vllm_adamas.dtypes import page_dtype
    from vllm_adamas.layout import overhead
    from vllm_adamas.serving import export
    from vllm_adamas.serving.checks import check_config

    config, model = check_config(vllm_config), vllm_config.model_config
    if config.metrics and model is not None:
        element = page_dtype(vllm_config.cache_config.cache_dtype, model.dtype)
        extra = overhead(model.get_head_size(), element)
        export.export(model.served_model_name, export.options(config), extra)


def _problems(**layer) -> list[str]:
    from vllm_adamas.serving.backend import AdamasBackend

    return AdamasBackend.validate_configuration(device_capability=None, **layer)
