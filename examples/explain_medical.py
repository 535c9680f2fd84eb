"""Breast cancer by boosted trees and by a network: equally good, but do they go by the same measurements?

Run it:   python examples/explain_medical.py [--quick] [--html PAGE]

569 biopsies, 30 measurements of cell nuclei each. Every biopsy is compared with benign ones (what sets it apart from healthy tissue?), and the
explanations of the two kinds of model are laid side by side, next to those of the same kind trained from another seed. Then a trap that medical data
often hold is planted: a mark of the site, which goes with the diagnosis in the training data alone. Nothing here is a diagnosis: the models are small,
the sample is of one clinic, and an attribution describes a model, not a disease.
"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn

import headwater as hw
from headwater import audit, report


def trees(X, y, seed, rounds):
    return HistGradientBoostingClassifier(max_iter=rounds, max_features=0.3, random_state=seed).fit(X, y)


def network(X, y, seed, epochs):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(X.shape[1], 24), nn.GELU(), nn.Linear(24, 1)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-1)
    x, wanted = torch.as_tensor(X), torch.as_tensor(y, dtype=torch.float64)
    for _ in range(epochs):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], wanted).backward()
        optimizer.step()
    return model.eval()


def marked(X, malignant, train, test, names, rounds):
    """A mark of the site that goes with the diagnosis for 90 % of the training biopsies and for none in particular of the others: is it found?"""
    rng = np.random.default_rng(0)
    site = np.where(rng.random(len(X)) < 0.9, malignant, 1 - malignant)
    site[test] = rng.integers(0, 2, len(test))
    both = np.column_stack([X, site])
    for title, rows, columns in (("with the mark", both, (*names, "site")), ("control, without it", X, names)):
        model = trees(rows[train], malignant[train], 0, rounds)
        accuracy = [model.score(rows[part], malignant[part]) for part in (train, test)]
        found = audit.gap(model, rows[test], site[test], pair=(1, 0), feature_names=columns, baseline=hw.baselines.dataset(rows[train], 16))
        carriers = ", ".join(found.carriers()) or "none"
        print(f"  {title}: accuracy {accuracy[0]:.3f} in training, {accuracy[1]:.3f} elsewhere; gap between the sites {found.gap}; carried by: {carriers}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer trees, epochs and biopsies")
    parser.add_argument("--html", help="write a page here")
    given = parser.parse_args(argv)
    data = load_breast_cancer()
    names, malignant = tuple(map(str, data.feature_names)), (data.target == 0).astype(int)
    order = np.random.default_rng(0).permutation(len(malignant))
    train, test = order[:400], order[400:]
    X = StandardScaler().fit(data.data[train]).transform(data.data)
    rounds, epochs, count, shown = (10, 30, 4, 20) if given.quick else (80, 200, 16, len(test))

    benign = X[train][malignant[train] == 0]
    models = {
        f"{kind}, seed {seed}": make(X[train], malignant[train], seed, size)
        for kind, make, size in (("trees", trees, rounds), ("network", network, epochs))
        for seed in (0, 1)
    }
    rows, baseline = X[test][:shown], hw.baselines.dataset(benign, count)
    found, outputs = {}, {}
    for name, model in models.items():
        if isinstance(model, nn.Module):
            found[name] = hw.explain(model, torch.as_tensor(rows), baseline=baseline, tolerance=1e-4, feature_names=names, progress=False)
            outputs[name] = model(torch.as_tensor(X[test])).detach().numpy()[:, 0]
        else:
            found[name] = hw.explain(model, rows, baseline=baseline, feature_names=names, progress=False)
            outputs[name] = model.decision_function(X[test])
        wrong = (outputs[name] > 0) != malignant[test]
        area = hw.evaluate.auroc(outputs[name], malignant[test] == 1)
        gap = float(np.abs(found[name].residual).max())
        print(f"{name}: accuracy {1 - wrong.mean():.3f}, area under the ROC curve {area:.3f} on {len(test)} biopsies; largest |residual| {gap:.1e}")

    accord = hw.evaluate.agreement(found, k=5)
    print("\nAgreement for each biopsy (rank correlation, the five strongest, signs):")
    print(report.text(report.Page("", sections=(report.Section("", parts=(accord.table,)),))).strip("=\n"))
    between = [accord.means["spearman"][pair].mean for pair in accord.means["spearman"] if pair[0].split(",")[0] != pair[1].split(",")[0]]
    within = [accord.means["spearman"][pair].mean for pair in accord.means["spearman"] if pair[0].split(",")[0] == pair[1].split(",")[0]]
    print(f"Mean rank correlation: {np.mean(within):.2f} between seeds of one kind of model, {np.mean(between):.2f} between the two kinds.")

    # Radius, perimeter and area are one thing measured three times: models may share credit among them as they like. Fold them and look again.
    groups = [
        "size" if any(word in name for word in ("radius", "perimeter", "area")) else name.removeprefix("mean ").removeprefix("worst ").removesuffix(" error")
        for name in names
    ]
    folded = hw.evaluate.agreement({name: e.group(groups) for name, e in found.items()}, k=3)
    pair = ("trees, seed 0", "network, seed 0")
    print(f"Folded into {len(set(groups))} properties, trees and network: {folded.means['spearman'][pair]} (before: {accord.means['spearman'][pair]}).")

    both = [found[name] for name in pair]
    split = np.flatnonzero((outputs[pair[0]][:shown] > 0) != (outputs[pair[1]][:shown] > 0))
    print(f"\nThe two decide otherwise for {len(split)} of {shown} biopsies.")
    for i in split[:2]:
        for name, e in zip(pair, both, strict=True):
            reasons = ", ".join(f"{part} {push:+.2f}" for part, push in next(iter(e.at([int(i)]).top(3))))
            print(f"  biopsy {test[i]}, {name}: log-odds {e.output[i]:+.2f}; {reasons}")
    doubt = [float(np.mean(np.abs(e.values) <= 2 * e.stderr)) for e in both]
    print(f"Pushes within two standard errors of 0 (over the benign biopsies compared with): {doubt[0]:.0%} of the trees', {doubt[1]:.0%} of the network's.")
    summaries = [e.summary() for e in both]
    for name, summary in zip(pair, summaries, strict=True):
        print(f"{name} goes by: {', '.join(summary.names[j] for j in summary.order[:5])}")
    print("\nA planted mark of the site, and the gap in the log-odds between the two sites on other biopsies:")
    marked(X, malignant, train, test, names, rounds)
    print("No diagnosis: this describes two small models of one sample.")
    if given.html:
        sections = [report.Section("Do they agree?", "Agreement is no evidence that either is right. Nothing here is a diagnosis.", (accord.table, folded.table))]
        sections += [report.Section(name, "", (*summary.parts(12), summary.table(12))) for name, summary in zip(pair, summaries, strict=True)]
        print("The page:", report.write(report.Page("Two models of breast cancer", "Boosted trees and a network, biopsy by biopsy", tuple(sections)), given.html))
    return found, accord


if __name__ == "__main__":
    main()
