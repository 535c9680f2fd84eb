"""A DDPMPipeline of diffusers: trained further on your pictures, sampled, and each sample traced to the pictures it is owed to.

Run it:   python examples/diffusion_pipeline.py [--quick] [--html PAGE]

The pipeline is a small one with random weights, saved and loaded as a real one would be: put the name of a folder or of a model on the Hub
("google/ddpm-cifar10-32") in place of FOLDER, and your own pictures, of that model's size and from -1 to 1, in place of the emoji.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

import headwater as hw


def stand_in(folder):
    """In place of a pretrained pipeline: what ``DDPMPipeline.from_pretrained`` finds on the Hub looks like this."""
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, **kinds)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=200)).save_pretrained(folder)


def fit(pipe, pictures, recorder, epochs, batch=10):
    """A training loop as in diffusers' scripts. Recording it takes three lines: watch, draw and step."""
    unet = pipe.unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=1e-4)
    ema = EMAModel(unet.parameters(), decay=0.95)
    recorder.watch(unet, optimizer, steps=epochs * -(-len(pictures) // batch), ema=ema)
    order = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for indices in torch.randperm(len(pictures), generator=order).split(batch):
            drawn = recorder.draw(indices, pictures[indices], generator=order)  # in place of randn_like, randint and add_noise
            answer = unet(drawn.noisy, drawn.timesteps).sample
            loss = F.mse_loss(answer, drawn.target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.step(unet.parameters())
            recorder.step()
    recorder.finish()
    ema.copy_to(unet.parameters())  # what is sampled from, and saved
    unet.eval()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer pictures and steps")
    parser.add_argument("--html", help="write a page here")
    given = parser.parse_args(argv)
    count, epochs, shown = (20, 3, 2) if given.quick else (200, 40, 6)
    place = Path(tempfile.mkdtemp())

    # The pipeline and the data. The task takes timesteps, noise scale and prediction type from the pipeline's own scheduler.
    stand_in(place / "pipeline")  # FOLDER
    pipe = DDPMPipeline.from_pretrained(place / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    faces, _ = hw.data.emoji(["Smileys & Emotion"])
    train = F.avg_pool2d(faces[:count], 2) * 2 - 1
    task = hw.tasks.Diffusion(pipe.scheduler)
    config = pipe.unet.config

    # Training, recorded; then the pipeline with the averaged weights, saved, and loaded again as whoever uses it does.
    fit(pipe, train, hw.Recorder(place / "run", task=task, train=train, checkpoints=3), epochs)
    run = hw.Run.open(place / "run", build=lambda: UNet2DModel.from_config(config), train=train, task=task)
    pipe.save_pretrained(place / "trained")
    pipe = DDPMPipeline.from_pretrained(place / "trained")
    pipe.set_progress_bar_config(disable=True)
    made = pipe(batch_size=shown, generator=torch.Generator().manual_seed(2), num_inference_steps=50, output_type="np").images
    queries = torch.from_numpy(made).permute(0, 3, 1, 2) * 2 - 1  # as the network sees pictures

    # Which pictures taught it that? Gradients of the samples at the averaged weights they come from, of the pictures at the raw ones.
    methods = hw.DiffusionTracIn(timesteps=4, events="replay"), hw.DiffusionReTrac(timesteps=4)
    tracin, retrac = hw.trace(run, queries, list(methods), progress=False)
    near = (queries.flatten(1)[:, None] - train.flatten(1)).norm(dim=2)
    print(f"{len(train)} pictures, {run.checkpoints[-1]} steps; queries at {retrac.provenance['queries at']}\n")
    print(f"{'sample':>8}   {'owed to, by ReTrac':<36} {'by TracIn at the recorded noise':<36} nearest picture")
    for q in range(shown):
        best = [", ".join(f"{i} ({s.values[q, i]:+.1e})" for i in (-s.values[q]).argsort()[:2]) for s in (retrac, tracin)]
        print(f"{q:>8}   {best[0]:<36} {best[1]:<36} {int(near[q].argmin())} at distance {float(near[q].min()):.1f}")
    busy = {name: s.concentration(5) for name, s in (("ReTrac", retrac), ("TracIn", tracin))}
    for name, found in busy.items():
        print(f"{name}: {found}")
    if given.html:
        print("The page:", retrac.to_html(given.html, queries, train))
    again = hw.trace(run, train[:shown], methods[1], progress=False)
    own = (again.values.argmax(1) == range(shown)).mean()
    print(f"Asked about training pictures themselves, ReTrac names the picture itself first for {own:.0%}.")
    return {"samples": len(queries), "largest": float(abs(retrac.values).max()), "itself first": float(own)}


if __name__ == "__main__":
    main()
