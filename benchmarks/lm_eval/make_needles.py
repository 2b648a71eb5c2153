"""Write needles.jsonl, the data of needles.yaml, from the tasks of `vllm-adamas eval`."""

import argparse
import json
from pathlib import Path

from transformers import AutoTokenizer

from vllm_adamas.evaluate import tasks, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="model whose tokenizer and chat template are used")
    parser.add_argument("--context", type=int, default=4000)
    parser.add_argument("--prompts", type=int, default=50)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    hay = texts.packaged(calibration=False).content
    made = tasks.prompts(tokenizer, "single", hay, args.context, args.prompts, seed=0)
    lines = [{"prompt": tokenizer.decode(p.ids), "answer": p.expected[0]} for p in made]
    target = Path("needles.jsonl")  # lm-eval reads it from the folder it is called in
    target.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{target}: {len(lines)} prompts")


if __name__ == "__main__":
    main()
