"""How a text model is run, and what its output is: one score for a text, for every token, for every next token, or where an answer begins."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headwater.errors import InputError
from headwater.features.calls import parameters
from headwater.features.layers import embeddings_of
from headwater.features.text.tokens import UNLIMITED, Text, padded

ACTIVATIONS = 34  # numbers of hidden size that a transformer block keeps for its backward pass, for each token (Korthikanti et al. 2022, arXiv 2205.05198)
MEMORY = 2**30  # bytes of activations at once on a CPU; on a GPU a quarter of what is free


@dataclass(frozen=True, eq=False)
class Reading:
    """A text model and how it is run.

    Args:
        kind: "sequence" (logits (m, classes)), "tokens" (m, positions, classes), "span" (start and end logits, (m, positions, 2)), "causal" and
            "seq2seq" (logits of the next token, (m, positions, vocabulary)) or "hidden" (a model without a head).
        embedding: the module that token ids go into.
        takes: names of the arguments that the model takes, None for any.
        keep: positions whose logits are computed, in order; None for all.
        shared: whether the decoder of an encoder-decoder model embeds its tokens with the same module object.
    """

    model: Any
    kind: str
    embedding: nn.Module
    takes: frozenset[str] | None
    pad: int
    keep: tuple[int, ...] | None = None
    shared: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def call(self) -> partial[Tensor]:
        """The function ``(ids, **others) -> output`` that is explained; the model's layers keep their names in it."""
        return partial(run, self.model, self)

    @property
    def device(self) -> torch.device:
        """Where the embedding is."""
        return next(self.embedding.parameters()).device

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return len(weight_of(self.embedding))

    def tensors(self, texts: Sequence[Text]) -> tuple[Tensor, dict[str, Tensor]]:
        """Ids (n, longest), filled up to the right, and what goes with them: the mask, segments. Raises InputError."""
        step = window(self.model)
        ids = padded([text.ids for text in texts], self.pad, self.device, step)
        strange = [name for name in texts[0].aligned if name != "token_type_ids" and self.takes is not None and name not in self.takes]
        if strange:
            raise InputError(f"inputs with {', '.join(strange)} for a {type(self.model).__name__}", "what the model takes", "leave them out")
        others = {name: padded([text.aligned[name] for text in texts], 0, self.device, step) for name in texts[0].aligned if self.takes is None or name in self.takes}
        lengths = {len(text) for text in texts}
        if self.takes is None or "attention_mask" in self.takes:
            others["attention_mask"] = padded([(1,) * len(text) for text in texts], 0, self.device, step)
        elif len(lengths) > 1 and self.kind != "causal":  # later tokens say nothing of earlier ones
            given = f"texts of {min(lengths)} to {max(lengths)} tokens for a model that takes no attention_mask"
            raise InputError(given, "texts of one length, since padding would count as text", "explain texts of different lengths one at a time")
        return ids, others

    def outputs(self, texts: Sequence[Text], extra: Mapping[str, Any], chunk: int) -> Tensor:
        """The outputs (n, ...) as they are, chunk by chunk, without gradients."""
        ids, others = self.tensors(texts)
        parts = []
        with torch.no_grad():
            for s in torch.arange(len(ids), device=ids.device).split(chunk):
                rest = {k: v[s.to(v.device)] if isinstance(v, Tensor) and v.ndim and len(v) == len(ids) else v for k, v in {**others, **extra}.items()}
                parts.append(self.call(ids[s], **rest))
        return torch.cat(parts)


def run(model: Any, reading: Reading, ids: Tensor, **others: Any) -> Tensor:
    """What the model puts out for ids (m, positions), as one tensor."""
    options = dict(reading.options)
    if reading.keep is not None and reading.takes is not None and "logits_to_keep" in reading.takes:
        options["logits_to_keep"] = torch.tensor(reading.keep, device=ids.device)
    if "decoder_ids" in others:
        decoder_ids = others.pop("decoder_ids")
        if reading.shared:  # the path replaces what the module puts out; its own function is asked, around the path
            others["decoder_inputs_embeds"] = reading.embedding.forward(decoder_ids)
        else:
            others["decoder_input_ids"] = decoder_ids
    if "decoder_first" in others:  # the decoder reads the text itself, moved by one
        first = reading.embedding.forward(others.pop("decoder_first"))
        others["decoder_inputs_embeds"] = torch.cat([first, reading.embedding(ids)[:, :-1]], 1)
    out = output_of(model(ids, **others, **options))
    return out if reading.keep is None or "logits_to_keep" in options else out[:, list(reading.keep)]


