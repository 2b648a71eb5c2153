"""Entry point of the ``vllm.general_plugins`` group.

vLLM calls :func:`register` while it parses arguments, in the engine core and in each worker, so it
must be cheap, idempotent and free of side effects for servers that use another backend.
"""

from __future__ import annotations


def register() -> None:
    """Makes ``--attention-backend adamas`` a valid choice in this process."""
    from vllm_adamas import compat

    compat.require_supported_vllm()
    compat.register_backend()
    compat.check_config_with(_check)
    compat.select_on_cpu()


def _check(vllm_config) -> None:
    from vllm_adamas.checks import check_config
    from vllm_adamas.serving import metrics

    check_config(vllm_config)
    metrics.announce()
