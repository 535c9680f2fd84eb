"""Which measurements are worth keeping? Rank them by attribution, keep the best, train again.

Run it:   python examples/explain_selection.py [--quick] [--html PAGE]

Breast cancer: 569 biopsies, 30 measurements of cell nuclei, many of which say the same (radius, perimeter, area). Rankings are made on training
rows alone and judged on others, beside permutation importance, mutual information, the model's own gain, and chance.
"""

import argparse

from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import GradientBoostingClassifier

from headwater import audit, report

KEEP = 8  # chosen before looking: the best of many sizes looks better than it is


# Your own training, with a seed. It gets the columns that were kept.
def fit(X, y, seed, trees):
    return GradientBoostingClassifier(n_estimators=trees, max_depth=3, subsample=0.5, random_state=seed).fit(X, y)


def verdict(mean, better, worse, neither):
    """In words, where the whole interval must be on one side."""
    return better if mean.low > 0 else worse if mean.high < 0 else neither


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows, folds and trees")
    parser.add_argument("--html", help="write a page here")
    given = parser.parse_args(argv)
    X, y = load_breast_cancer(as_frame=True, return_X_y=True)
    if given.quick:
        X, y = X[:150], y[:150]

    def train(X, y, seed):
        return fit(X, y, seed, trees=10 if given.quick else 40)

    sizes = [1, KEEP] if given.quick else [1, 2, 4, KEEP, 16]
    settings = {"sizes": sizes, "folds": 2 if given.quick else 5, "measure": audit.selection.auc, "progress": False}
    alone = audit.select(train, X, y, **settings)
    together = audit.select(train, X, y, twins=0.9, **settings)

    for title, found in (("Every measurement for itself", alone), ("Twins (rank correlation 0.9 or more) as one", together)):
        print(f"\n{title}: {found.measure}, {found.folds} folds")
        print(report.text(report.Page("", sections=(report.Section("", parts=(found.table, found.stability)),))).strip("=\n"))
        change = found.change(KEEP)
        print(f"Keeping {KEEP} changes it by {change}: {verdict(change, 'an improvement', 'a loss', 'no difference that these folds can tell')}.")
        for other, mean in found.advantage.items():
            print(f"The attribution's area is {mean} above that of {other}: {verdict(mean, 'better', 'worse', 'no difference that these folds can tell')}.")
    print(f"\nBest by attribution, alone: {', '.join(alone.top(5))}")
    print(f"Best by attribution, twins as one: {'; '.join(together.top(5))}")
    if given.html:
        page = report.Page("Which measurements are worth keeping?", "569 biopsies, 30 measurements", (alone.section, together.section))
        print("The page:", report.write(page, given.html))
    return alone, together


if __name__ == "__main__":
    main()
