"""Laws of explained texts: scores sum to the change of the output, padding changes nothing, special tokens carry nothing, and the numbers are
those of an explicit loop over embeddings. Models are tiny and random; tokenizers are made here of a few words."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import InputError
from headwater.features.text.tokens import encoded, words_of

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SENTENCES = [
    "the cat sat on the mat",
    "dogs are running unhappily to the town",
    "a good film with bad acting and running jokes",
    "don't walk away from the café , she said",
    "who lives in the small town of paris ? ada lives there",
]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GL = hw.quadrature.gauss_legendre


def _merges(words):
    """Merges of byte pairs that put each of the words together from its beginning. Nothing is trained: that would differ from run to run."""
    return list(dict.fromkeys((word[:k], word[k]) for word in words for k in range(1, len(word))))


def _wrapped(model, normalizer=None, before=None, after=None, decoder=None, **names):
    made = tokenizers.Tokenizer(model)
    for name, part in (("normalizer", normalizer), ("pre_tokenizer", before), ("post_processor", after), ("decoder", decoder)):
        if part is not None:
            setattr(made, name, part)
    made.add_special_tokens([name for key, name in names.items() if key.endswith("_token")])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.fixture(scope="module")
def pieces():
    """A WordPiece tokenizer as BERT's."""
    from tokenizers import models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz"
    known = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        ",",
        "'",
        "?",
        "the",
        "cat",
        "sat",
        "on",
        "mat",
        "dogs",
        "are",
        "run",
        "film",
        "acting",
        "good",
        "bad",
        "in",
        "small",
        "town",
        "of",
        "lives",
        "who",
        "par",
        "un",
        "##ning",
        "##happi",
        "##ly",
        "##is",
    ]
    vocabulary = [*known, *letters, *("##" + letter for letter in letters)]
    frame = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    model = models.WordPiece({token: k for k, token in enumerate(vocabulary)}, unk_token="[UNK]")
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    facts = {"model_max_length": 32, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    return _wrapped(model, normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), frame, **names, **facts)


