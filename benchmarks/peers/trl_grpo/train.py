"""Train the generator with TRL's GRPO on prompts that show the retriever's first passages.

Run `python train.py WORK OUTPUT` in an environment with `requirements.txt`. The reward is the F1 of
the answer, restated here from its definition so that nothing of rlrag is needed. Training ends when
the prompt and answer tokens of the generator reach the budget; TRL counts them itself. The same
command goes on from the last checkpoint.

Hyper-parameters: adapter (rank 16, alpha 32) and step size (2e-4) are those with which rlrag trains
the same generator; groups of 4 are its 4 selections a question; all else is TRL's default, GRPO
with the DAPO loss, no KL term, temperature 1. Gradient checkpointing is off: it only saves memory.
Without Triton TRL would compute the vocabulary's logits at every position of the prompts too, only
to mask them; here it scores the answers' positions alone, as it does with Triton: the same loss in
21 s a step, not 37.
"""

from __future__ import annotations

import json
import string
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

QUESTIONS_PER_STEP = 4
ANSWERS_PER_QUESTION = 4
STEPS_AT_MOST = 10_000
STEPS_A_CHECKPOINT = 10


def normalized(text: str) -> list[str]:
    """SQuAD's words: lower case, without punctuation and articles."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in text.split() if word not in ("a", "an", "the")]


def f1(answer: str, golden_answers: list[str]) -> float:
    """Harmonic mean of word precision and recall, the best over golden answers."""
    words, best = Counter(normalized(answer)), 0.0
    for golden in map(Counter, map(normalized, golden_answers)):
        if golden:
            best = max(best, 2 * (words & golden).total() / (words.total() + golden.total()))
    return best


def newest_checkpoint(trainer_dir: Path) -> tuple[Path | None, float]:
    """The newest whole checkpoint and the seconds that training took until it."""
    whole = [file.parent for file in trainer_dir.glob("checkpoint-*/seconds.txt")]
    if not whole:
        return None, 0.0
    newest = max(whole, key=lambda checkpoint: int(checkpoint.name.split("-")[1]))
    return newest, float((newest / "seconds.txt").read_text())


class EndAtBudget(TrainerCallback):
    """Ends training when the generator has read and written enough tokens; notes the time."""

    def __init__(self, token_budget: int, started: float) -> None:
        self._token_budget, self._started = token_budget, started

    def on_step_end(self, args, state, control, **kwargs):
        """After each optimizer step."""
        control.should_training_stop = state.num_input_tokens_seen >= self._token_budget
        return control

    def on_save(self, args, state, control, **kwargs):
        """After each checkpoint; the file says that it is whole."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (checkpoint / "seconds.txt").write_text(str(time.monotonic() - self._started))


def main() -> None:
    """Train, merge the adapter and save the whole generator."""
    work, output = Path(sys.argv[1]), Path(sys.argv[2])
    checkpoint, seconds_before = newest_checkpoint(output / "trainer")
    started = time.monotonic() - seconds_before
    plan = json.loads((work / "plan.json").read_text())
    records = json.loads((work / "train.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(
        plan["generator"], padding_side="left", trust_remote_code=False
    )
    model = AutoModelForCausalLM.from_pretrained(
        plan["generator"], dtype="auto", trust_remote_code=False
    )
    trl.trainer.utils._use_triton = lambda device: True  # asked there for which positions to score

    # An answer ends with its line; TRL ends it at every token that the model declares as an end.
    ends = model.generation_config.eos_token_id
    ends_of_line = [
        token
        for token in range(len(tokenizer))
        if tokenizer.decode([token]).startswith(tuple(plan["stop"]))
    ]
    declared = ends if isinstance(ends, list) else [ends]
    model.generation_config.eos_token_id = [*declared, *ends_of_line]

    def reward(completions, golden_answers, **kwargs):
        answers = [text.split(plan["stop"][0])[0] for text in completions]
        return [f1(*pair) for pair in zip(answers, golden_answers, strict=True)]

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        train_dataset=Dataset.from_list(
            [{key: record[key] for key in ("prompt", "golden_answers")} for record in records]
        ),
        callbacks=[EndAtBudget(plan["token_budget"], started)],
        args=GRPOConfig(
            output_dir=str(output / "trainer"),
            seed=plan["seed"],
            use_cpu=not torch.cuda.is_available(),
            max_steps=STEPS_AT_MOST,
            per_device_train_batch_size=QUESTIONS_PER_STEP * ANSWERS_PER_QUESTION,
            num_generations=ANSWERS_PER_QUESTION,
            max_completion_length=plan["max_new_tokens"],
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="steps",
            save_steps=STEPS_A_CHECKPOINT,
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trained = trainer.model.merge_and_unload()
    trained.generation_config.eos_token_id = ends
    trained.save_pretrained(output / "generator")
    AutoTokenizer.from_pretrained(plan["generator"], trust_remote_code=False).save_pretrained(
        output / "generator"
    )
    result = {
        "generator": "generator",
        "generator_tokens": int(trainer.state.num_input_tokens_seen),
        "training_examples": min(len(records), trainer.state.global_step * QUESTIONS_PER_STEP),
        "seconds_before": seconds_before,
    }
    (output / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
