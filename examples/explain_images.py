"""Which pixels carried a digit? Baselines and paths beside each other, and whether each is faithful.

Run it:   python examples/explain_images.py [--quick] [--html PAGE]
"""

import argparse

import torch
from torch import nn

import headwater as hw


def build():
    return nn.Sequential(
        nn.Conv2d(1, 8, kernel_size=5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 10),
    )


def fit(model, images, labels, epochs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=order).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer digits")
    parser.add_argument("--html", help="write a page here")
    given = parser.parse_args(argv)

    torch.manual_seed(0)
    (images, labels), test = hw.data.split(hw.data.mnist(), train=600 if given.quick else 2000)
    model = fit(build(), images, labels, epochs=4 if given.quick else 6)
    x = test[0][: 8 if given.quick else 60]
    with torch.no_grad():
        called = model(x).argmax(1)
    print(f"accuracy {(called == test[1][: len(x)]).float().mean():.3f}")

    # 1. A black baseline cannot credit black pixels; black and white together can. Blur and guided paths ask in other ways.
    black, white = hw.baselines.constant(0.0), hw.baselines.constant(1.0)
    ways = {
        "black": {"baseline": black},
        "black and white": {"baseline": hw.baselines.average(black, white)},
        "32 digits": {"baseline": hw.baselines.dataset(images, 8 if given.quick else 32)},
        "blur path": {"path": hw.paths.blur(6.0), "rule": hw.quadrature.midpoint(50)},
        "guided path": {"baseline": black, "path": hw.paths.guided(20 if given.quick else 50)},
    }
    found = {name: hw.explain(model, x, called, progress=False, **settings) for name, settings in ways.items()}
    for name, scores in found.items():
        print(f"{name:16s} {scores}")
    on_black = {name: float(abs(scores.values[x.numpy() == 0]).sum() / abs(scores.values).sum()) for name, scores in found.items()}
    print("share of the attributions on black pixels:", {name: round(share, 2) for name, share in on_black.items()})

    # 2. Faithful? Pixels taken away or given back in the order of the scores, on two fills, beside random orders.
    figures = {}
    for fill in (black, hw.baselines.blur(4.0)):
        for name, scores in found.items():
            away, back = (metric(scores, model, x, called, fill=fill, parts=2, random=2, bootstrap=200) for metric in (hw.evaluate.deletion, hw.evaluate.insertion))
            said = f"deletion {away.mean} (random {away.against['random'].mean.mean:.3f}), insertion {back.mean} (random {back.against['random'].mean.mean:.3f})"
            print(f"fill {away.fill}: {name:16s} {said}")
            if fill is black:
                figures[f"deletion, {name}"] = away.mean.mean
                figures[f"insertion, {name}"] = back.mean.mean
                figures["deletion, random"] = away.against["random"].mean.mean
                figures["insertion, random"] = back.against["random"].mean.mean

    # 3. Do they depend on what was learned, or are they an edge detector?
    few = x[: 8 if given.quick else 24]
    test_of = hw.evaluate.randomisation(model, lambda m: hw.explain(m, few, called[: len(few)], baseline=black, progress=False), bootstrap=200)
    print(test_of)
    figures["randomisation passed"] = float(test_of.passed)

    if given.html:
        print("The page:", found["black and white"].to_html(given.html, examples=range(min(8, len(x)))))
    return figures


if __name__ == "__main__":
    main()