@pytest.fixture(scope="module")
def bytes_():
    """A byte-level tokenizer as GPT-2's: no padding token, one special token."""
    from tokenizers import decoders, models, pre_tokenizers

    words = ["\u0120" + word for word in ["the", "town", "of", "small", "in", "lives", "cat", "sat", "on", "mat", "paris", "caf"]]
    merges = _merges(words)
    vocabulary = dict.fromkeys(["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)])
    model = models.BPE({token: k for k, token in enumerate(vocabulary)}, merges)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|end|>")
    return _wrapped(model, before=pre_tokenizers.ByteLevel(add_prefix_space=False), decoder=decoders.ByteLevel(), **names, model_max_length=64)


@pytest.fixture(scope="module")
def marked():
    """A tokenizer with marks of spaces and an end token, as T5's, that takes a whole text for one word."""
    from tokenizers import decoders, models, normalizers, processors

    merges = _merges(["\u2581" + word for word in ["the", "cat", "sat", "on", "mat", "dogs", "are", "un"]])
    vocabulary = dict.fromkeys(["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz,'?", *(a + b for a, b in merges)])
    model = models.BPE({token: k for k, token in enumerate(vocabulary)}, merges, unk_token="<unk>")
    spaces = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    frame = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return _wrapped(model, spaces, None, frame, decoders.Metaspace(), pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def bert(kind, pieces, seed=0, **more):
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=len(pieces), max_position_embeddings=32, initializer_range=0.2, **SMALL, **more)
    return getattr(transformers, kind)(config).double().eval()


def gpt(bytes_, seed=0, kind="GPT2LMHeadModel", **more):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=len(bytes_), n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=0, eos_token_id=0, **more
    )
    return getattr(transformers, kind)(config).double().eval()


def llama(bytes_, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(vocab_size=len(bytes_), max_position_embeddings=64, initializer_range=0.3, num_key_value_heads=1, **SMALL)
    return transformers.LlamaForCausalLM(config).double().eval()


def gemma(bytes_, seed=0):
    """A model that scales its embeddings after it has looked them up."""
    torch.manual_seed(seed)
    facts = {**SMALL, "initializer_range": 0.3, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": None}
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(vocab_size=len(bytes_), **facts)).double().eval()


def t5(marked, seed=0):
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=len(marked),
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5ForConditionalGeneration(config).double().eval()


def brute(score, x, b, rule):
    """Integrated Gradients of ``score((1, T, D)) -> ()`` from b to x (T, D), node by node, summed over D."""
    total = torch.zeros_like(x)
    for t, w in zip(rule.nodes.tolist(), rule.weights.tolist(), strict=True):
        point = (b + t * (x - b)).requires_grad_()
        total += w * torch.autograd.grad(score(point[None]), point)[0]
    return (total * (x - b)).sum(-1).numpy()


def completes(e, tolerance=1e-9):
    change = e.output - e.baseline_output
    np.testing.assert_allclose(e.values.sum(1), change + e.residual, atol=1e-12)
    assert np.abs(e.residual).max() <= tolerance * max(1.0, np.abs(change).max())
    assert np.abs(change).max() > 1e-3  # something happened


# ---- classes -------------------------------------------------------------------------------------------------------------------------


TEXTS = ["the cat sat on the mat", "running dogs", "a good film with bad acting , unhappily"]


def test_a_classifier_agrees_with_a_loop_over_its_input_embeddings(pieces):
    model, rule = bert("BertForSequenceClassification", pieces, num_labels=3), GL(5)
    e = hw.explain(model, TEXTS, tokenizer=pieces, rule=rule)
    pad = model.get_input_embeddings()(torch.tensor(pieces.pad_token_id)).detach()
    for k, text in enumerate(TEXTS):
        ids = pieces(text, return_tensors="pt")["input_ids"]
        x = model.get_input_embeddings()(ids)[0].detach()
        special = torch.isin(ids[0], torch.tensor(pieces.all_special_ids))
        b = torch.where(special[:, None], x, pad)
        best = int(model(ids).logits.argmax())
        truth = brute(lambda p, best=best: model(inputs_embeds=p).logits[0, best], x, b, rule)
        np.testing.assert_allclose(e.values[k, : len(truth)], truth, atol=1e-12)
        assert not e.values[k, len(truth) :].any()
        assert len(e.tokens[k]) == len(truth)
        assert float(model(ids).logits[0, best].detach()) == pytest.approx(e.output[k])
    assert e.kind == "text" and e.target == "the predicted class" and e.baseline == "the token [PAD]"


def test_a_bag_of_embeddings_has_the_scores_of_its_closed_form(pieces):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.embed, self.head = nn.Embedding(len(pieces), 5), nn.Linear(5, 2)

        def forward(self, input_ids, attention_mask):
            return self.head((self.embed(input_ids) * attention_mask[..., None]).sum(1))

    model = Bag().double()
    e = hw.explain(model, TEXTS, target=1, tokenizer=pieces, rule=GL(1), baseline=hw.baselines.token("mask"))
    worth = (model.embed.weight @ model.head.weight[1]).detach().numpy()
    for k, text in enumerate(TEXTS):
        ids = np.array(pieces(text)["input_ids"])
        special = np.isin(ids, pieces.all_special_ids)
        np.testing.assert_allclose(e.values[k, : len(ids)], np.where(special, 0, worth[ids] - worth[pieces.mask_token_id]), atol=1e-12)
    completes(e)


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "DistilBertForSequenceClassification", "RobertaForSequenceClassification"])
def test_scores_sum_special_tokens_are_zero_and_a_batch_is_like_one(kind, pieces):
    torch.manual_seed(0)
    name = kind.split("For")[0]
    facts = {"vocab_size": len(pieces), "initializer_range": 0.1, "pad_token_id": 0, "max_position_embeddings": 34}
    facts |= {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24} if name == "DistilBert" else SMALL
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**facts)).double()
    whole = hw.explain(model, TEXTS, target=1, tokenizer=pieces, rule=GL(48))
    completes(whole, 1e-4)
    assert model.training is True  # as it was
    assert any("training mode" in note for note in whole.notes)
    for k, text in enumerate(TEXTS):
        one = hw.explain(model, text, target=1, tokenizer=pieces, rule=GL(48))
        np.testing.assert_allclose(whole.values[k, : one.values.shape[1]], one.values[0], atol=1e-12)
        special = np.isin(pieces(text)["input_ids"], pieces.all_special_ids)
        assert not one.values[0, special].any() and one.values[0, ~special].all()


def test_the_model_is_left_as_it_was(pieces):
    model = bert("BertForSequenceClassification", pieces).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hw.explain(model, TEXTS, tokenizer=pieces, rule=GL(2))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_ids_padded_on_either_side_and_what_a_tokenizer_returns_are_like_texts(pieces, bytes_):
    model = bert("BertForSequenceClassification", pieces)

    def ask(inputs, **more):
        return hw.explain(model, inputs, target=0, tokenizer=pieces, rule=GL(4), **more)

    truth = ask(TEXTS)
    right = pieces(TEXTS, padding=True, return_tensors="pt")
    same = [right, right["input_ids"], right["input_ids"].numpy(), pieces(TEXTS), pieces(TEXTS)["input_ids"], [*map(list, pieces(TEXTS)["input_ids"])]]
    for inputs in same:
        e = ask(inputs)
        np.testing.assert_allclose(e.values, truth.values, atol=1e-12)
        assert e.tokens == truth.tokens and e.provenance["word_ids"] == truth.provenance["word_ids"]
    left = pieces(TEXTS, padding=True, padding_side="left", return_tensors="pt")
    e = ask(left)
    np.testing.assert_allclose(e.values, truth.values, atol=1e-12)
    assert any("left" in note for note in e.notes)
    ending = gpt(bytes_, pad_token_id=0)  # its padding token begins and ends texts too: without a mask it is a part of them
    assert len(hw.explain(ending, [[0, 66, 67]], 68, tokenizer=bytes_, rule=GL(1)).tokens[0]) == 3
    bare = hw.explain(model, right, target=0, rule=GL(4))  # no tokenizer: the config knows the padding token only
    assert bare.tokens[1] == tuple(map(str, pieces(TEXTS[1])["input_ids"]))
    assert any("No tokenizer" in note for note in bare.notes)