def output_of(out: Any) -> Tensor:
    """The tensor in a model's output: logits, start and end logits side by side, or hidden states."""
    if getattr(out, "start_logits", None) is not None:
        return torch.stack([out.start_logits, out.end_logits], -1)
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        found = getattr(out, name, None)
        if isinstance(found, Tensor):
            return found
    first = out[0] if isinstance(out, tuple | list) and out else out
    if isinstance(first, Tensor):
        return first
    raise InputError(f"a model that returned a {type(out).__name__}", "a tensor, or an object with .logits", "wrap it in a function that returns its logits")


def window(model: Any) -> int:
    """Of what the number of positions is a multiple: models of local attention fill texts up inside otherwise, and embed other ids."""
    config = getattr(model, "config", None)
    found = getattr(config, "attention_window", None)
    if found is None and getattr(config, "attention_type", None) == "block_sparse":
        found = getattr(config, "block_size", None)
    sizes = found if isinstance(found, list | tuple) else [found]
    return max((int(size) for size in sizes if isinstance(size, int) and size > 0), default=1)


def weight_of(embedding: nn.Module) -> Tensor:
    """The table of an embedding, (ids, size)."""
    return embedding.weight  # type: ignore[return-value]


# ---- finding out -----------------------------------------------------------------------------------------------------------------


def reading_of(model: Any, text: Text, pad: int | None, extra: Mapping[str, Any], asks_for_tokens: bool) -> Reading:
    """How a model is run, seen by running it on one text. Raises InputError.

    ``asks_for_tokens``: whether a continuation is explained, which makes a model of one output for each token and position a causal one.
    """
    takes = _arguments(model)
    options = {"use_cache": False} if takes is not None and "use_cache" in takes else {}
    config = getattr(model, "config", None)
    speaks = bool(getattr(model, "can_generate", lambda: False)())
    both = bool(getattr(config, "is_encoder_decoder", False))
    device = next(iter(parameters(model)), torch.zeros(())).device
    step = window(model)
    ids = padded([text.ids], 0 if pad is None else pad, device, step)
    others = {k: padded([row], 0, device, step) for k, row in text.aligned.items() if takes is None or k in takes}
    others |= {"attention_mask": padded([(1,) * len(text)], 0, device, step)} if takes is None or "attention_mask" in takes else {}
    others |= {k: v[:1] if isinstance(v, Tensor) and v.ndim else v for k, v in extra.items()}
    if both and speaks:
        others["decoder_input_ids"] = torch.full((1, 1), decoder_start(model), device=device)
    seen: list[Any] = []

    def once() -> None:
        seen.append(model(ids, **others, **options))

    try:
        module = embeddings_of(model, [ids], once)[0]
    except IndexError as error:
        given = f"a token id up to {max(text.ids)}, in a text of {len(text)} tokens, that the model does not take ({error})"
        raise InputError(given, "ids and positions that it has embeddings for", "use the tokenizer that the model was trained with") from error
    if module is None:
        raise InputError("token ids that go into no embedding module of the model", "a model that embeds its token ids", "check that this is a text model")
    out = seen[-1]
    kind = _kind(out, both and speaks, speaks and not both, asks_for_tokens)
    shared = both and _decoder_embedding(model) is module
    return Reading(model, kind, module, takes, 0 if pad is None else pad, shared=shared, options=options)


def _kind(out: Any, both: bool, speaks: bool, asks_for_tokens: bool) -> str:
    if both:
        return "seq2seq"
    if getattr(out, "start_logits", None) is not None:
        return "span"
    found = output_of(out)
    if getattr(out, "logits", None) is None and getattr(out, "last_hidden_state", None) is found:
        return "hidden"
    if found.ndim <= 2:
        return "sequence"
    return "causal" if speaks or asks_for_tokens else "tokens"


