"""Do explanations tell attacked digits from clean ones? A detector, the attacks it saw and did not see, and one that knows it.

Run it:   python examples/explain_adversarial.py [--quick] [--html PAGE]

The detector learns from clean digits, digits with harmless noise, and FGSM. It is judged on other digits, on PGD (which it has not
seen), against noise of equal size and against honest errors, beside suspicions that need no explanation. It detects, never robust.
"""

import argparse

import numpy as np
import torch
from torch import nn

import headwater as hw
from headwater import report
from headwater.audit import adversarial

SIZE = 0.1  # of the attacks: how far each pixel may move, of 1
LAYERS = ("3",)


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
    shown = 60 if given.quick else 400  # digits to learn from, and as many to judge by

    # 1. A model, and the digits it gets right: an attack on an error is none.
    torch.manual_seed(0)
    (images, labels), test = hw.data.split(hw.data.mnist(), train=600 if given.quick else 2000)
    model = fit(build(), images, labels, epochs=4 if given.quick else 6)
    with torch.no_grad():
        right = model(test[0]).argmax(1) == test[1]
    print(f"accuracy {right.float().mean():.3f} on {len(right)} digits")
    x, y = (column[right] for column in test)
    known, judged = (x[:shown], y[:shown]), (x[shown : 2 * shown], y[shown : 2 * shown])

    def look(points):
        return adversarial.fingerprint(model, points, layers=LAYERS)

    def noisy(points, seed):
        signs = torch.randint(0, 2, points.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        return (points + SIZE * signs).clamp(0, 1)

    # 2. The detector.
    fooling = adversarial.fgsm(model, *known, SIZE)
    judge = adversarial.detector([look(known[0]), look(noisy(known[0], 1))], look(fooling.inputs[fooling.fooled]))
    alone = adversarial.detector([look(known[0]), look(noisy(known[0], 1))])  # one class: without any attacked example
    naive = adversarial.detector(look(known[0]), look(fooling.inputs[fooling.fooled]))  # without noise: it flags whatever is not clean
    print(judge)

    # 3. What it is worth on digits, attacks and noise that it has not seen.
    attacks = {"FGSM": adversarial.fgsm(model, *judged, SIZE), "PGD (unseen)": adversarial.pgd(model, *judged, SIZE, seed=2)}
    attacks["PGD, Euclidean (unseen)"] = adversarial.pgd(model, *judged, 2.0, norm=2, seed=2)
    for name, attack in attacks.items():
        print(f"{name}: {attack}")
    points = {name: attack.inputs[attack.fooled] for name, attack in attacks.items()}
    controls = {"noise of equal size": noisy(judged[0], 3), "honest errors": test[0][~right]}
    looks = {name: look(p) for name, p in {"clean": judged[0], **points, **controls}.items()}
    simple = {name: adversarial.plain(model, p) for name, p in {"clean": judged[0], **points, **controls}.items()}

    low, high = (0.02 if given.quick else 0.01), 0.05

    def worth(suspicions):
        return adversarial.detected(
            suspicions["clean"], {n: suspicions[n] for n in points}, {n: suspicions[n] for n in controls}, rates=(low, high), bootstrap=100 if given.quick else 400
        )

    found = {"explanations, FGSM seen": worth({name: judge(f) for name, f in looks.items()})}
    found["explanations, one class"] = worth({name: alone(f) for name, f in looks.items()})
    found["explanations, FGSM seen, no noise among the benign"] = worth({name: naive(f) for name, f in looks.items()})
    found |= {f"plain: {kind}": worth({name: s[kind] for name, s in simple.items()}) for kind in ("softmax", "margin", "roughness")}
    for name, one in found.items():
        print(f"\n{name}")
        for attack in points:
            hits = f"finds {one.found[attack][low].mean:.2f} at {low:.0%} false alarms, {one.found[attack][high].mean:.2f} at {high:.0%}"
            print(f"  {attack:24s} AUC {one.auc[attack]}, {hits}; against noise {one.apart[attack]['noise of equal size']}")
        print("  flagged at 5 %:", {control: round(one.flagged[control][high].mean, 2) for control in controls})

    # In use the threshold is the detector's own, set by clean and noisy digits together.
    flags = {name: float(judge.flags(f, high).mean()) for name, f in looks.items()}
    print(f"\nflagged by the detector's own threshold ({high:.0%}):", {name: round(share, 2) for name, share in flags.items()})

    # Does the number of evaluations that a tolerance takes (kinks on the path) tell anything?
    some = 30 if given.quick else 100
    counts = {name: adversarial.fingerprint(model, p[:some], tolerance=0.03, max_evaluations=128) for name, p in (("clean", judged[0]), ("PGD", points["PGD (unseen)"]))}
    column = counts["clean"].names.index("input: evaluations")
    kinks = adversarial.detected(counts["clean"].values[:, column], {"PGD": counts["PGD"].values[:, column]}, rates=(0.05,))
    print(f"\nevaluations to a tolerance of 0.03: AUC of PGD {kinks.auc['PGD']}")

    # 4. Someone who knows the detector lowers its suspicion on the way.
    few = slice(0, 20 if given.quick else 60)
    threshold, plainly = judge.threshold(0.05), attacks["PGD (unseen)"]
    before = judge(look(plainly.inputs[few][plainly.fooled[few]]))
    print(f"\nPGD on {few.stop} digits: fools {plainly.fooled[few].float().mean():.2f}, flagged {(before > threshold).mean():.2f}")
    lowered = adversarial.suspicion(judge, model, judged[0][few], layers=LAYERS)
    for weight in (0.5,) if given.quick else (0.2, 0.5, 1.0):
        evading = adversarial.evading(model, judged[0][few], judged[1][few], SIZE, lowered, weight=weight, steps=10 if given.quick else 30)
        evaded = judge(look(evading.inputs[evading.fooled])) if evading.fooled.any() else np.zeros(0)
        flagged = float((evaded > threshold).mean()) if len(evaded) else 0.0
        print(f"adaptive PGD on the same, weight {weight}: fools {evading.fooled.float().mean():.2f}, flagged {flagged:.2f}")

    if given.html:
        sections = tuple(report.Section(name, parts=(one.table,)) for name, one in found.items())
        report.write(report.Page("Attacked digits: what explanations give away", sections=sections), given.html)
        print("The page:", given.html)
    seen = found["explanations, FGSM seen"]
    return {
        "AUC of PGD": seen.auc["PGD (unseen)"].mean,
        "AUC of PGD against noise": seen.apart["PGD (unseen)"]["noise of equal size"].mean,
        "AUC of PGD by softmax": found["plain: softmax"].auc["PGD (unseen)"].mean,
        "flagged of PGD": float((before > threshold).mean()),
        "flagged of the adaptive attack": flagged,
    }


if __name__ == "__main__":
    main()
