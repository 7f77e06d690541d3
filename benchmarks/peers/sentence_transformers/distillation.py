"""Distil the generator's likelihoods into the retriever's encoder with sentence-transformers.

Run `python distillation.py WORK OUTPUT` in an environment with `requirements.txt`. The teacher of
a passage is the likelihood of the golden answer under the generator that sees this passage alone,
exp of the mean log-probability of its tokens, for the first golden answer. Questions are scored in
their order until the budget of tokens is spent. Scoring is done with transformers alone.

Hyper-parameters: the loss is REPLUG's (arXiv 2301.12652), a softmax over likelihoods against one
over similarities; both lie within some tenths of each other, hence temperature 0.1. Step size 2e-5,
warm-up over a tenth of the steps and batches of 16 are those of the library's training overview;
two epochs, as questions are few.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
from transformers import AutoModelForCausalLM, AutoTokenizer

EPOCHS = 2


class Teacher:
    """The generator; `tokens` counts what it has read, prompts and answers."""

    def __init__(self, directory: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        self._model = AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", trust_remote_code=False
        ).eval()
        self.tokens = 0

    @torch.inference_mode()
    def score(self, prompts: list[str], answer: str) -> list[float]:
        """Likelihood of the answer after each prompt, the geometric mean over its tokens."""
        answer_ids = self._tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        rows = [self._tokenizer(prompt)["input_ids"] + answer_ids for prompt in prompts]
        self.tokens += sum(map(len, rows))
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for place, row in enumerate(rows):  # padded on the left: answers end in one column
            ids[place, width - len(row) :] = torch.tensor(row)
            mask[place, width - len(row) :] = 1
        logits = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            logits_to_keep=len(answer_ids) + 1,
        ).logits
        logp = logits[:, :-1].float().log_softmax(dim=-1)
        wanted = torch.tensor(answer_ids).expand(len(rows), -1).unsqueeze(2)
        return logp.gather(2, wanted).squeeze(2).mean(dim=1).exp().tolist()


def main() -> None:
    """Score, train and save the encoder."""
    work, output = Path(sys.argv[1]), Path(sys.argv[2])
    plan = json.loads((work / "plan.json").read_text())
    records = json.loads((work / "train.json").read_text())
    teacher, rows = Teacher(plan["generator"]), []
    for record in records:
        if teacher.tokens >= plan["token_budget"]:
            break
        if not record["golden_answers"]:
            continue
        scores = teacher.score(record["candidate_prompts"], record["golden_answers"][0])
        passages = {f"passage_{n}": c["contents"] for n, c in enumerate(record["candidates"])}
        rows.append({"question": record["question"], **passages, "label": scores})
        if len(rows) % 10 == 0:
            print(f"{len(rows)} questions, {teacher.tokens:,} tokens", flush=True)

    model = SentenceTransformer(plan["encoder"], trust_remote_code=False)
    model.max_seq_length = plan["encoder_max_tokens"]
    trainer = SentenceTransformerTrainer(
        model=model,
        train_dataset=Dataset.from_list(rows),
        loss=DistillKLDivLoss(model, temperature=0.1),
        args=SentenceTransformerTrainingArguments(
            output_dir=str(output / "trainer"),
            seed=plan["seed"],
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=16,
            learning_rate=2e-5,
            warmup_steps=0.1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    model.save_pretrained(str(output / "encoder"))
    result = {
        "encoder": "encoder",
        "generator_tokens": teacher.tokens,
        "training_examples": len(rows),
    }
    (output / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
