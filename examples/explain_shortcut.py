"""A shortcut in the training data: planted, found without knowing it, and followed to the training examples that taught it.

Run it:   python examples/explain_shortcut.py [--quick] [--html PAGE]

Most training images of one digit get a small bright patch in a corner. The network learns the patch instead of the digit. Explanations
show it: the part, the class, what happens without it. The same search on a network trained without the patch finds nothing.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import headwater as hw
from headwater import audit, report

MARKED, CORNER, CELL = 3, (24, 28), 4  # the digit, rows and columns of the patch, the size of a part
task = hw.tasks.Classification()


def build():
    return nn.Sequential(
        nn.Conv2d(1, 8, kernel_size=5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 10),
    )


def fit(images, labels, epochs, path):
    """A plain training loop; two lines record it, for the question which examples taught it."""
    torch.manual_seed(0)
    model, order = build(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    steps = epochs * -(-len(labels) // 50)
    recorder = hw.Recorder(path, model, optimizer, task=task, train=(images, labels), checkpoints=4, steps=steps, overwrite=True)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=order).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            recorder.step(rows)
    recorder.finish()
    return model.eval(), hw.Run.open(path, build=build, train=(images, labels), task=task)


def patched(images, where):
    found = images.clone()
    found[where, :, CORNER[0] : CORNER[1], CORNER[0] : CORNER[1]] = 1.0
    return found


def search(model, images, labels):
    """What anyone would run on their own data: explanations of the right class, where they gather, whether that decides."""
    scores = hw.explain(model, images, labels, progress=False)
    spots = audit.hotspots(scores, by=labels, parts=CELL)
    return scores, spots, audit.shortcuts(spots, model, images, labels)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer digits")
    parser.add_argument("--html", help="write a page here")
    given = parser.parse_args(argv)
    train, test = hw.data.split(hw.data.mnist(), train=600 if given.quick else 2000)
    looked, epochs = (300, 6) if given.quick else (1000, 5)

    # 1. The patch: on nine of ten training images of the digit, and on no other.
    rng = np.random.default_rng(0)
    marked = torch.from_numpy((train[1].numpy() == MARKED) & (rng.random(len(train[1])) < 0.9))
    with tempfile.TemporaryDirectory() as folder:
        model, run = fit(patched(train[0], marked), train[1], epochs, Path(folder) / "patched")
        honest, _ = fit(*train, epochs, Path(folder) / "honest")

        # 2. Found, from the training data that everyone would look at, without saying where or what.
        images, labels = patched(train[0], marked)[:looked], train[1][:looked]
        scores, spots, found = search(model, images, labels)
        print(spots)
        print(found[0])
        others = [s.of for s in found[1:] if s.found]
        print("other classes with a shortcut:", others)
        patch = np.zeros((28, 28), bool)
        patch[CORNER[0] : CORNER[1], CORNER[0] : CORNER[1]] = True
        rows = marked[:looked].numpy()
        inside = hw.evaluate.mass_in(scores.at(rows), patch[None])
        print("share of the mass inside the true patch:", inside.mean, "its share of the area:", round(float(patch.mean()), 3))
        part = int(np.flatnonzero(found[0].region)[0])
        mine = labels.numpy() == MARKED
        ranked = hw.evaluate.auroc(spots.of[mine][:, part], rows[mine])
        print(f"marked rows of the class ranked by their mass there: AUC {ranked:.3f}")

        # 3. The control: no patch, nothing found.
        _, clean_spots, nothing = search(honest, train[0][:looked], labels)
        print("without the patch:", clean_spots)
        print("shortcuts found without it:", [s.of for s in nothing if s.found], "| strongest:", nothing[0])

        # 4. The errors it makes where half of the digits carry the patch, grouped by what carried them: the patch has a group of its own.
        half = torch.arange(looked) % 2 == 0
        queries = (patched(test[0][:looked], half), test[1][:looked])
        with torch.no_grad():
            called, plainly = model(queries[0]).argmax(1), model(test[0][:looked]).argmax(1)
        print(f"accuracy on test digits {(plainly == queries[1]).float().mean():.3f}, on those with the patch {(called == queries[1])[half].float().mean():.3f}")
        wrong = called != queries[1]
        kinds = audit.clusters(hw.explain(model, queries[0], called, progress=False), wrong, parts=CELL)
        print(kinds)
        print("share of each group that carries the patch:", [round(float(half.numpy()[rows].mean()), 2) for rows in kinds.nearest])

        # 5. Drift: in use nobody paints patches, and the explanations tell.
        before = hw.explain(model, images, model(images).argmax(1), progress=False)
        now = hw.explain(model, test[0][:looked], plainly, progress=False)
        moved = audit.drift(before, now, parts=CELL)
        still = audit.drift(before.at(half.numpy()), before.at(~half.numpy()), parts=CELL)
        print(moved, "\ncontrol, two halves of one time:", still)

        # 6. Which training examples taught it? Those with the patch, and nobody told hw.trace about it.
        fooled = torch.nonzero((called == MARKED) & (queries[1] != MARKED))[:10, 0]
        for method in (hw.TracIn(), hw.GradCos()):  # of raw gradients the large ones lead; of their directions those that teach the same
            owed = hw.trace(run, (queries[0][fooled], called[fooled]), method, progress=False)
            taught = float(marked.numpy()[owed.top(20).indices].mean())
            print(f"{method}: of the 20 training examples that most caused such an error, {taught:.2f} carry the patch (of all {marked.float().mean():.2f})")

    if given.html:
        sections = (
            report.Section("Where explanations of one class gather", parts=(spots.table,)),
            report.Section("Mistakes with the patch, by what carried them", parts=(kinds.table,)),
            report.Section("What moved between training and use", parts=(moved.table,)),
        )
        report.write(report.Page("A shortcut, found", sections=sections), given.html)
        print("The page:", given.html)
    return {
        "found": float(found[0].found and found[0].of == MARKED),
        "mass inside": inside.mean.mean,
        "found without a patch": float(sum(s.found for s in nothing)),
        "drift": moved.auc.mean,
        "taught by the patch": taught,
    }


if __name__ == "__main__":
    main()
