"""Handwritten digits: which training digits is a prediction owed to?

Run it:                     python examples/mnist.py
Or from the command line:   headwater record examples/mnist.py --out runs/mnist
                            headwater trace runs/mnist --queries wrong --html owed.html
                            headwater evaluate runs/mnist --subsets 20
"""

import torch
from torch import nn

import headwater as hw

EPOCHS, BATCH = 5, 50

# 1. The data: batches (images, labels). The test part holds the predictions that we ask about.
train, test = hw.data.split(hw.data.mnist(), train=2000)

# 2. The task: what training minimises (cross-entropy) and what we ask about (the log-odds of the right label).
task = hw.tasks.Classification()


# 3. The model, untrained. Any torch module will do; Headwater does not change it.
def build():
    return nn.Sequential(
        nn.Conv2d(1, 8, kernel_size=5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 10),
    )


# 4. Your own training loop, with two lines for the recorder. It is called again, without one, to retrain on subsets.
def fit(model, train, seed, recorder=None):
    images, labels = train
    steps = EPOCHS * -(-len(labels) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    if recorder:
        recorder.watch(model, optimizer, steps=steps)  # once, before the first step
    for _ in range(EPOCHS):
        for indices in torch.randperm(len(labels), generator=order).split(BATCH):
            loss = nn.functional.cross_entropy(model(images[indices]), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if recorder:
                recorder.step(indices)  # after each step: which examples it saw
    return model


experiment = hw.Experiment(build, train, test, task, fit, "digits")


if __name__ == "__main__":
    run = experiment.record("runs/mnist", overwrite=True)
    queries = (test[0][:5], test[1][:5])
    scores = hw.trace(run, queries, hw.Source())
    print(scores)
    print(scores.top(5))  # positive: training on the example pushed the right answer up
    print("The page:", scores.to_html("runs/mnist/owed.html", queries, train))
