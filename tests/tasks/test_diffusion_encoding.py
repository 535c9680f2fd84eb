"""Latents and prompt embeddings: encoded once, the same in any batch, kept by content and weights, continued after a kill."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from headwater import tasks
from headwater.errors import DamagedFile, InputError, TaskError
from headwater.tasks.diffusion import encoding

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers


def images(n=7, seed=0):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def autoencoder(**settings):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
                                   up_block_types=("UpDecoderBlock2D",) * 2, **settings)  # fmt: skip


def encoded(*given, **settings):
    return tasks.latents(*given, progress=False, **settings)


def count(vae, calls):
    """The autoencoder, which notes how many images it encodes at a time."""
    inner = vae.encode
    vae.encode = lambda x: calls.append(len(x)) or inner(x)
    return vae


# ------------------------------------------------------------------------------------------------------------ latents


def test_latents_are_the_posteriors_mean_in_the_models_scale():
    vae = autoencoder(scaling_factor=0.3, shift_factor=0.2)
    with torch.no_grad():
        expected = (vae.encode(images()).latent_dist.mean - 0.2) * 0.3
    for batch_size in (2, 16):
        torch.testing.assert_close(encoded(images(), vae, batch_size=batch_size), expected, rtol=1e-5, atol=1e-6)
    for data in (images().numpy(), [*images()], (images(), torch.arange(7)), {"images": images(), "y": torch.arange(7)}):
        torch.testing.assert_close(encoded(data, vae), expected, rtol=1e-5, atol=1e-6)


def test_means_and_deviations_of_channels_are_taken_off():
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    vae = autoencoder(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    with torch.no_grad():
        z = vae.encode(images()).latent_dist.mean
    expected = torch.stack([(z[:, c] - mean[c]) * 0.5 / std[c] for c in range(4)], 1)  # as the training script of SDXL
    torch.testing.assert_close(encoded(images(), vae), expected, rtol=1e-5, atol=1e-6)


def test_a_draw_from_the_posterior_belongs_to_the_example():
    vae = autoencoder(scaling_factor=0.3)
    one = encoded(images(), vae, draw=1)
    torch.testing.assert_close(encoded(images(), vae, draw=1, batch_size=3), one, rtol=1e-5, atol=1e-6)
    assert (encoded(images(), vae, draw=2) - one).abs().min() > 0
    many = encoded(images(1).expand(400, 3, 8, 8), vae, draw=1, batch_size=64)
    with torch.no_grad():
        posterior = vae.encode(images(1)).latent_dist
    standard = (many / 0.3 - posterior.mean) / posterior.std
    assert abs(float(standard.mean())) < 5 / 160 and abs(float(standard.var()) - 1) < 5 * 2**0.5 / 160


def test_a_model_is_as_it_was_afterwards_and_has_no_gradients():
    vae = autoencoder().train()
    found = encoded(images(), vae)
    assert vae.training and vae.encoder.training and not found.requires_grad


def test_half_precision_gives_float32():
    assert encoded(images(), autoencoder().to(torch.bfloat16)).dtype == torch.float32


def test_autoencoders_without_a_posterior():
    tiny = diffusers.AutoencoderTiny(encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    with torch.no_grad():
        expected = tiny.encode(images()).latents * tiny.config.scaling_factor
    torch.testing.assert_close(encoded(images(), tiny), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="no posterior to draw from"):
        encoded(images(), tiny, draw=0)


def test_a_task_takes_them():
    unet = diffusers.UNet2DModel(in_channels=4, out_channels=4, sample_size=4, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
                                 down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2).eval()  # fmt: skip
    task = tasks.Diffusion(diffusers.DDPMScheduler())
    with pytest.raises(TaskError, match=r"hw\.tasks\.latents"):
        task.loss(unet, images(2))
    assert task.loss(unet, encoded(images(2), autoencoder())).shape == (2,)


# ------------------------------------------------------------------------------------------------------------ kept


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 3)


def test_a_second_call_reads_what_the_first_one_wrote(tmp_path):
    calls = []
    first = encoded(images(), count(autoencoder(), calls), path=tmp_path)
    assert calls == [3, 3, 1]
    assert torch.equal(encoded(images(), count(autoencoder(), calls), path=tmp_path), first) and len(calls) == 3


def test_a_killed_call_goes_on_to_the_same_result(tmp_path):
    calls, vae = [], autoencoder()
    whole, inner = encoded(images(), vae), vae.encode

    def dies(x):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(x))
        return inner(x)

    vae.encode = dies
    with pytest.raises(KeyboardInterrupt):
        encoded(images(), vae, path=tmp_path)
    again = []
    assert torch.equal(encoded(images(), count(autoencoder(), again), path=tmp_path), whole) and again == [1]


def test_other_images_weights_scales_and_draws_are_never_read(tmp_path):
    moved = autoencoder()
    with torch.no_grad():
        next(moved.parameters()).add_(0.1)
    variants = [(images(), autoencoder(), None), (images(seed=1), autoencoder(), None), (images(), moved, None),
                (images(), autoencoder(scaling_factor=0.7), None), (images(), autoencoder(), 0), (images(), autoencoder(), 1)]  # fmt: skip
    for data, vae, draw in variants:
        calls = []
        found = encoded(data, count(vae, calls), draw=draw, path=tmp_path)
        assert sum(calls) == 7
        torch.testing.assert_close(found, encoded(data, vae, draw=draw))


def test_a_damaged_file_is_named(tmp_path):
    encoded(images(), autoencoder(), path=tmp_path)
    next(tmp_path.rglob("*.safetensors")).write_bytes(b"broken")
    with pytest.raises(DamagedFile, match=r"latents.*\n.*\n.*delete"):
        encoded(images(), autoencoder(), path=tmp_path)


class Augmented:
    def __len__(self):
        return 5

    def __getitem__(self, i):
        return torch.rand(3, 8, 8)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda path: encoded(Augmented(), autoencoder(), path=path), "read differently each time"),
        (lambda path: encoded(images()[:, :1], autoencoder()), "in_channels=3"),
        (lambda path: encoded((images() * 100).to(torch.uint8), autoencoder()), "torch.uint8"),
        (lambda path: encoded(images(), nn.Identity()), "encode"),
        (lambda path: encoded(images()[:0], autoencoder()), "0 examples"),
        (lambda path: encoded([images()[0], images()[0][:, :4]], autoencoder(), batch_size=1), "latents of different shapes"),
    ],
    ids=["augmentation", "channels", "bytes", "no autoencoder", "nothing", "sizes"],
)
def test_what_cannot_be_encoded_is_refused(call, said, tmp_path):
    with pytest.raises(InputError, match=said):
        call(tmp_path)


def test_progress_is_told_and_can_be_silenced(capsys):
    tasks.latents(images(), autoencoder())
    assert "latents" in capsys.readouterr().err
    encoded(images(), autoencoder())
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------------ embeddings


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.asked = nn.Embedding(128, 5), []

    def encode(self, texts):
        self.asked += texts
        ids = torch.tensor([[ord(c) for c in text.ljust(6)] for text in texts])
        return {"encoder_hidden_states": self.table(ids), "pooled": self.table(ids).mean(1)}


PROMPTS = ["a cat", "a dog", "a cat", "", "a bird", "a dog"]


def test_each_prompt_is_encoded_once_and_stands_where_it_was(tmp_path):
    encoder = Encoder()
    found = tasks.embeddings(PROMPTS, encoder.encode, models=[encoder], path=tmp_path, batch_size=2, progress=False)
    assert sorted(encoder.asked) == sorted(set(PROMPTS)) and not found["pooled"].requires_grad
    for i, text in enumerate(PROMPTS):
        for name, value in Encoder().encode([text]).items():
            torch.testing.assert_close(found[name][i], value[0])
    again = tasks.embeddings(PROMPTS, encoder.encode, models=[encoder], path=tmp_path, progress=False)
    assert len(encoder.asked) == 4 and all(torch.equal(again[name], found[name]) for name in found)
    with torch.no_grad():
        encoder.table.weight.add_(1)
    tasks.embeddings(PROMPTS, encoder.encode, models=[encoder], path=tmp_path, progress=False)
    assert len(encoder.asked) == 8


def test_a_tensor_comes_back_as_one():
    encoder = Encoder()
    alone = tasks.embeddings(PROMPTS, lambda texts: encoder.encode(texts)["pooled"], progress=False)
    torch.testing.assert_close(alone, tasks.embeddings(PROMPTS, encoder.encode, progress=False)["pooled"])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda path: tasks.embeddings([], len), "0 prompts"),
        (lambda path: tasks.embeddings(["a", 3], len), "int"),
        (lambda path: tasks.embeddings(PROMPTS, Encoder().encode, path=path), "no model's weights"),
        (lambda path: tasks.embeddings(PROMPTS, lambda texts: (torch.zeros(len(texts)), None), progress=False), "tuple"),
        (lambda path: tasks.embeddings(PROMPTS, lambda texts: torch.zeros(1, 3), progress=False), r"\(1, 3\)"),
        (lambda path: tasks.embeddings(PROMPTS, lambda texts: torch.zeros(len(texts), len(texts[0])), batch_size=1, progress=False), "different shapes"),
    ],
)
def test_what_is_no_embedding_is_refused(call, said, tmp_path):
    with pytest.raises(InputError, match=said):
        call(tmp_path)


def test_a_posterior_is_asked_for_its_mean_alone():
    """A stub without sample(): nothing is drawn where nothing was asked to be."""

    class Stub(nn.Module):
        config = {"scaling_factor": 2.0}  # noqa: RUF012

        def encode(self, x):
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=x[:, :1] + 1))

    assert torch.equal(encoded(images(), Stub()), (images()[:, :1] + 1) * 2)
