"""A text-conditional diffusion model fine-tuned with LoRA on two owners' pictures: whose pictures is each generation owed to?

Run it:   python examples/diffusion_lora.py [--quick] [--html PAGE]

The base is a small UNet2DConditionModel with random weights, saved and loaded as a real one would be, and a prompt's embedding is a few random
numbers in place of a text encoder's. For a real model load its network (``UNet2DConditionModel.from_pretrained(NAME, subfolder="unet")``), give
``train`` the pictures as latents and the prompts as their encoder makes them (``hw.tasks.latents``, ``hw.tasks.embeddings``), and sample
with its pipeline, ``output_type="latent"``. Only adapters are trained, recorded, and compared: a checkpoint is as small as they are.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig

import headwater as hw

OWNERS = "Flags", "Food & Drink"
LORA = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"])


def stand_in(folder):
    """In place of a pretrained network."""
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8}
    UNet2DConditionModel(**sizes, **kinds, attention_head_dim=8, cross_attention_dim=8).save_pretrained(folder)


def adapted(folder):
    """The network with new adapters, as diffusers' scripts make it: everything else is frozen."""
    unet = UNet2DConditionModel.from_pretrained(folder).requires_grad_(False)
    torch.manual_seed(1)
    unet.add_adapter(LORA)
    return unet


def fit(unet, train, recorder, epochs, batch=10):
    pictures, prompts = train
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    recorder.watch(unet, optimizer, steps=epochs * -(-len(pictures) // batch))
    order = torch.Generator().manual_seed(1)
    unet.train()
    for _ in range(epochs):
        for indices in torch.randperm(len(pictures), generator=order).split(batch):
            drawn = recorder.draw(indices, pictures[indices], generator=order)  # in place of randn_like, randint and add_noise
            answer = unet(drawn.noisy, drawn.timesteps, encoder_hidden_states=prompts[indices]).sample
            F.mse_loss(answer, drawn.target).backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
    recorder.finish()
    return unet.eval()


@torch.no_grad()
def sample(unet, scheduler, prompts, steps=20):
    """What a pipeline does after its text encoder and before its decoder."""
    scheduler.set_timesteps(steps)
    x = torch.randn(len(prompts), 3, 16, 16, generator=torch.Generator().manual_seed(3))
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, encoder_hidden_states=prompts).sample, t, x).prev_sample
    return x.clamp(-1, 1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer pictures and steps")
    parser.add_argument("--html", help="write a page here")
    given = parser.parse_args(argv)
    count, epochs, shown = (12, 6, 1) if given.quick else (40, 40, 3)
    place = Path(tempfile.mkdtemp())
    stand_in(place / "unet")

    # Two owners, each with a prompt of its own: an embedding (tokens, width) for each picture.
    parts = [F.avg_pool2d(hw.data.emoji([owner])[0][:count], 2) * 2 - 1 for owner in OWNERS]
    words = torch.randn(len(OWNERS), 4, 8, generator=torch.Generator().manual_seed(2))
    owner = [name for name in OWNERS for _ in range(count)]
    train = torch.cat(parts), words.repeat_interleave(count, 0)
    scheduler = DDPMScheduler(num_train_timesteps=200)
    task = hw.tasks.Diffusion(scheduler)

    # Fine-tuning, recorded. What is saved are the adapters; whoever uses them loads them onto the network.
    unet = fit(adapted(place / "unet"), train, hw.Recorder(place / "run", task=task, train=train, checkpoints=3), epochs)
    unet.save_lora_adapter(str(place / "lora"))
    user = UNet2DConditionModel.from_pretrained(place / "unet")
    user.load_lora_adapter(str(place / "lora"), weight_name="pytorch_lora_weights.safetensors", prefix=None)
    asked = words.repeat_interleave(shown, 0)
    queries = sample(user.eval(), DDIMScheduler.from_config(scheduler.config), asked), asked

    # The run as another program opens it; whose pictures hold how much of the influence over each generation?
    run = hw.Run.open(place / "run", build=lambda: adapted(place / "unet"), train=train, task=task)
    size = [sum(file.stat().st_size for file in run.path.glob(pattern)) / 1024 for pattern in (f"checkpoints/{run.checkpoints[-1]}.safetensors", "frozen.safetensors")]
    print(f"{len(train[0])} pictures, {run.checkpoints[-1]} steps; {size[0]:.0f} KB a checkpoint with its moments, {size[1]:.0f} KB once for the frozen network\n")
    methods = {"TracIn": hw.DiffusionTracIn(timesteps=4), "ReTrac": hw.DiffusionReTrac(timesteps=4), "Source": hw.Source(segments=2)}
    found = dict(zip(methods, hw.trace(run, queries, list(methods.values()), progress=False), strict=True))
    print(f"{'asked for':<14}" + "".join(f"{name + ': ' + who:>24}" for name in found for who in OWNERS))
    right = {}
    for name, scores in found.items():
        held = scores.group(owner)
        right[name] = sum(held.values[q].argmax() == list(held.train_names).index(OWNERS[q // shown]) for q in range(len(asked))) / len(asked)
    for q in range(len(asked)):
        print(f"{OWNERS[q // shown]:<14}" + "".join(f"{scores.group(owner).values[q, k]:>24.2e}" for scores in found.values() for k in range(len(OWNERS))))
    print("\nThe owner whose prompt was given holds most of the influence: " + ", ".join(f"{name} {share:.0%}" for name, share in right.items()))
    if given.html:
        print("The page:", found["ReTrac"].to_html(given.html, queries, train))
    return right


if __name__ == "__main__":
    main()