def test_labels_are_targets_by_name(pieces):
    model = bert("BertForSequenceClassification", pieces, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})

    def ask(target):
        return hw.explain(model, TEXTS, target, tokenizer=pieces, rule=GL(3))

    named, numbered = ask("good"), ask(1)
    np.testing.assert_array_equal(named.values, numbered.values)
    assert named.target == numbered.target == "output 1 (good)"
    each = ask(["good", "bad", "good"])
    np.testing.assert_array_equal(each.values[[0, 2]], named.values[[0, 2]])
    margin = ask(hw.targets.margin(1, 0))
    np.testing.assert_allclose(margin.values, named.values - ask("bad").values, atol=1e-12)
    predicted = ask(None)
    logits = [model(**pieces(text, return_tensors="pt")).logits[0] for text in TEXTS]
    assert predicted.provenance["explained"] == [["bad", "good"][int(z.argmax())] for z in logits]
    with pytest.raises(InputError, match="'bad', 'good'"):
        ask("fine")
    with pytest.raises(InputError, match="2 targets for 3 texts"):
        ask(["good", "bad"])
    with pytest.raises(InputError, match="output"):
        ask(2)


def test_pairs_keep_their_segments(pieces):
    model, rule = bert("BertForSequenceClassification", pieces), GL(4)
    pairs = [("the cat sat", "dogs are running"), ("a film", "a good film with bad acting")]
    e = hw.explain(model, pairs, target=1, tokenizer=pieces, rule=rule)
    assert e.n == 2 and hw.explain(model, pairs[0], target=1, tokenizer=pieces, rule=rule).n == 1
    batch = pieces(*pairs[1], return_tensors="pt")
    assert batch["token_type_ids"].any()
    x = model.get_input_embeddings()(batch["input_ids"])[0].detach()
    pad = model.get_input_embeddings()(torch.tensor(0)).detach()
    special = torch.isin(batch["input_ids"][0], torch.tensor(pieces.all_special_ids))
    truth = brute(lambda p: model(inputs_embeds=p, token_type_ids=batch["token_type_ids"]).logits[0, 1], x, torch.where(special[:, None], x, pad), rule)
    np.testing.assert_allclose(e.values[1], truth, atol=1e-12)
    words = e.words()
    assert words.tokens[0] == ("[CLS]", "the", "cat", "sat", "[SEP]", "dogs", "are", "running", "[SEP]")


def test_a_regression_head_needs_no_target(pieces):
    model = bert("BertForSequenceClassification", pieces, num_labels=1)
    e = hw.explain(model, TEXTS, tokenizer=pieces, rule=GL(32))
    completes(e, 1e-6)
    assert e.output[0] == pytest.approx(float(model(**pieces(TEXTS[0], return_tensors="pt")).logits.detach()))


def test_a_decoder_that_classifies_finds_its_last_token(bytes_):
    model = gpt(bytes_, kind="GPT2ForSequenceClassification")
    with pytest.raises(InputError, match="pad_token_id"):
        hw.explain(model, SENTENCES[:2], tokenizer=bytes_)
    model.config.pad_token_id = 0
    e = hw.explain(model, SENTENCES[:2], target=1, tokenizer=bytes_, rule=GL(4))
    assert e.baseline == "the mean embedding"  # padding is no token of its own
    for k in range(2):
        one = hw.explain(model, SENTENCES[k], target=1, tokenizer=bytes_, rule=GL(4))
        np.testing.assert_allclose(e.values[k, : one.values.shape[1]], one.values[0], atol=1e-12)


def test_a_tolerance_is_kept_and_layers_are_explained(pieces):
    model = bert("BertForSequenceClassification", pieces)
    e = hw.explain(model, TEXTS, target=0, tokenizer=pieces, tolerance=1e-3)
    assert e.converged.all() and (e.relative_residual <= 1e-3).all()
    inner = hw.explain(model, TEXTS, target=0, tokenizer=pieces, layer="bert.encoder.layer.0", rule=GL(64))
    assert inner.values.shape == (3, e.values.shape[1], 16) and inner.kind == "text"
    change = inner.output - inner.baseline_output
    np.testing.assert_allclose(inner.values.sum((1, 2)), change, atol=1e-6 * np.abs(change).max())
    np.testing.assert_allclose(change, e.output - e.baseline_output, atol=1e-12)
    curved = hw.explain(model, TEXTS, target=0, tokenizer=pieces, path=hw.paths.guided(40))
    assert not curved.values[:, 0].any() and np.abs(curved.residual).max() < np.abs(change).max()


