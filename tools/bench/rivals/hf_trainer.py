"""The rival of fine-tuning: transformers' own Trainer around its own sequence classifier, on one process.

::

    python tools/bench/rivals/hf_trainer.py SETTINGS.json

The settings name the encoder's folder, the files, and all that both sides are to have alike; what they do not name is as Trainer
has it. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains, and returns the accuracy on the test files and the number of samples trained on."""
    disable_progress_bars()
    set_seed(settings["seed"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    numbers: dict[str, int] = {}

    def read(files: list[str]) -> Dataset:
        rows = [json.loads(line) for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()]
        encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=settings["max_tokens"])
        return Dataset.from_dict({**encoded, "labels": [numbers.setdefault(row["label"], len(numbers)) for row in rows]})

    train, test = read(settings["train"]), read(settings["test"])
    model = AutoModelForSequenceClassification.from_pretrained(
        settings["model"], num_labels=len(numbers), classifier_dropout=settings["dropout"]
    )
    with tempfile.TemporaryDirectory(prefix="scaletrain-rival-") as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=settings["epochs"],
            per_device_train_batch_size=settings["batch_size"],
            per_device_eval_batch_size=256,
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="linear",
            warmup_steps=settings["warmup_share"],  # below 1 it is a share
            adam_beta1=settings["betas"][0],
            adam_beta2=settings["betas"][1],
            adam_epsilon=settings["epsilon"],
            weight_decay=settings["weight_decay"],
            max_grad_norm=settings["clip_norm"],
            seed=settings["seed"],
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer), train_dataset=train)
        trainer.train()
        predicted = trainer.predict(test)
    right = (predicted.predictions.argmax(-1) == predicted.label_ids).sum()
    return {"accuracy": float(right) / len(test), "samples": len(train) * settings["epochs"], "step_cpu_s": []}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))), flush=True)
