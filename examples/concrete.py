"""Compressive strength of concrete: which training mixtures is a prediction owed to?

Run it:                     python examples/concrete.py
Or from the command line:   headwater record examples/concrete.py --out runs/concrete
                            headwater trace runs/concrete --queries worst --html owed.html
                            headwater evaluate runs/concrete --subsets 20
"""

import torch
from torch import nn

import headwater as hw

EPOCHS, BATCH = 40, 32

# 1. The data: eight features of a mixture and its strength in MPa, both standardised by what the training part looks like.
train, test = hw.data.split(hw.data.concrete(standardize=False), train=0.8)
means, spreads = [column.mean(0) for column in train], [column.std(0) for column in train]
train, test = (tuple((column - m) / s for column, m, s in zip(part, means, spreads, strict=True)) for part in (train, test))

# 2. The task: squared error. What we ask about is minus the error of a prediction, so that larger is better.
task = hw.tasks.Regression()


# 3. The model, untrained.
def build():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))


# 4. Your own training loop, with two lines for the recorder. AdamW: its second moments are recorded with each checkpoint.
def fit(model, train, seed, recorder=None):
    mixtures, strengths = train
    steps = EPOCHS * -(-len(strengths) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    if recorder:
        recorder.watch(model, optimizer, steps=steps)  # once, before the first step
    for _ in range(EPOCHS):
        for indices in torch.randperm(len(strengths), generator=order).split(BATCH):
            loss = nn.functional.mse_loss(model(mixtures[indices]).squeeze(1), strengths[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if recorder:
                recorder.step(indices)  # after each step: which examples it saw
    return model


experiment = hw.Experiment(build, train, test, task, fit, "concrete")


if __name__ == "__main__":
    run = experiment.record("runs/concrete", overwrite=True)
    queries = (test[0][:5], test[1][:5])
    scores = hw.trace(run, queries, hw.Source())
    print(scores)
    print(scores.top(5))  # positive: training on the mixture made the prediction better
    print("The page:", scores.to_html("runs/concrete/owed.html", queries, train))