def test_models_of_local_attention_get_whole_windows(pieces):
    torch.manual_seed(0)
    config = transformers.LongformerConfig(vocab_size=len(pieces), attention_window=4, max_position_embeddings=64, pad_token_id=0, initializer_range=0.1, **SMALL)
    model = transformers.LongformerForSequenceClassification(config).double().eval()
    e = hw.explain(model, TEXTS, target=1, tokenizer=pieces, rule=GL(16), baseline=hw.baselines.token("mask"))
    assert e.output[1] == pytest.approx(float(model(pieces(TEXTS[1], return_tensors="pt")["input_ids"]).logits[0, 1].detach()))
    one = hw.explain(model, TEXTS[1], target=1, tokenizer=pieces, rule=GL(16), baseline=hw.baselines.token("mask"))
    np.testing.assert_allclose(e.values[1, : one.values.shape[1]], one.values[0], atol=1e-12)
    assert one.values.shape[1] == len(one.tokens[0]) and np.abs(e.residual).max() < 1e-6


def test_encoder_decoder_classifiers_move_what_both_halves_read(marked):
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=len(marked),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
        decoder_start_token_id=1,
        init_std=0.3,
        num_labels=2,
        scale_embedding=True,
    )
    model = transformers.BartForSequenceClassification(config).double().eval()
    e = hw.explain(model, SENTENCES[:2], target=1, tokenizer=marked, baseline=hw.baselines.token("unk"), rule=GL(32))
    completes(e, 1e-4)
    for k in range(2):
        ids = marked(SENTENCES[k], return_tensors="pt")["input_ids"]
        assert e.output[k] == pytest.approx(float(model(ids).logits[0, 1].detach()))
        blank = torch.where(ids == 1, ids, marked.unk_token_id)
        assert e.baseline_output[k] == pytest.approx(float(model(blank).logits[0, 1].detach()))


def test_neurons_functions_and_models_without_a_head_are_explained(pieces, bytes_):
    model = bert("BertModel", pieces)
    e = hw.explain(model, TEXTS, lambda hidden: hidden[:, 0, 3], tokenizer=pieces, rule=GL(48))
    completes(e)
    unit = hw.explain(model, TEXTS, tokenizer=pieces, layer="encoder.layer.1", neuron=(0, 3), rule=GL(48))
    np.testing.assert_allclose(unit.values, e.values, atol=1e-12)
    with pytest.raises(InputError, match="no head"):
        hw.explain(model, TEXTS, tokenizer=pieces)
    speaker = gpt(bytes_)
    token = bytes_(" paris")["input_ids"][0]
    logit = hw.explain(speaker, PROMPT, lambda z: z[:, -1, token], tokenizer=bytes_, rule=GL(48))
    completes(logit)
    assert logit.output[0] == pytest.approx(float(speaker(torch.tensor([bytes_(PROMPT)["input_ids"]])).logits[0, -1, token].detach()))
    inner = hw.explain(speaker, PROMPT, " paris", tokenizer=bytes_, layer="transformer.h.0", rule=GL(48))
    assert inner.values.shape[1] == len(inner.tokens[0]) and np.abs(inner.residual).max() < 1e-9


# ---- labels of words, answers ----------------------------------------------------------------------------------------------------------


def test_a_label_of_a_word_is_explained(pieces):
    model = bert("BertForTokenClassification", pieces, id2label={0: "O", 1: "B-LOC", 2: "I-LOC"}, label2id={"O": 0, "B-LOC": 1, "I-LOC": 2})
    text = "ada lives in paris"
    e = hw.explain(model, text, ("paris", "B-LOC"), tokenizer=pieces, rule=GL(32))
    place = next(k for k, word in words_of(encoded(pieces, text)) if word == "paris")
    logits = model(**pieces(text, return_tensors="pt")).logits[0].detach()
    assert e.output[0] == pytest.approx(float(logits[place, 1]))
    completes(e, 1e-6)
    again = hw.explain(model, [text, "the cat"], [(place, 1), ("cat", None)], tokenizer=pieces, rule=GL(32))
    np.testing.assert_allclose(again.values[0], e.values[0], atol=1e-12)
    assert again.provenance["explained"][0].startswith("B-LOC")
    split = hw.explain(model, [text.split()], ("paris", "B-LOC"), tokenizer=pieces, rule=GL(32))
    np.testing.assert_allclose(split.values, e.values, atol=1e-12)
    with pytest.raises(InputError, match="0 times"):
        hw.explain(model, text, ("london", "B-LOC"), tokenizer=pieces)
    with pytest.raises(InputError, match="no target"):
        hw.explain(model, text, tokenizer=pieces)
    with pytest.raises(InputError, match="position 99"):
        hw.explain(model, text, (99, 1), tokenizer=pieces)


def test_a_mask_is_explained_by_what_fills_it(pieces):
    model = bert("BertForMaskedLM", pieces)
    text = "the [MASK] sat on the mat"
    e = hw.explain(model, text, tokenizer=pieces, baseline=hw.baselines.token("zero"), rule=GL(32))
    logits = model(**pieces(text, return_tensors="pt")).logits[0, 2].detach()
    assert e.output[0] == pytest.approx(float(logits.max())) and e.values[0, 2] != 0  # the mask is a part of the text
    named = hw.explain(model, text, ("[MASK]", "cat"), tokenizer=pieces, rule=GL(2))
    assert named.output[0] == pytest.approx(float(logits[pieces.get_vocab()["cat"]]))


