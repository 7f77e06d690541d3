"""Train a plain cross-encoder on gold passages with sentence-transformers, and re-rank with it.

Run `python cross_encoder.py WORK OUTPUT` in an environment with `requirements.txt`. A pair is a
training question and one of its candidates, or its gold passage where the retriever missed it; its
label says whether the passage is gold. The generator is never asked.

Hyper-parameters: warm-up over a tenth of the steps and batches of 16 are those of the library's
training overview. The base is the retriever's encoder with a new head, and questions are few: two
epochs with step size 5e-5, where the overview has one with 2e-5. `pos_weight` is the number of
negatives a positive, as in its examples with this loss.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers.cross_encoder import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

EPOCHS = 2


def labelled_pairs(records: list[dict]) -> list[dict]:
    """Each training question with its candidates and gold passages."""
    pairs = []
    for record in records:
        gold = {passage["id"] for passage in record["gold"]}
        texts = {p["id"]: p["contents"] for p in [*record["candidates"], *record["gold"]]}
        if gold:
            pairs += [
                {"question": record["question"], "passage": text, "label": float(key in gold)}
                for key, text in texts.items()
            ]
    return pairs


def main() -> None:
    """Train, then order the candidates of each question that is measured."""
    work, output = Path(sys.argv[1]), Path(sys.argv[2])
    plan = json.loads((work / "plan.json").read_text())
    pairs = labelled_pairs(json.loads((work / "train.json").read_text()))
    positives = sum(pair["label"] for pair in pairs)
    torch.manual_seed(plan["seed"])  # the new head is drawn when the model is opened
    model = CrossEncoder(
        plan["encoder"],
        num_labels=1,
        max_length=plan["encoder_max_tokens"] + 32,
        trust_remote_code=False,
    )
    weight = torch.tensor((len(pairs) - positives) / positives)
    trainer = CrossEncoderTrainer(
        model=model,
        train_dataset=Dataset.from_list(pairs),
        loss=BinaryCrossEntropyLoss(model, pos_weight=weight),
        args=CrossEncoderTrainingArguments(
            output_dir=str(output / "trainer"),
            seed=plan["seed"],
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=16,
            learning_rate=5e-5,
            warmup_steps=0.1,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    picks = {}
    for record in json.loads((work / "dev.json").read_text()):
        passages = record["candidates"]
        ranked = model.rank(record["question"], [p["contents"] for p in passages])
        best = ranked[: plan["num_selected"]]
        picks[record["id"]] = [passages[hit["corpus_id"]]["id"] for hit in best]
    result = {"picks": picks, "generator_tokens": 0, "training_examples": len(pairs)}
    (output / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
