"""Train the retriever's encoder with sentence-transformers on mined hard negatives.

Run `python hard_negatives.py WORK OUTPUT` in an environment with `requirements.txt`. It knows each
training question's gold passage and never asks the generator. Negatives are mined among all
candidates of all training questions: what the retriever found in the whole corpus with the same
encoder.

Hyper-parameters: those of the library's training overview (step size 2e-5, warm-up over a tenth of
the steps, one epoch, batches of 16 without duplicates), the loss's default scale 20, and the
relative margin 0.05 that the documentation of mining advises after NV-Retriever.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import mine_hard_negatives

NEGATIVES = 1
EPOCHS = 1


def main() -> None:
    """Mine, train and save the encoder."""
    work, output = Path(sys.argv[1]), Path(sys.argv[2])
    plan = json.loads((work / "plan.json").read_text())
    records = [r for r in json.loads((work / "train.json").read_text()) if r["gold"]]
    model = SentenceTransformer(plan["encoder"], trust_remote_code=False)
    model.max_seq_length = plan["encoder_max_tokens"]

    pairs = Dataset.from_list(
        [
            {"question": record["question"], "passage": gold["contents"]}
            for record in records
            for gold in record["gold"]
        ]
    )
    mined = mine_hard_negatives(
        pairs,
        model,
        corpus=sorted({c["contents"] for record in records for c in record["candidates"]}),
        relative_margin=0.05,
        num_negatives=NEGATIVES,
        sampling_strategy="top",
        verbose=False,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        train_dataset=mined,
        loss=MultipleNegativesRankingLoss(model),
        args=SentenceTransformerTrainingArguments(
            output_dir=str(output / "trainer"),
            seed=plan["seed"],
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=16,
            learning_rate=2e-5,
            warmup_steps=0.1,
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    model.save_pretrained(str(output / "encoder"))
    result = {"encoder": "encoder", "generator_tokens": 0, "training_examples": len(mined)}
    (output / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
