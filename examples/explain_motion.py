"""Which sensor of a watch, and when, carried "running"? Shares, baselines, a path from frame to frame, sensors off, planted faults.

Run it:   python examples/explain_motion.py [--quick] [--html PAGE]
"""

import argparse

import numpy as np
import torch
from torch import nn

import headwater as hw
from headwater import audit

FRAME, HOP = 50, 10  # steps of a frame (five seconds), and from one to the next
AXES = {"accelerometer": list(hw.data.MOTION_SENSORS[:3]), "gyroscope": list(hw.data.MOTION_SENSORS[3:])}


class Watch(nn.Module):
    """Two sensors, one input tensor each, so that attributions sum to what each sensor carried."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(6, 12, 7, stride=2), nn.GELU(), nn.Conv1d(12, 16, 5, stride=2), nn.GELU(), nn.AdaptiveAvgPool1d(4), nn.Flatten())
        self.head = nn.Linear(64, 4)

    def forward(self, accelerometer, gyroscope):
        return self.head(self.body(torch.cat([accelerometer, gyroscope], 1)))


def split_sensors(signals):
    return {"accelerometer": signals[:, :3], "gyroscope": signals[:, 3:]}


def frames(signals, labels):
    """All frames of some recordings, in order: (recordings * frames, 6, FRAME), and their labels."""
    cut = signals.unfold(2, FRAME, HOP).transpose(1, 2)
    return cut.reshape(-1, 6, FRAME), labels.repeat_interleave(cut.shape[1])


def fit(model, signals, labels, epochs):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-4)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=order).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(**split_sensors(signals[rows])), labels[rows]).backward()
            optimizer.step()
    return model.eval()


def shown(shares):
    return {name: round(float(share), 3) for name, share in shares.items()}


def carried(scores):
    """The share of each sensor in the sum of all attributions of all examples."""
    by = scores.group("inputs")
    return dict(zip(by.feature_names, by.values.sum(0) / by.values.sum(), strict=True))


def moved(scores):
    """The share of each sensor in all ups and downs: for small changes of the output, whose sum nearly cancels."""
    by = scores.group("inputs")
    sizes = np.abs(by.values).sum(0)
    return dict(zip(by.feature_names, sizes / sizes.sum(), strict=True))


def broken(signals, rng):
    """Faults: in each frame one sensor axis reads a constant for two seconds. Returns frames, axes and first steps."""
    found, axes, starts = signals.clone(), rng.integers(6, size=len(signals)), rng.integers(4, size=len(signals)) * 10
    for k, (axis, start) in enumerate(zip(axes, starts, strict=True)):
        found[k, axis, start : start + 20] = 4.0 * float(rng.choice([-1, 1]))  # four standard deviations
    return found, axes, starts


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a shorter training")
    parser.add_argument("--html", help="write a page here")
    given = parser.parse_args(argv)

    # 1. Recordings in two halves, standardised by the first; frames of five seconds; a small convolutional network.
    torch.manual_seed(0)
    train, test = hw.data.split(hw.data.motions(), train=40)
    mean, spread = train[0].mean((0, 2), keepdim=True), train[0].std((0, 2), keepdim=True)
    known = frames((train[0] - mean) / spread, train[1])
    new = frames((test[0] - mean) / spread, test[1])
    model = fit(Watch(), *known, epochs=8 if given.quick else 40)
    inputs, labels = split_sensors(new[0]), new[1]
    with torch.no_grad():
        called = model(**inputs).argmax(1)
    print(f"accuracy {(called == labels).float().mean():.3f} on {len(labels)} frames of 40 recordings that were not trained on")

    # 2. What carried each activity, by sensor and by time; against "standing still on average" (zero of standardised readings).
    scores = hw.explain(model, inputs, called, tolerance=1e-3, progress=False)
    print(scores)
    print("worst relative residual:", f"{scores.relative_residual.max():.1e}")
    for k, name in enumerate(hw.data.MOTIONS):
        rows = (called == k).numpy()
        if rows.any():
            some = scores.at(rows)
            time = sum(np.abs(v).sum((0, 1)) for v in some.values.values())
            print(f"  {name:10s} {shown(carried(some))}, seconds 0-1 .. 4-5 of the frame: {(time.reshape(5, -1).sum(1) / time.sum()).round(2).tolist()}")

    # 3. Other baselines ask other questions: the mean frame, and the frame before (what changed?).
    before = split_sensors(torch.roll(new[0], 1, 0))
    own = np.arange(len(labels)) % 6 != 0  # the first frame of a recording has none before it
    others = {
        "the mean frame": hw.explain(model, inputs, called, baseline={s: known_part.mean(0) for s, known_part in split_sensors(known[0]).items()}, progress=False),
        "the frame before": hw.explain(model, inputs, called, baseline=before, progress=False).at(own),
    }
    for name, other in others.items():
        agree = hw.evaluate.agreement(scores if other.n == scores.n else scores.at(own), other).matrix("spearman")[0, 1]
        print(f"against {name}: {shown(moved(other))} of the ups and downs; rank agreement with zero {agree:.2f}")

    # 4. From the first frame of a recording to its last through those between: each leg explained, the sum is the whole change.
    rows = torch.arange(len(labels)).reshape(-1, 6)
    stops = [split_sensors(new[0][rows[:, k]]) for k in range(6)]
    path = hw.paths.through(*(tuple(s.values()) for s in stops[1:-1]))
    walk = hw.explain(model, stops[-1], labels[rows[:, -1]], baseline=stops[0], path=path, rule=hw.quadrature.gauss_legendre(16), progress=False)
    print(f"frame to frame: {shown(moved(walk))} of the ups and downs from first to last; largest residual {np.abs(walk.residual).max():.1e}")
    steady = audit.flicker(scores)[own[1:]]
    print(f"flicker within recordings: median {np.nanmedian(steady):.2f}, largest {np.nanmax(steady):.2f} logits per standard deviation")

    # 5. Sensors off: is the fall what was said? Two sensors, and all six axes.
    off = audit.switched_off(scores, model, inputs, called)
    axes = audit.switched_off(scores, model, inputs, called, sensors=AXES, axis=1)
    print(off)
    print(axes)

    # 6. Planted faults: found by attributions that are unlike those of healthy frames of the same class, beside the readings themselves.
    faulty, where, start = broken(new[0], np.random.default_rng(1))
    hits, strength = {"attributions": [], "readings": []}, {"attributions": np.zeros(len(labels)), "readings": np.zeros(len(labels))}
    with torch.no_grad():
        thought = model(**split_sensors(faulty)).argmax(1)
    for k in range(4):
        rows, healthy = (thought == k).numpy(), (known[1] == k)
        if not rows.any():
            continue
        old = hw.explain(model, split_sensors(known[0][healthy]), k, progress=False)
        now = hw.explain(model, split_sensors(faulty[torch.from_numpy(rows)]), k, progress=False)
        for name, found in (("attributions", audit.unusual(now, old)), ("readings", audit.unusual(faulty[torch.from_numpy(rows)], known[0][healthy]))):
            inside = (found.time * 10 >= start[rows]) & (found.time * 10 < start[rows] + 20)
            strength[name][rows] = found.strength
            hits[name].append(np.stack([found.sensor == where[rows], inside], 1))
    located = {name: np.concatenate(found).mean(0) for name, found in hits.items()}
    changed = (thought != called).numpy()
    for name, (sensor, time) in located.items():
        matters = f"; strength tells which faults change the prediction: AUC {hw.evaluate.auroc(strength[name], changed):.2f}" if 0 < changed.sum() < len(changed) else ""
        print(f"faults by {name}: right sensor {sensor:.2f} (chance {1 / 6:.2f}), right time {time:.2f} (chance 0.40){matters}")
    print(f"the faults change {changed.mean():.2f} of the predictions")

    if given.html:
        print("The page:", scores.at([0, 6, 12, 18]).to_html(given.html))
    return {
        "accuracy": float((called == labels).float().mean()),
        "correlation of the strongest sensor": axes.top_correlation.mean,
        "slope of the strongest sensor": axes.top_slope.mean,
        "fault sensor": float(located["attributions"][0]),
    }


if __name__ == "__main__":
    main()
