"""Denoisers of every kind: called as they want to be, with per-example gradients that are plain autograd's, and refused where they do not fit."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import headwater as hw
from headwater.capture.capture import Capture
from headwater.errors import TaskError
from headwater.tasks.diffusion.processes import Process

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers

GRID = torch.stack(torch.meshgrid(torch.arange(2.0), torch.arange(2.0), indexing="ij"), -1).view(4, 2)
IDS = {"img_ids": torch.cat([torch.zeros(4, 1), GRID], 1), "txt_ids": torch.zeros(3, 3)}
UNET = {"sample_size": 4, "block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
CROSS = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4}
TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1, "sample_size": 4, "patch_size": 2}


def unet():
    attention = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4}
    return diffusers.UNet2DModel(in_channels=3, out_channels=3, num_class_embeds=5, **UNET, **attention)


def unet_of_prompts(**settings):
    return diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, cross_attention_dim=6, **UNET, **CROSS, **settings)


def sdxl():
    return unet_of_prompts(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 7)


def dit():
    return diffusers.DiTTransformer2DModel(out_channels=8, norm_num_groups=4, num_embeds_ada_norm=10, **TRANSFORMER)


def pixart():
    return diffusers.PixArtTransformer2DModel(out_channels=8, norm_num_groups=4, cross_attention_dim=16, caption_channels=6, **TRANSFORMER)


def sd3():
    text = {"joint_attention_dim": 6, "caption_projection_dim": 16, "pooled_projection_dim": 7, "pos_embed_max_size": 4, "qk_norm": "rms_norm"}
    return diffusers.SD3Transformer2DModel(out_channels=4, **TRANSFORMER, **text)


def lumina():
    return diffusers.Lumina2Transformer2DModel(sample_size=4, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
                                               num_kv_heads=1, axes_dim_rope=(4, 2, 2), axes_lens=(8, 4, 4), cap_feat_dim=6)  # fmt: skip


def flux():
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (4, 2, 2)}
    layers = {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 6, "pooled_projection_dim": 7}
    return diffusers.FluxTransformer2DModel(patch_size=1, in_channels=4, **heads, **layers)


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def latents(**conditions):
    return lambda n: {"images": drawn(n, 4, 4, 4), **{name: make(n) for name, make in conditions.items()}}


def text(n):
    return drawn(n, 3, 6)


def pooled(n):
    return drawn(n, 7)


def classes(n):
    return torch.arange(n) % 5


def sizes(n):
    return {"text_embeds": drawn(n, 7), "time_ids": drawn(n, 6).abs()}


def nothing(n):
    return {"resolution": None, "aspect_ratio": None}


# network, scheduler, batch of n, settings, how many parameters take the exact fallback
NETWORKS = {
    "UNet2D": (unet, diffusers.DDPMScheduler, lambda n: {"images": drawn(n, 3, 4, 4), "class_labels": classes(n)}, {}, 0),
    "UNet2D, class by place": (unet, diffusers.DDPMScheduler, lambda n: (drawn(n, 3, 4, 4), classes(n)), {}, 0),
    "UNet2DCondition": (unet_of_prompts, diffusers.DDIMScheduler, latents(encoder_hidden_states=text), {}, 0),
    "UNet2DCondition, prompt by place": (unet_of_prompts, diffusers.DDIMScheduler, lambda n: (drawn(n, 4, 4, 4), text(n)), {}, 0),
    "SDXL": (sdxl, diffusers.EulerDiscreteScheduler, latents(encoder_hidden_states=text, added_cond_kwargs=sizes), {}, 0),
    "DiT": (dit, diffusers.DDPMScheduler, latents(class_labels=classes), {}, 0),
    "PixArt": (pixart, diffusers.DPMSolverMultistepScheduler, latents(encoder_hidden_states=text, added_cond_kwargs=nothing), {}, 2),
    "SD3": (sd3, diffusers.FlowMatchEulerDiscreteScheduler, latents(encoder_hidden_states=text, pooled_projections=pooled), {}, 0),
    "Flux": (
        flux,
        diffusers.FlowMatchEulerDiscreteScheduler,
        lambda n: {"images": drawn(n, 4, 4), "encoder_hidden_states": text(n), "pooled_projections": pooled(n)},
        {"fixed": IDS, "time": 1 / 1000},
        0,
    ),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def awake(network, seed=0):
    """The network in eval mode, without the zeros that some layers begin with: they would hide what is behind them."""
    torch.manual_seed(seed)
    for p in network.parameters():
        if not p.abs().max() > 0:
            nn.init.normal_(p, std=0.05)
    return network.eval()


def ready(name, dtype=torch.float32):
    make, scheduler, batch, settings, fallback = NETWORKS[name]
    torch.manual_seed(0)
    network = awake(make()).to(dtype)
    task = hw.tasks.Diffusion(scheduler(), timesteps=(40, 700), **settings)
    return network, task, task.examples(batch(4)), fallback


def by_autograd(network, task, examples, ids):
    """Gradients of single examples, (n, parameters), one event at a time: nothing of the task's batches, only its tables and noise."""
    rows = []
    for i in ids:
        batch = examples.batch([i])
        losses = []
        for k in range(batch.each):
            rows_of_k = batch.rows(slice(k, k + 1))
            x, eps, s, n = task.parts(rows_of_k, torch.float32)
            answer = CALLS[type(network)](network, s * x + n * eps, rows_of_k.time[:, 0], batch.batch)
            target = eps if task.prediction == "epsilon" else eps - x
            losses.append((answer[:, : x.shape[1]] - target).square().mean())
        found = torch.autograd.grad(sum(losses) / batch.each, list(network.parameters()), allow_unused=True)
        rows.append(torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(found, network.parameters(), strict=True)]))
    return torch.stack(rows)