def test_answers_are_explained_by_their_start_and_end(pieces):
    pair = ("who lives in paris ?", "ada lives in the small town of paris")
    batch = pieces(*pair, return_tensors="pt")
    inside = [k for k, p in enumerate(batch.sequence_ids(0)) if p == 1]
    for seed in range(20):  # until one would rather look for its answer outside of the context
        model = bert("BertForQuestionAnswering", pieces, seed)
        out = model(**batch)
        start, end = out.start_logits[0].detach(), out.end_logits[0].detach()
        best = max((float(start[a] + end[b]), a, b) for a in inside for b in inside if a <= b < a + 30)
        if float(torch.triu(start[:, None] + end[None, :]).max()) > best[0] + 0.1:
            break
    else:
        pytest.fail("no such model")
    e = hw.explain(model, pair, tokenizer=pieces, rule=GL(48))
    assert e.output[0] == pytest.approx(best[0])
    completes(e, 1e-6)
    first = hw.explain(model, pair, "start", tokenizer=pieces, rule=GL(48))
    last = hw.explain(model, pair, "end", tokenizer=pieces, rule=GL(48))
    assert first.output[0] == pytest.approx(float(start[best[1]]))
    np.testing.assert_allclose(first.values + last.values, e.values, atol=1e-12)
    given = hw.explain(model, pair, hw.targets.span("small town", part="start"), tokenizer=pieces, rule=GL(2))
    place = next(
        k for k, (a, b) in enumerate(pieces(*pair, return_offsets_mapping=True)["offset_mapping"]) if a == pair[1].find("small") and batch.sequence_ids(0)[k] == 1
    )
    assert given.output[0] == pytest.approx(float(start[place])) and "small town" in given.target
    with pytest.raises(InputError, match="words of the context"):
        hw.explain(model, pair, hw.targets.span("london"), tokenizer=pieces)


# ---- continuations -----------------------------------------------------------------------------------------------------------------------


PROMPT = "who lives in the small town of"


def log_p(model, ids, place, token):
    return float(model(torch.tensor([ids])).logits[0, place].log_softmax(-1)[token].detach())


@pytest.mark.parametrize("make", [gpt, llama, gemma])
def test_what_carried_a_continuation_sums_to_its_log_probability(make, bytes_):
    model, rule = make(bytes_), GL(64)
    prompt, said = bytes_(PROMPT)["input_ids"], bytes_(" paris ?")["input_ids"]
    the = bytes_(" the")["input_ids"][0]
    e = hw.explain(model, PROMPT, " paris ?", tokenizer=bytes_, rule=rule, baseline=hw.baselines.token(the))
    by_hand = sum(log_p(model, prompt + said[:t], -1, token) for t, token in enumerate(said))
    assert e.output[0] == pytest.approx(by_hand)
    completes(e, 1e-6)
    assert (len(e.tokens[0]) == len(prompt) and e.tokens[0][1] == " lives" * (e.tokens[0][1] == " lives")) or "".join(e.tokens[0]) == PROMPT
    blank = [the] * len(prompt)
    assert e.baseline_output[0] == pytest.approx(sum(log_p(model, blank + said[:t], -1, token) for t, token in enumerate(said)))
    if make is gemma:  # whose inputs_embeds are not what its embedding gives
        return
    # an explicit loop over embeddings, the continuation kept
    ids = torch.tensor([prompt + said])
    table = model.get_input_embeddings().weight.detach()
    x, b = table[ids[0]], table[ids[0]].clone()
    b[: len(prompt)] = table[the]

    def score(p):
        z = model(inputs_embeds=p).logits[0].log_softmax(-1)
        return sum(z[len(prompt) - 1 + t, token] for t, token in enumerate(said))

    np.testing.assert_allclose(e.values[0], brute(score, x, b, rule)[: len(prompt)], atol=1e-11)


def test_token_by_token_is_lower_triangular_and_sums_to_the_whole(bytes_):
    model = gpt(bytes_)

    def ask(inputs=PROMPT, **more):
        return hw.explain(model, inputs, hw.targets.continuation(" paris ?", **more), tokenizer=bytes_, rule=GL(6))

    each, whole = ask(each=True), ask(prefix=True)
    said = bytes_(" paris ?")["input_ids"]
    count, prompt = len(said), len(bytes_(PROMPT)["input_ids"])
    assert each.values.shape == (count, prompt + count) and "".join(each.example_names) == " paris ?"
    later = np.triu(np.ones((count, count), bool))
    assert not each.values[:, prompt:][later].any() and each.values[:, prompt:][~later].all()
    np.testing.assert_allclose(each.values.sum(0), whole.values[0], atol=1e-12)
    np.testing.assert_allclose(ask(each=True, prefix=False).values.sum(0), ask().values[0], atol=1e-12)
    assert each.output.sum() == pytest.approx(whole.output[0])
    two = ask([PROMPT, "the cat"], each=True)
    np.testing.assert_allclose(two.values[:count, : each.values.shape[1]], each.values, atol=1e-12)
    assert two.n == 2 * count and two.example_names[count].startswith("1: ")
    assert each.words().values.sum() == pytest.approx(each.values.sum())


