"""A small diffusion model of handwritten digits: which training digits is a generated one owed to?

Run it:                     python examples/diffusion.py
Or from the command line:   headwater record examples/diffusion.py --out runs/diffusion
                            headwater trace runs/diffusion --method diffusion-retrac --queries 0-3 --html owed.html
"""

import torch
from torch import nn

import headwater as hw

EPOCHS, BATCH = 30, 50

# 1. The data: images in the network's own range, -1 to 1, and what they are conditioned on. The test part are held-out digits to ask about.
images, labels = hw.data.mnist()
small = nn.functional.avg_pool2d(images, 2) * 2 - 1
train, test = hw.data.split((small, labels), train=1000)

# 2. The task: the noise process of the training, what the network predicts, and its loss.
task = hw.tasks.Diffusion(hw.tasks.cosine(), prediction="epsilon")


# 3. The network, untrained: called as model(x_t, t, *conditions). A UNet2DModel of diffusers would do as well.
class Denoiser(nn.Module):
    def __init__(self, width=32, classes=10):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.digit = nn.Embedding(classes, width)
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.inside = nn.Sequential(nn.GroupNorm(8, 2 * width), nn.SiLU(), nn.Conv2d(2 * width, 2 * width, 3, padding=1))
        self.up = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, output_padding=0)
        self.leave = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))
        self.told = nn.Linear(width, 2 * width)

    def forward(self, x, t, digit):
        angles = t[:, None].to(x.dtype) * torch.exp(-torch.arange(16, dtype=x.dtype, device=x.device) * 0.6)
        told = self.told(nn.functional.silu(self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.digit(digit)))
        fine = self.enter(x)
        coarse = self.down(nn.functional.silu(fine)) + told[:, :, None, None]
        coarse = coarse + self.inside(coarse)
        return self.leave(fine + self.up(nn.functional.silu(coarse)))


def build():
    return Denoiser()


# 4. Your own training loop, with two lines for the recorder, and one that draws the noise events so that they can be met again.
def fit(model, train, seed, recorder=None):
    images, digits = train
    steps = EPOCHS * -(-len(images) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(seed)
    if recorder:
        recorder.watch(model, optimizer, steps=steps)
    for _ in range(EPOCHS):
        for indices in torch.randperm(len(images), generator=order).split(BATCH):
            batch = images[indices], digits[indices]
            events = task.draw(batch, order)  # a timestep and a seed of noise for each image
            loss = task.loss(model, task.noised(batch, events)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if recorder:
                recorder.step(indices, events=events)
    return model


# 5. Your own sampler (here DDIM, deterministic): its images are the queries.
@torch.no_grad()
def sample(model, digits, seed=0, steps=50):
    signal, noise = task.process.signal.float(), task.process.noise.float()
    x = torch.randn(len(digits), 1, 14, 14, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(task.process.steps - 1, 0, steps).long()
    for k, t in enumerate(times):
        eps = model(x, t.expand(len(x)), digits)
        clean = ((x - noise[t] * eps) / signal[t]).clamp(-1, 1)
        if k + 1 == steps:
            return clean
        eps = (x - signal[t] * clean) / noise[t]
        x = signal[times[k + 1]] * clean + noise[times[k + 1]] * eps
    return x


experiment = hw.Experiment(build, train, test, task, fit, "generated digits")


if __name__ == "__main__":
    run = experiment.record("runs/diffusion", checkpoints=3, overwrite=True)
    digits = torch.tensor([0, 1, 3, 7])
    queries = (sample(run.load(run.model(), run.checkpoints[-1]), digits), digits)
    tracin, retrac = hw.trace(run, queries, [hw.DiffusionTracIn(timesteps=5, events="replay"), hw.DiffusionReTrac(timesteps=5)])
    for scores in (tracin, retrac):
        print(scores.method, scores.concentration(10))
        print(scores.top(5))  # positive: training on the example lowered the loss of the generated image
    print(hw.audit.memorised(retrac, queries, train))
    print("The page:", retrac.to_html("runs/diffusion/owed.html", queries, train))