def conditions(batch, name):
    return batch[name] if isinstance(batch, dict) else batch[1]


# How each network is called in its own pipeline, written out.
CALLS = {
    diffusers.UNet2DModel: lambda net, x, t, b: net(x, t, class_labels=conditions(b, "class_labels")).sample,
    diffusers.UNet2DConditionModel: lambda net, x, t, b: net(
        x, t, encoder_hidden_states=conditions(b, "encoder_hidden_states"), added_cond_kwargs=b.get("added_cond_kwargs") if isinstance(b, dict) else None
    ).sample,
    diffusers.DiTTransformer2DModel: lambda net, x, t, b: net(x, timestep=t, class_labels=b["class_labels"]).sample,
    diffusers.PixArtTransformer2DModel: lambda net, x, t, b: net(
        x, encoder_hidden_states=b["encoder_hidden_states"], timestep=t, added_cond_kwargs={"resolution": None, "aspect_ratio": None}
    ).sample,
    diffusers.SD3Transformer2DModel: lambda net, x, t, b: net(
        hidden_states=x, timestep=t, encoder_hidden_states=b["encoder_hidden_states"], pooled_projections=b["pooled_projections"]
    ).sample,
    diffusers.FluxTransformer2DModel: lambda net, x, t, b: net(
        hidden_states=x, timestep=t, encoder_hidden_states=b["encoder_hidden_states"], pooled_projections=b["pooled_projections"], **IDS
    ).sample,
}


def dense(capture, gradients, network):
    parameters = dict(network.named_parameters())
    found = {}
    for name, block in capture.blocks.items():
        found |= block.unpack(gradients[name].dense(), {p: parameters[p].shape for p in block.parameters})
    return torch.cat([found[name].flatten(1) for name in parameters], 1)


@each_network
def test_gradients_of_each_example_are_plain_autograds_in_any_batch(name):
    network, task, examples, fallback = ready(name)
    capture = Capture(network, task.loss, examples.batch(range(2)))
    expected = by_autograd(network, task, examples, range(3))
    close = {"rtol": 1e-4, "atol": 2e-6 * float(expected.abs().max())}
    assert sum("fallback" in how for how in capture.coverage.values()) == fallback
    torch.testing.assert_close(dense(capture, capture.gradients(task.loss, examples.batch(range(3))), network), expected, **close)
    torch.testing.assert_close(dense(capture, capture.gradients(task.loss, examples.batch([2, 0])), network), expected[[2, 0]], **close)