def test_the_models_own_words_are_the_default_and_a_foil_is_a_difference(bytes_):
    model = gpt(bytes_)
    ids = bytes_(PROMPT)["input_ids"]
    best = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).detach()
    e = hw.explain(model, PROMPT, tokenizer=bytes_, rule=GL(32))
    assert e.output[0] == pytest.approx(float(best.max())) and any("greedily" in note for note in e.notes)
    by_id = hw.explain(model, PROMPT, int(best.argmax()), tokenizer=bytes_, rule=GL(32))
    np.testing.assert_array_equal(by_id.values, e.values)
    longer = hw.explain(model, PROMPT, hw.targets.continuation(count=3), tokenizer=bytes_, rule=GL(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False, pad_token_id=0)[0, len(ids) :].tolist()
    assert longer.provenance["explained"] == [bytes_.decode(said)]
    foil = hw.explain(model, PROMPT, hw.targets.continuation(" paris", foil=" town of"), tokenizer=bytes_, rule=GL(32))
    a, b = (hw.explain(model, PROMPT, text, tokenizer=bytes_, rule=GL(32)) for text in (" paris", " town of"))
    np.testing.assert_allclose(foil.values, a.values - b.values, atol=1e-12)
    np.testing.assert_allclose(foil.output, a.output - b.output)
    assert foil.target == "log p(' paris') less log p(' town of')"
    completes(foil, 1e-6)


@pytest.mark.parametrize("last", [[" paris", " sat on the mat , she said"], [" paris", " sat"]], ids=["all positions", "positions apart"])
def test_prompts_of_several_lengths_are_like_one_by_one(last, bytes_):
    model = llama(bytes_)
    prompts, said = [PROMPT, "the cat"], last
    whole = hw.explain(model, prompts, said, tokenizer=bytes_, rule=GL(4))
    for k in range(2):
        one = hw.explain(model, prompts[k], said[k], tokenizer=bytes_, rule=GL(4))
        np.testing.assert_allclose(whole.values[k, : one.values.shape[1]], one.values[0], atol=1e-12)
        assert not whole.values[k, one.values.shape[1] :].any()


def test_a_continuation_is_cut_into_tokens_as_it_follows(marked):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(marked), max_position_embeddings=64, **SMALL)).double().eval()
    for prompt, said, names, note in (("the cat", " sat", ["\u2581sat"], ""), ("the cat", "s", ["s"], ""), ("the do", "gs", ["\u2581", "g", "s"], "merge")):
        e = hw.explain(model, prompt, said, tokenizer=marked, rule=GL(2))
        ids = marked(prompt)["input_ids"][:-1]  # its </s> is taken off
        wanted = marked.convert_tokens_to_ids(names)
        assert e.output[0] == pytest.approx(sum(log_p(model, ids + wanted[:t], -1, token) for t, token in enumerate(wanted)))
        assert any("end-of-text" in one for one in e.notes) and any("merge" in one for one in e.notes) == bool(note)


def test_half_precision_sums_to_within_its_rounding(bytes_):
    model = gpt(bytes_)
    exact = hw.explain(model, PROMPT, " paris", tokenizer=bytes_, rule=GL(16))
    half = hw.explain(model.to(torch.bfloat16), PROMPT, " paris", tokenizer=bytes_, rule=GL(16))
    assert half.values.dtype == np.float64
    assert np.linalg.norm(half.values - exact.values) < 0.1 * np.linalg.norm(exact.values)


def test_a_target_text_of_an_encoder_decoder_is_carried_by_its_source(marked):
    model, rule = t5(marked), GL(48)
    source, said = "the cat sat on the mat", "dogs are running"
    labels = marked(said)["input_ids"]
    e = hw.explain(model, source, said, tokenizer=marked, rule=rule)
    logits = model(**marked(source, return_tensors="pt"), decoder_input_ids=torch.tensor([[0, *labels[:-1]]])).logits[0].log_softmax(-1)
    assert e.output[0] == pytest.approx(sum(float(logits[t, i].detach()) for t, i in enumerate(labels[:-1])))  # </s> does not count
    completes(e, 1e-3)
    assert e.target == "log p('dogs are running')"
    assert e.tokens[0][-1] == "</s>" and not e.values[0, -1]
    x = model.get_input_embeddings()(marked(source, return_tensors="pt")["input_ids"])[0].detach()
    b = torch.where(torch.tensor([i == 1 for i in marked(source)["input_ids"]])[:, None], x, model.get_input_embeddings().weight[0].detach())

    def score(p):
        z = model(inputs_embeds=p, decoder_input_ids=torch.tensor([[0, *labels[:-1]]])).logits[0].log_softmax(-1)
        return sum(z[t, i] for t, i in enumerate(labels[:-1]))

    np.testing.assert_allclose(e.values[0], brute(score, x, b, rule), atol=1e-11)
    each = hw.explain(model, source, hw.targets.continuation(said, each=True), tokenizer=marked, rule=rule)
    np.testing.assert_allclose(each.values.sum(0), e.values[0], atol=1e-12)
    assert each.n == len(labels) - 1
    own = hw.explain(model, source, hw.targets.continuation(count=2), tokenizer=marked, rule=GL(2))
    said = model.generate(**marked(source, return_tensors="pt"), max_new_tokens=2, do_sample=False)[0, 1:].tolist()
    assert own.provenance["explained"] == [marked.decode(said)]