def decoder_start(model: Any) -> int:
    """The id that an encoder-decoder model begins with."""
    for facts in (getattr(model, "generation_config", None), model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if (found := getattr(facts, name, None)) is not None:
                return int(found)
    raise InputError("an encoder-decoder model without a decoder_start_token_id", "the id that its decoder begins with", "model.config.decoder_start_token_id = ...")


def _decoder_embedding(model: Any) -> nn.Module | None:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder.get_input_embeddings() if decoder is not None and hasattr(decoder, "get_input_embeddings") else None


def decoder_reads_text(reading: Reading, texts: Sequence[Text], extra: Mapping[str, Any]) -> Tensor | None:
    """For an encoder-decoder model without a continuation (a classifier), whose decoder reads the text moved by one: what it begins with,
    (n, 1); None where the decoder reads nothing. Raises InputError where it reads something else."""
    module = _decoder_embedding(reading.model)
    if reading.kind in ("seq2seq", "causal") or module is None or not getattr(getattr(reading.model, "config", None), "is_encoder_decoder", False):
        return None
    ids, others = reading.tensors(texts)
    read: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: read.append(args[0].detach().clone()))
    try:
        with torch.no_grad():
            plain = run(reading.model, reading, ids, **others, **extra)
    finally:
        handle.remove()
    if len(read) == (1 if reading.shared else 0):
        return None
    decoder, mask = read[-1], others["attention_mask"].bool()[:, 1:]
    if decoder.shape == ids.shape and torch.equal(decoder[:, 1:][mask], ids[:, :-1][mask]):
        with torch.no_grad():
            ours = run(reading.model, reading, ids, **others, **extra, decoder_first=decoder[:, :1])
        if torch.allclose(ours, plain, rtol=1e-3, atol=1e-5):
            return decoder[:, :1]
    raise InputError(
        f"a {type(reading.model).__name__}, whose decoder reads something else than the text moved by one",
        "an encoder, a decoder, or an encoder-decoder model that is asked for a continuation",
        "explain the model that writes text, or write a function of embeddings",
    )


def _arguments(model: Any) -> frozenset[str] | None:
    """What a model takes by name, None for anything."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters of peft pass on what their model takes
    found = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters
    open_ = any(p.kind is p.VAR_KEYWORD for p in found.values())
    known = hasattr(model, "config") and len(found) > 2  # transformers' **kwargs are for its own switches
    return None if open_ and not known else frozenset(found)


def longest(model: Any, tokenizer: Any) -> int | None:
    """How many tokens a model can read, as far as it and its tokenizer say so."""
    numbers = [getattr(tokenizer, "model_max_length", None), getattr(getattr(model, "config", None), "max_position_embeddings", None)]
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
                numbers.append(module.num_embeddings - module.padding_idx - 1)  # positions are counted on from that of padding
    known = [int(x) for x in numbers if isinstance(x, int) and 0 < x < UNLIMITED]
    return min(known, default=None)


def at_once(reading: Reading, width: int, outputs: int) -> int:
    """How many texts of ``width`` tokens fit into memory with all that a backward pass needs; ``outputs``: positions with logits."""
    facts = getattr(reading.model, "config", None)
    get = lambda name, otherwise: getattr(facts, name, None) or otherwise  # noqa: E731
    layers, heads = int(get("num_hidden_layers", 12)), int(get("num_attention_heads", 12))
    hidden = weight_of(reading.embedding).shape[1]
    logits = 4 * outputs * reading.vocabulary if reading.kind in ("causal", "seq2seq") else 0
    numbers = layers * width * (ACTIVATIONS * hidden + 3 * heads * width) + logits
    size = next(reading.embedding.parameters()).element_size()
    gpu = reading.device.type == "cuda"
    memory = torch.cuda.mem_get_info(reading.device)[0] // 4 if gpu else MEMORY
    return int(max(1, min(memory // (numbers * max(4, size)), (2**17 if gpu else 2**13) // width, 1024)))