@pytest.mark.parametrize("name", ["UNet2D", "DiT"])
def test_in_float64_they_are_so_to_its_last_digits(name):
    network, task, _, _ = ready(name, torch.float64)
    examples = task.examples({key: v.double() if v.is_floating_point() else v for key, v in NETWORKS[name][2](4).items()})
    capture = Capture(network, task.loss, examples.batch(range(2)))
    together, alone = (dense(capture, capture.gradients(task.loss, examples.batch(ids)), network) for ids in (range(3), [1]))
    torch.testing.assert_close(together[1], alone[0], rtol=1e-9, atol=1e-12)
    plain = torch.autograd.grad(task.loss(network, examples.batch([1])).sum(), list(network.parameters()), allow_unused=True)
    flat = torch.cat([torch.zeros(p.numel()).double() if g is None else g.flatten() for g, p in zip(plain, network.parameters(), strict=True)])
    torch.testing.assert_close(alone[0], flat, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ how they are called


class Told(nn.Module):
    """Keeps its arguments."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def seen(self, x, **arguments):
        self.arguments = {name: (tuple(v.shape) if isinstance(v, torch.Tensor) else v) for name, v in arguments.items()}
        return self.w * x


def told(forward):
    return type("Net", (Told,), {"forward": forward})()


X, Y, Z = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5), torch.zeros(2, 6)
FORWARDS = {
    "plain": (lambda s, x, t: s.seen(x, t=t), X, {"t": (2,)}),
    "without a time": (lambda s, x: s.seen(x), X, {}),
    "a condition by place": (lambda s, x, t, y: s.seen(x, t=t, y=y), (X, Y), {"t": (2,), "y": (2, 5)}),
    "a condition by name": (lambda s, x, t, y: s.seen(x, t=t, y=y), {"images": X, "y": Y}, {"t": (2,), "y": (2, 5)}),
    "the time later": (lambda s, x, y, z, timestep: s.seen(x, t=timestep, y=y, z=z), (X, Y, Z), {"t": (2,), "y": (2, 5), "z": (2, 6)}),
    "the time later, by name": (lambda s, x, y, timestep, z=None: s.seen(x, t=timestep, z=z), {"images": X, "y": Y, "z": Z}, {"t": (2,), "z": (2, 6)}),
    "the time by name alone": (lambda s, x, *, timesteps, **more: s.seen(x, t=timesteps, **more), {"images": X, "y": Y}, {"t": (2,), "y": (2, 5)}),
    "anything": (lambda s, *a: s.seen(a[0], t=a[1], y=a[2]), (X, Y), {"t": (2,), "y": (2, 5)}),
}


@pytest.mark.parametrize(("forward", "batch", "expected"), FORWARDS.values(), ids=FORWARDS)
def test_arguments_go_where_the_network_has_them(forward, batch, expected):
    network = told(forward)
    task = hw.tasks.Diffusion(hw.tasks.cosine(), timesteps=1)
    assert task.loss(network, batch).shape == (2,)
    assert network.arguments == expected


def test_wrappers_are_looked_through():
    class OptimizedModule(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self._orig_mod = inner

        def forward(self, *args, **kwargs):
            return self._orig_mod(*args, **kwargs)

    network = told(FORWARDS["the time later"][0])
    for wrapped in (OptimizedModule(network), nn.DataParallel(OptimizedModule(network))):
        hw.tasks.Diffusion(hw.tasks.cosine(), timesteps=1).loss(wrapped, (X, Y, Z))
        assert network.arguments == {"t": (2,), "y": (2, 5), "z": (2, 6)}


def test_an_adapted_unet_has_gradients_of_its_adapters_alone():
    from peft import LoraConfig, get_peft_model

    network, task, examples, _ = ready("UNet2DCondition")
    adapted = get_peft_model(network, LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)).eval()
    capture = Capture(adapted, task.loss, examples.batch(range(2)))
    assert capture.trained and all("lora_" in name for name in capture.trained) and not capture.fallback
    rows = capture.gradients(task.loss, examples.batch(range(3)))
    plain = torch.autograd.grad(task.loss(adapted, examples.batch([2])).sum(), [p for p in adapted.parameters() if p.requires_grad])
    found = torch.cat([rows[name].dense()[2].flatten() for name in capture.trained])
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in plain]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: (t,), lambda t: SimpleNamespace(sample=t)], ids=["tensor", "tuple", "sample"])
def test_answers_are_found_and_variances_left_aside(wrap):
    network = told(lambda s, x, t: wrap(torch.cat([s.w * x, 100 + 0 * x], 1)))
    plain = told(lambda s, x, t: s.w * x)
    task = hw.tasks.Diffusion(hw.tasks.cosine())
    torch.testing.assert_close(task.loss(network, X + 1), task.loss(plain, X + 1))


# ------------------------------------------------------------------------------------------------------------ what does not fit


def loss_of(network, scheduler, batch, **settings):
    return lambda: hw.tasks.Diffusion(scheduler, timesteps=1, **settings).loss(network, batch)


EXPLODING = Process("diffusion", torch.ones(3), torch.tensor([0.1, 1.0, 9.0]), torch.tensor([0.1, 1.0, 9.0]), "epsilon")
MISFITS = {
    "pixels for a latent model": (lambda: loss_of(unet_of_prompts(), diffusers.DDPMScheduler(), (torch.zeros(1, 3, 4, 4), text(1))), "in_channels=4.*\n.*\n.*latents"),
    "another number of channels": (lambda: loss_of(unet(), diffusers.DDPMScheduler(), torch.zeros(1, 1, 4, 4)), r"\(1, 1, 4, 4\) for a UNet2DModel with in_channels=3"),
    "another number of timesteps": (
        lambda: loss_of(diffusers.UNet2DModel(in_channels=3, out_channels=3, num_train_timesteps=500, **UNET, down_block_types=("DownBlock2D",) * 2,
                                              up_block_types=("UpBlock2D",) * 2), diffusers.DDPMScheduler(), torch.zeros(1, 3, 4, 4)),
        "1000 timesteps for a UNet2DModel with num_train_timesteps=500",
    ),
    "levels wanted, timesteps given": (
        lambda: loss_of(flux(), diffusers.FlowMatchEulerDiscreteScheduler(), NETWORKS["Flux"][2](1), fixed=IDS), "times up to 1000.*\n.*\n.*time=1 / 1000"),
    "noise levels wanted": (
        lambda: loss_of(diffusers.UNet2DModel(in_channels=3, out_channels=3, time_embedding_type="fourier", **UNET, down_block_types=("DownBlock2D",) * 2,
                                              up_block_types=("UpBlock2D",) * 2), diffusers.DDPMScheduler(), torch.zeros(1, 3, 4, 4)),
        "Fourier time embeddings",
    ),
    "a prompt missing": (
        lambda: loss_of(unet_of_prompts(), diffusers.DDPMScheduler(), torch.zeros(1, 4, 4, 4)), "UNet2DConditionModel that cannot be called.*encoder_hidden_states"),
    "an unknown name": (
        lambda: loss_of(unet(), diffusers.DDPMScheduler(), {"images": torch.zeros(1, 3, 4, 4), "label": classes(1)}), "unexpected keyword argument 'label'"),
    "one condition too many": (lambda: loss_of(told(lambda s, x, t: x), hw.tasks.cosine(), (X, Y)), "too many positional arguments"),
    "another shape": (lambda: loss_of(told(lambda s, x, t: x[:, :, 1:]), hw.tasks.cosine(), X), r"shape \(2, 3, 3, 4\) for images of shape \(2, 3, 4, 4\)"),
    "backwards": (lambda: loss_of(lumina(), diffusers.FlowMatchEulerDiscreteScheduler(), {"images": torch.zeros(1, 4, 4, 4)}), "told the time backwards"),
    "no tensor": (lambda: loss_of(told(lambda s, x, t: {"x": x}), hw.tasks.cosine(), X), "returned a dict"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "said"), MISFITS.values(), ids=MISFITS)
def test_networks_and_processes_that_do_not_fit_are_told_apart(make, said):
    with pytest.raises(TaskError, match=said):
        make()()


def test_a_network_of_noise_levels_takes_the_process_that_it_was_trained_with():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = diffusers.UNet2DModel(in_channels=3, out_channels=3, time_embedding_type="fourier", **UNET, **blocks)
    assert torch.isfinite(loss_of(network, EXPLODING, torch.zeros(1, 3, 4, 4))()).all()


def test_labels_dropped_at_random_are_refused_until_eval():
    network, task, examples, _ = ready("DiT")
    with pytest.raises(hw.HeadwaterError, match=r"LabelEmbedding '.*' is in training mode: it drops at random.*\n.*\n.*eval\(\)"):
        Capture(network.train(), task.loss, examples.batch(range(2)))
    Capture(network.eval(), task.loss, examples.batch(range(2)))