def test_one_embedding_module_for_both_halves_is_met_once(marked):
    ask = ("the cat sat on the mat", "dogs are running")
    apart, shared = t5(marked), t5(marked)
    shared.decoder.embed_tokens = shared.encoder.embed_tokens
    ours, theirs = (hw.explain(model, *ask, tokenizer=marked, rule=GL(3)) for model in (shared, apart))
    np.testing.assert_allclose(ours.values, theirs.values, atol=1e-12)


def test_values_that_miss_the_change_of_the_output_say_so(bytes_):
    model = llama(bytes_)  # it normalises its embeddings first: at the zero embedding its output jumps, which no rule sees
    zero = hw.explain(model, PROMPT, " paris ?", tokenizer=bytes_, rule=GL(16), baseline=hw.baselines.token("zero"))
    assert zero.relative_residual[0] > 0.1 and any("zero embedding" in note and "row 0" in note for note in zero.notes)
    real = hw.explain(model, PROMPT, " paris ?", tokenizer=bytes_, rule=GL(48), baseline=hw.baselines.token(bytes_(" the")["input_ids"][0]))
    assert real.relative_residual[0] < 1e-3 and not any("zero embedding" in note for note in real.notes)


# ---- baselines, words ----------------------------------------------------------------------------------------------------------------------


def test_baselines_are_tokens_and_their_averages(pieces):
    model = bert("BertForSequenceClassification", pieces)

    def ask(baseline):
        return hw.explain(model, TEXTS, target=0, tokenizer=pieces, rule=GL(4), baseline=baseline)

    token = hw.baselines.token
    mask, unk, zero = ask(token("mask")), ask(token("unk")), ask(token("zero"))
    assert mask.baseline == "the token [MASK]"
    np.testing.assert_array_equal(ask(token(pieces.mask_token_id)).values, mask.values)
    np.testing.assert_array_equal(ask(pieces.mask_token_id).values, mask.values)
    np.testing.assert_array_equal(ask(0.0).values, zero.values)
    both = ask(hw.baselines.average(token("mask"), token("unk")))
    np.testing.assert_allclose(both.values, (mask.values + unk.values) / 2, atol=1e-12)
    np.testing.assert_allclose(both.stderr, np.abs(mask.values - unk.values) / 2, atol=1e-12)
    ids = np.full((3, mask.values.shape[1]), pieces.mask_token_id)
    np.testing.assert_array_equal(ask(ids).values, mask.values)
    mean = model.get_input_embeddings().weight.detach().mean(0)
    np.testing.assert_allclose(ask(token("mean")).values, ask(mean.expand(mask.values.shape[1], -1)).values, atol=1e-12)
    for e in (mask, unk, zero, both):
        assert not e.values[:, 0].any()  # [CLS]
    with pytest.raises(InputError, match="does not have"):
        ask(token("bos"))
    with pytest.raises(InputError, match="one of hw"):
        ask("mask")


def test_words_are_the_sums_of_their_tokens(pieces, bytes_, marked):
    text = "don't walk away , café running"
    e = hw.explain(bert("BertForSequenceClassification", pieces), text, target=0, tokenizer=pieces, rule=GL(2))
    words = e.words()
    assert words.tokens[0] == ("[CLS]", "don", "'", "t", "walk", "away", ",", "cafe", "running", "[SEP]")
    assert words.values.sum() == pytest.approx(e.values.sum())
    e = hw.explain(gpt(bytes_), "the café sat unhappily", " on", tokenizer=bytes_, rule=GL(2))
    assert "".join(e.tokens[0]) == "the café sat unhappily"
    assert [w.strip() for w in e.words().tokens[0]] == ["the", "café", "sat", "unhappily"]
    e = hw.explain(t5(marked), "the cat sat unhappily", "dogs", tokenizer=marked, rule=GL(2))  # this tokenizer says all of it is one word
    assert [w.strip() for w in e.words().tokens[0]] == ["the", "cat", "sat", "unhappily", "</s>"]
    assert hw.explain(t5(marked), marked(["the cat sat"])["input_ids"], "dogs", tokenizer=marked, rule=GL(2)).words().values.shape == (1, 4)


def test_a_slow_tokenizer_has_words_too(pieces, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(pieces.get_vocab(), key=pieces.get_vocab().get)))
    from transformers.models.bert_japanese.tokenization_bert_japanese import BertJapaneseTokenizer

    slow = BertJapaneseTokenizer(str(tmp_path / "vocab.txt"), word_tokenizer_type="basic", subword_tokenizer_type="wordpiece")
    assert not slow.is_fast
    model = bert("BertForSequenceClassification", pieces)
    ours, theirs = (hw.explain(model, TEXTS, target=0, tokenizer=t, rule=GL(2)) for t in (slow, pieces))
    np.testing.assert_allclose(ours.values, theirs.values, atol=1e-12)
    assert ours.words().tokens == theirs.words().tokens


