"""Spam: why was this message flagged, word by word? Reason codes against legitimate mail, from a linear model and from a small network.

Run it:   python examples/explain_spam.py [--quick] [--html PAGE]

3,000 e-mails as TF-IDF of their commonest words. Reasons are the words that raise the log-odds of spam above what they are for legitimate mail; then
checks: do the words matter (are messages still flagged without them, or without as many others), do two models give the same words, and is a planted
word found?
"""

import argparse

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch import nn

import headwater as hw
from headwater import audit, report

PLANTED = "zyzzyva"  # a word of no message
K = 5


def network(X, y, seed, epochs):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(X.shape[1], 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    x, wanted = torch.as_tensor(X, dtype=torch.float32), torch.as_tensor(y, dtype=torch.float32)
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(100):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(x[rows])[:, 0], wanted[rows]).backward()
            optimizer.step()
    return model.double().eval()


def plant(texts, rows):
    return [f"{text} {PLANTED}" if flag else text for text, flag in zip(texts, rows, strict=True)]


def without(X, values, k, words):
    """X with k words of each row at 0: those of the largest values, among words that occur and that are in ``words``."""
    found = X.copy()
    order = np.argsort(-np.where((X > 0) & words, values, -np.inf), axis=1)[:, :k]
    np.put_along_axis(found, order, 0.0, axis=1)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer messages and words")
    parser.add_argument("--html", help="write a page here")
    given = parser.parse_args(argv)
    texts, labels = hw.data.spam()
    count, words, shown = (400, 150, 10) if given.quick else (len(texts), 1500, 60)
    texts, labels = texts[:count], labels[:count].numpy()
    cut = 3 * count // 4

    # The words of the training messages alone; a tenth of the spam among them also holds a planted word.
    rng = np.random.default_rng(0)
    texts = plant(texts, (labels == 1) & (rng.random(count) < 0.1))
    vectors = TfidfVectorizer(max_features=words, sublinear_tf=True, token_pattern=r"[A-Za-z][A-Za-z']+").fit(texts[:cut])
    X, names = vectors.transform(texts).toarray(), vectors.get_feature_names_out()
    train, test = slice(0, cut), slice(cut, None)
    linear = LogisticRegression(C=10.0, max_iter=1000).fit(X[train], labels[train])
    net = network(X[train], labels[train], 0, epochs=10)
    margins = {"linear": linear.decision_function(X[test]), "network": net(torch.as_tensor(X[test])).detach().numpy()[:, 0]}
    for name, margin in margins.items():
        right, area = np.mean((margin > 0) == labels[test]), hw.evaluate.auroc(margin, labels[test] == 1)
        print(f"{name}: accuracy {right:.3f}, area under the ROC curve {area:.3f} on {len(margin)} messages")

    flagged = np.flatnonzero((margins["linear"] > 0) & (margins["network"] > 0))[:shown]
    alerts, legitimate = X[test][flagged], X[train][labels[train] == 0]
    settings = {"k": K, "count": 16, "draws": 2, "feature_names": names, "alert_names": [f"message {cut + i}" for i in flagged]}
    found = {
        "linear": audit.reasons(linear, alerts, legitimate, **settings),
        "network": audit.reasons(net, torch.as_tensor(alerts), torch.as_tensor(legitimate), **settings),
    }
    for name, one in found.items():
        print(f"\n{name}: {one}")
        print(one.sentences(0))

    print(f"\nHow many of {len(flagged)} flagged messages still are, with {K} of their words taken out:")
    for name, ask in (("linear", linear.decision_function), ("network", lambda X: net(torch.as_tensor(X)).detach().numpy()[:, 0])):
        values = np.asarray(found[name].scores.values)
        any_word = np.ones_like(values, bool)
        still = [np.mean(ask(without(alerts, v, K, any_word)) > 0) for v in (values, rng.random(values.shape))]
        print(f"  {name}: the {K} strongest reasons {still[0]:.0%}, {K} words at random {still[1]:.0%}")
    print(f"\nDo the two models go by the same words? {hw.evaluate.agreement({name: one.scores.values for name, one in found.items()}, k=K)}")

    place = int(np.flatnonzero(names == PLANTED)[0]) if PLANTED in names else None
    holds = np.zeros(len(alerts), bool) if place is None else alerts[:, place] > 0
    if holds.any():
        for name, one in found.items():
            told = [any(reason.name == PLANTED for reason in one.alerts[i]) for i in np.flatnonzero(holds)]
            print(f"The planted word is among the {K} reasons of {np.mean(told):.0%} of the {holds.sum()} flagged messages that hold it, {name}.")
        wrongly = any(reason.name == PLANTED for one in found.values() for i in np.flatnonzero(~holds) for reason in one.alerts[i])
        print(f"It is {'a' if wrongly else 'no'} reason of a message that does not hold it.")
    else:
        print("No flagged message holds the planted word: too few messages to say.")
    missed = np.flatnonzero((labels[test] == 1) & (margins["linear"] < 0))
    print(f"Spam that the linear model misses: {len(missed)} of {int((labels[test] == 1).sum())}.")
    if given.html:
        sections = [report.Section(f"{name}: {one.title}", one.text, one.parts) for name, made in found.items() for one in made.sections(6)]
        print("The page:", report.write(report.Page("Why were these messages flagged?", "Words that raised the log-odds of spam", tuple(sections)), given.html))
    return found


if __name__ == "__main__":
    main()
