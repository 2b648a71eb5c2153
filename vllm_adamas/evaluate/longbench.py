"""LongBench (arXiv 2308.14508): prompts, data and metrics are those of lm-eval's tasks ``longbench_*``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from vllm_adamas.errors import AdamasError
from vllm_adamas.evaluate.samples import Sample, question_ids
from vllm_adamas.evaluate.suites import Suite
from vllm_adamas.evaluate.tasks import check_names

PREFIX, EVEN = "longbench_", "_e"  #: names in lm-eval; those of LongBench-E end with the second
#: Tasks whose prompts are texts to be continued: LongBench gives them without a chat template.
CONTINUED = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
INSTALL = 'pip install "lm_eval[longbench]>=0.4.13"'


def suite(tokenizer, names: Sequence[str]) -> Suite:
    """The suite of these tasks, by default LongBench's 21. Prompts longer than the length lose their middle.

    Raises:
        AdamasError: lm-eval is not installed, or a task is unknown; from ``samples`` and ``size``: its data
            are not on the host.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise AdamasError(
            f"the suite longbench needs lm-eval and {error.name} is not installed: run {INSTALL}."
        ) from None
    manager = TaskManager()
    known = [
        name.removeprefix(PREFIX)
        for name in manager.all_subtasks
        if name.startswith(PREFIX) and not name.endswith(EVEN)
    ]
    check_names(names, known)

    @cache
    def load(task: str):
        name = f"{PREFIX}{task}"
        try:
            return manager.load(name)["tasks"][name]
        except ModuleNotFoundError as error:
            raise AdamasError(
                f"the task {task} needs {error.name}, which is not installed: run {INSTALL}."
            ) from None
        except (OSError, ValueError) as error:
            raise AdamasError(
                f"the data of {task} are not on this host and cannot be fetched ({type(error).__name__}): download "
                "the data set Xnhyacinth/LongBench from the Hugging Face Hub into its cache first."
            ) from None

    def samples(task: str, length: int, count: int) -> list[Sample]:
        definition = load(task)
        how = definition.config.generation_kwargs
        made = []
        for doc in definition.test_docs().select(range(min(count, size(task)))):
            text = definition.doc_to_text(doc)
            if task in CONTINUED:
                ids = list(tokenizer(text, verbose=False).input_ids)
            else:
                ids = question_ids(tokenizer, text, "")

            def score(answer: str, doc=doc) -> float:
                return float(definition.process_results(doc, [answer])["score"])

            room = length - how["max_gen_toks"]
            if room < 2:
                raise AdamasError(
                    f"the task {task} generates {how['max_gen_toks']} tokens and has a length of {length}: raise "
                    "--lengths."
                )
            if len(ids) > room:
                ids = ids[: room // 2] + ids[len(ids) - (room - room // 2) :]
            made.append(Sample(ids, how["max_gen_toks"], score, until=tuple(how["until"])))
        return made

    def size(task: str) -> int:
        return len(load(task).test_docs())

    return Suite("longbench", tuple(names) or tuple(known), samples, {}, size=size)