# ---- what is refused ---------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_refused(pieces, bytes_):
    model, speaker = bert("BertForSequenceClassification", pieces), gpt(bytes_)
    refused = [
        (lambda: hw.explain(model, "the cat"), "without a tokenizer"),
        (lambda: hw.explain(model, ["the cat", ""], tokenizer=pieces), "text 1, which has no token"),
        (lambda: hw.explain(model, [], tokenizer=pieces), "no text|rows of whole"),
        (lambda: hw.explain(model, ["the cat", 3], tokenizer=pieces), "rows of whole numbers"),
        (lambda: hw.explain(model, torch.randn(2, 3), tokenizer=pieces), "whole numbers"),
        (lambda: hw.explain(model, "the cat", tokenizer=pieces.backend_tokenizer), "PreTrainedTokenizerFast"),
        (lambda: hw.explain(model, "the cat", tokenizer=pieces, path=hw.paths.blur(1.0)), "blur"),
        (lambda: hw.explain(model, "the cat", tokenizer=pieces, discrete=[1]), "discrete"),
        (lambda: hw.explain(model, "the cat", tokenizer=pieces, smooth=hw.Smooth(2, 0.1)), "smooth"),
        (lambda: hw.explain(model, "the cat", tokenizer=pieces, feature_names=["a"]), "tokens"),
        (lambda: hw.explain(model, "the cat", hw.targets.continuation(" sat"), tokenizer=pieces), "writes text"),
        (lambda: hw.explain(model, "the cat", hw.targets.span("cat"), tokenizer=pieces), "question answering"),
        (lambda: hw.explain(model, torch.tensor([[2, 5000, 3]]), tokenizer=pieces), "tokenizer that the model was trained with|embedding"),
        (lambda: hw.explain(speaker, PROMPT * 12, " x", tokenizer=bytes_), "reads 64"),
        (lambda: hw.explain(speaker, PROMPT, hw.targets.continuation([66] * 60), tokenizer=bytes_), "continuation of .* tokens for a model that reads 64"),
        (lambda: hw.explain(speaker, PROMPT, "", tokenizer=bytes_), "at least one token"),
        (lambda: hw.explain(speaker, PROMPT, hw.targets.continuation([9999]), tokenizer=bytes_), "ids below"),
        (lambda: hw.explain(speaker, PROMPT, [" a", " b"], tokenizer=bytes_), "2 targets for 1 texts"),
        (lambda: hw.explain(speaker, PROMPT, hw.targets.continuation(" a", foil=" b", each=True), tokenizer=bytes_), "foil"),
        (lambda: hw.explain(speaker, {"input_ids": [[1, 2]], "attention_mask": [[1]]}, 3), "attention_mask of lengths"),
        (lambda: hw.explain(model, {"input_ids": [[2, 9, 3]], "color": [[1, 1, 1]]}, 0), "color"),
        (lambda: hw.explain(model, "the cat", 0, tokenizer=pieces, extra={"attention_mask": 1}), "belong to the inputs"),
        (lambda: hw.explain(speaker, {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, 3), "zeros inside"),
    ]
    for call, message in refused:
        with pytest.raises(InputError, match=message):
            call()


def test_positions_that_count_on_from_padding_are_not_overrun(pieces):
    config = transformers.RobertaConfig(vocab_size=len(pieces), max_position_embeddings=14, pad_token_id=1, **SMALL)
    model = transformers.RobertaForSequenceClassification(config)
    with pytest.raises(InputError, match="reads 12"):
        hw.explain(model, torch.full((1, 13), 9), 0, rule=GL(2))
    assert hw.explain(model, torch.full((1, 12), 9), 0, rule=GL(2)).values.shape == (1, 12)


def test_long_texts_are_cut_and_it_is_said(pieces):
    model = bert("BertForSequenceClassification", pieces)
    long = " ".join(["the cat"] * 40)
    e = hw.explain(model, ["dogs", long], target=0, tokenizer=pieces, rule=GL(2))
    assert len(e.tokens[1]) == 32 and e.tokens[1][-1] == "[SEP]"
    assert any("Cut at the end" in note and "text 1" in note for note in e.notes)


def test_scores_of_texts_are_saved_drawn_and_found_again(pieces, tmp_path):
    e = hw.explain(bert("BertForSequenceClassification", pieces), TEXTS, tokenizer=pieces, rule=GL(2), example_names=["a", "b", "c"])
    again = hw.load(e.save(tmp_path / "scores"))
    np.testing.assert_array_equal(again.values, e.values)
    assert again.words().tokens == e.words().tokens
    page = e.to_html(tmp_path / "page.html").read_text()
    assert ">mat<" in page


def test_a_pipeline_brings_its_tokenizer(pieces):
    model = bert("BertForSequenceClassification", pieces)
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=pieces, device="cpu")
    ours, theirs = hw.explain(pipe, TEXTS, rule=GL(2)), hw.explain(model, TEXTS, tokenizer=pieces, rule=GL(2))
    np.testing.assert_array_equal(ours.values, theirs.values)


def test_transformers_is_not_imported_to_find_out():
    import subprocess
    import sys

    code = "import sys, torch, headwater as hw; hw.explain(torch.nn.Linear(3, 1), torch.ones(2, 3)); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
