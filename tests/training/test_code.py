"""A run knows what its model computes: another model of the same weights is told of, and the same one never is."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import headwater as hw
from headwater.store import read_json, write_json

TASK = hw.tasks.Classification()
TRAIN = (torch.arange(36.0).reshape(9, 4).sin(), torch.arange(9) % 3)


class Scaled(nn.Module):
    """A setting in no parameter, and a counter that training moves."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.seen = factor, 0

    def forward(self, x):
        if self.training:
            self.seen += len(x)
        return self.factor * torch.tanh(x)


def building(activation):
    return lambda: nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3))


def recorded(path, model, inner=None):
    """Three steps; ``model`` may be wrapped around ``inner``."""
    optimizer = torch.optim.SGD([p for p in (inner or model).parameters() if p.requires_grad], lr=0.1)
    recorder = hw.Recorder(path, model, optimizer, task=TASK, train=TRAIN, steps=3)
    for k in range(3):
        optimizer.zero_grad()
        TASK.loss(model.train(), tuple(t[k : k + 4] for t in TRAIN)).mean().backward()
        optimizer.step()
        recorder.step(range(k, k + 4))
    return recorder.finish()


def opened(path, build):
    return hw.Run.open(path, build=build, train=TRAIN, task=TASK)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (nn.ReLU, r"'1' is ReLU, and was Scaled \(digest \w+, recorded \w+\)"),
        (lambda: Scaled(2.0), "other settings, or other code"),
        (lambda: nn.Sequential(Scaled(1.0)), "'1' is Sequential, and was Scaled"),
    ],
    ids=["kind", "setting", "nested"],
)
def test_another_model_of_the_same_weights_is_told_of(given, said, tmp_path):
    run = recorded(tmp_path / "run", building(lambda: Scaled(1.0))())
    with pytest.warns(UserWarning, match=f"build.. makes another model than was recorded in .*run: {said}.* To mend it"):
        other = opened(run.path, building(given))
    assert other.code != run.code
    manifest = read_json(run.path / "manifest.json")
    held = manifest["code"]
    for silent in ([{**facts, "made": {**facts["made"], "torch": "1.0"}} for facts in held], [{**facts, "made": {**facts["made"], "way": 0}} for facts in held], []):
        write_json(run.path / "manifest.json", {**manifest, "code": silent})  # another version's, another way's, and an older run's
        opened(run.path, building(given))


def test_what_training_moves_in_a_model_is_not_another_model(tmp_path):
    """The model is known as it was before training, and as training left it."""
    model = building(lambda: Scaled(1.0))()
    run = recorded(tmp_path / "run", model)
    assert model[1].seen == 12 and len(run.manifest["code"]) == 2
    again = [opened(run.path, build) for build in (building(lambda: Scaled(1.0)), lambda: model)]
    assert again[0].code != again[1].code == run.code


@pytest.mark.parametrize("wrapper", ["none", "compiled", "compiled in place", "parallel", "hooked"])
def test_wrappers_are_no_other_model(wrapper, tmp_path):
    """finish() and open() agree on what the model is, however training called it."""
    torch.manual_seed(0)
    model = building(nn.Tanh)()
    wrapped = model
    if wrapper == "compiled":
        wrapped = torch.compile(model, backend="eager")
    elif wrapper == "compiled in place":
        model.compile(backend="eager")
    elif wrapper == "parallel":
        wrapped = nn.DataParallel(model)
    elif wrapper == "hooked":
        model[1].register_full_backward_hook(lambda *_: None)
    run = recorded(tmp_path / "run", wrapped, model)
    again = opened(run.path, building(nn.Tanh))
    assert run.code == again.code == run.manifest["code"][0]["digest"] and len(run.manifest["code"]) == 1


def test_models_of_transformers_and_peft_are_themselves(tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    tiny = {"vocab_size": 7, "n_positions": 6, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0}

    def build(activation="gelu_new"):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft still asks transformers by an old name
            base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny, activation_function=activation))
            return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))

    ids, task, model = torch.arange(24).reshape(4, 6) % 7, hw.tasks.Language(), build()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=task, train=ids, steps=2)
    model.base_model.model.config.use_cache = False  # as training with activation checkpointing sets it
    for k in range(2):
        optimizer.zero_grad()
        task.loss(model, ids[k : k + 2]).mean().backward()
        optimizer.step()
        recorder.step(range(k, k + 2))
    run = recorder.finish()
    assert hw.Run.open(run.path, build=build, train=ids, task=task).code == run.code == run.manifest["code"][0]["digest"]
    assert set(run.manifest["code"][0]["made"]) == {"way", "python", "torch", "transformers", "peft"}
    with pytest.warns(UserWarning, match="is ReLU"):
        hw.Run.open(run.path, build=lambda: build("relu"), train=ids, task=task)


SCRIPT = """
import sys, torch, headwater as hw
from torch import nn

WIDTH = 5

def squashed(x):
    return torch.tanh(x) * WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
    def forward(self, x):
        return super_(self, x)

def super_(net, x):
    return net.last(squashed(net.first(x)))

if __name__ == "__main__":
    torch.manual_seed(0)
    model, train = Net(), (torch.ones(4, 4), torch.arange(4) % 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = hw.Recorder("run", model, optimizer, task=hw.tasks.Classification(), train=train, steps=1)
    hw.tasks.Classification().loss(model, train).mean().backward()
    optimizer.step()
    recorder.step(range(4))
    recorder.finish()
"""
READER = """
import warnings, torch, headwater as hw, net
warnings.simplefilter("error")
run = hw.Run.open("run", build=net.Net, train=(torch.ones(4, 4), torch.arange(4) % 3), task=hw.tasks.Classification())
assert run.code == run.manifest["code"][0]["digest"]
print("read")
"""


def test_a_model_is_itself_in_the_script_that_trains_it_and_where_it_is_imported(tmp_path):
    (tmp_path / "net.py").write_text(SCRIPT)
    for program in (["net.py"], ["-c", READER]):
        done = subprocess.run([sys.executable, *program], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "read"
