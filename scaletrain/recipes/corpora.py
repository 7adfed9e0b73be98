"""From prepared folders to the batches of a rank: which data a run reads, and the plan, slots and loaders that follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from scaletrain import dist
from scaletrain.data import urls
from scaletrain.data.cache import CacheConfig
from scaletrain.data.dataset import AsStored, Dataset
from scaletrain.data.folders import Folders
from scaletrain.data.ledger import DamageConfig, Substitution
from scaletrain.data.loader import Loader, LoaderConfig
from scaletrain.data.plan import CorpusShape, EvalPlan, OrderConfig, PhaseShape, Plan, tempered
from scaletrain.data.slots import SPECIAL_TOKENS, Dealing, DealtPlan, Layout, SlotConfig
from scaletrain.data.tokenizer import Vocabulary
from scaletrain.errors import ConfigError, CorpusError, ScaletrainError, StorageError, TokenizerError
from scaletrain.tasks.mlm import MaskedLanguageModelling, MlmConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """A prepared folder and its part in the mixture."""

    path: str
    """What `scaletrain prepare` wrote: a folder, or the URL of one (`https://...`, `s3://...`). With --allow-pipe also a command
    that writes a file of it: `pipe:COMMAND ... {file}`."""
    weight: Annotated[float, Field(gt=0, lt=1e18)] = 1.0
    """Share of the samples relative to the other corpora; with a temperature, what their share by size is multiplied with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmUpConfig:
    """A phase before the main one: shorter rows (corpora prepared with a smaller max_tokens) or smaller steps."""

    steps: Annotated[int, Field(ge=1)]
    """Steps of this phase; they count towards the run's `steps`."""
    chunks_per_step: Annotated[int, Field(ge=1)]
    """Chunks per step of this phase."""
    corpora: tuple[CorpusConfig, ...] = ()
    """The mixture of this phase; empty: that of the main one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What the model reads, and in what order."""

    corpora: Annotated[tuple[CorpusConfig, ...], Field(min_length=1)]
    """The prepared folders; all with the same tokenizer. Their validation splits are the held-out text."""
    chunks_per_step: Annotated[int, Field(ge=1)] = 256
    """Chunks that one optimizer step sees, over all ranks."""
    temperature: Annotated[float, Field(ge=1)] | None = None
    """Shares of every mixture by size, flattened: weight * chunks^(1/temperature). 1: in proportion to size, all corpora passed
    over equally often; 3.33: the exponent 0.3 of XLM-R and mT5; .inf or null: by weight alone."""
    warm_up: tuple[WarmUpConfig, ...] = ()
    """Phases before the main one."""
    order: OrderConfig = field(default_factory=OrderConfig)
    """How the chunks are shuffled."""
    slots: SlotConfig = field(default_factory=SlotConfig)
    """How a step is cut into micro-batches."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """How the chunks are read."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Where copies of corpora that lie elsewhere are kept."""
    damage: DamageConfig = field(default_factory=DamageConfig)
    """How much of the training data may be unreadable before the run stops."""


class Corpora:
    """The training and held-out data of one run, dealt by a rule that is fixed for the whole run."""

    def __init__(
        self, config: DataConfig, steps: int, seed: int, layout: Layout, dealing: Dealing | None, *, allow_pipe: bool = False
    ) -> None:
        """``dealing``: the rule that the run was started with; None on a fresh start.

        Raises CorpusError, TokenizerError or ConfigError for folders that cannot be trained on together, CheckpointError for slot
        settings that are not those of the fresh start, and WorldSizeError for a number of ranks that wastes too many slots.
        """
        self._config = config
        self.dealing = dealing or Dealing.of(config.slots, layout, dist.world())
        self.dealing.check(config.slots, layout)
        self._folders = Folders(config.cache, allow_pipe=allow_pipe)
        self._datasets = self._opened(config)
        if dist.rank() == 0:
            self._folders.check_room(config.order)
        by_path = self._datasets
        self.tokenizer_folder, self.vocabulary = _shared_tokenizer(list(by_path.values()))
        self.plan = Plan(seed, _phases(config, steps, by_path), config.order)
        by_digest = {dataset.digest: dataset for dataset in by_path.values()}
        self.datasets = [by_digest[corpus.digest] for corpus in self.plan.corpora]
        self._train = DealtPlan(self.plan, [dataset.lengths for dataset in self.datasets], self.dealing)
        self.waste = self._train.check_world(
            dist.world(), multiple_follows=dealing is None and config.slots.slot_multiple is None
        )
        dist.agree("the data", self.plan.digest)

    def _opened(self, config: DataConfig) -> dict[str, Dataset]:
        """By path; where one rank cannot open a folder, all raise what it says."""
        opened: dict[str, Dataset] = {}
        error: ScaletrainError | None = None
        try:
            for path in _paths(config):
                opened[path] = self._folders.open(path, tolerant=True)
                _check_damage(opened[path], config.damage)
        except ScaletrainError as failure:
            error = failure
        dist.raise_together(error, "opening the data")
        return opened

    def readable(self, replaced: Substitution) -> bool:
        """Whether a chunk that could not be read can be now."""
        try:
            self.datasets[replaced.corpus].read(replaced.chunk)
        except (CorpusError, StorageError):
            return False
        return True

    def identity(self) -> dict[str, str]:
        """Digests of what a resumed run must find unchanged."""
        return {
            "tokenizer": self.vocabulary.digest,
            "data.corpora": " ".join(dataset.digest[:12] for dataset in self.datasets),
            "data.chunks_per_step": str(self._config.chunks_per_step),
            "data.plan": self.plan.digest,
        }

    def check_positions(self, max_positions: int) -> None:
        """Raises ConfigError for a model whose longest row is shorter than a chunk with its special tokens."""
        longest = max(self.datasets, key=lambda dataset: dataset.max_tokens)
        needed = longest.max_tokens + SPECIAL_TOKENS
        if needed > max_positions:
            rule = f"{longest.folder} was prepared with max_tokens {longest.max_tokens}, which take {needed} with [CLS] and [SEP]"
            most = max_positions - SPECIAL_TOKENS
            remedy = f"Use a model of at least {needed}, or prepare the data with max_tokens of at most {most}"
            raise ConfigError("model.max_positions", max_positions, rule, remedy)

    @property
    def folder_names(self) -> list[str]:
        """What the plan's corpora are called: as much of the end of each path as tells them apart."""
        paths = {dataset.digest: urls.shown(path).rstrip("/").split("/") for path, dataset in self._datasets.items()}
        parts = [paths[dataset.digest] for dataset in self.datasets]
        for count in range(1, max(map(len, parts))):
            names = ["/".join(each[-count:]) for each in parts]
            if len(set(names)) == len(names):
                return names
        return ["/".join(each) for each in parts]

    def names(self, step: int) -> list[str]:
        """What the samples of a step, counted from 1, are called: folder of the corpus, and number of the chunk in it."""
        picks, corpora = self.plan.picks(step - 1), self.folder_names
        return [f"{corpora[c]}:{n}" for c, n in zip(picks.corpus.tolist(), picks.chunk.tolist(), strict=True)]

    def mixture(self) -> Iterator[dict[str, str | int | float]]:
        """Of each corpus, over the whole run: the samples that come from it, their share, and the passes that they make."""
        paths = {dataset.digest: urls.shown(path) for path, dataset in self._datasets.items()}
        samples: list[int] = self.plan.samples_of_corpora().tolist()
        for dataset, given in zip(self.datasets, samples, strict=True):
            share, passes = given / sum(samples), given / dataset.chunks
            yield {"path": paths[dataset.digest], "samples": given, "share": round(share, 4), "passes": round(passes, 3)}

    @property
    def tokens_per_chunk(self) -> float:
        """Mean over the samples of the run, special tokens included."""
        samples: list[int] = self.plan.samples_of_corpora().tolist()
        tokens = math.fsum(given * d.tokens / d.chunks for given, d in zip(samples, self.datasets, strict=True))
        return tokens / sum(samples) + SPECIAL_TOKENS

    def task(self, config: MlmConfig, seed: int, *, token_types: bool) -> MaskedLanguageModelling:
        """Raises ConfigError where the second part of a pair comes from another chunk of a slot, and slots hold one."""
        two = 2 * (max(dataset.max_tokens for dataset in self.datasets) + SPECIAL_TOKENS)
        if config.pair == "nsp" and self.dealing.micro_batch_tokens < two:
            rule = f"task.pair=nsp takes parts of other chunks in the slot, and two of the longest take {two}"
            remedy = f"Set it to at least {two}, better several times that, or take task.pair=sop"
            raise ConfigError("data.slots.micro_batch_tokens", self.dealing.micro_batch_tokens, rule, remedy)
        digests = [dataset.digest for dataset in self.datasets]
        return MaskedLanguageModelling(config, self.vocabulary, self.dealing, digests, seed, token_types)

    def loader(self, task: MaskedLanguageModelling) -> Loader:
        stored = [AsStored(dataset) for dataset in self.datasets]
        return Loader(self._train, stored, task.collate, dist.rank(), dist.world(), self._config.loader)

    def held_out(self, chunks_per_pass: int) -> HeldOut:
        """The validation splits of the main phase's corpora. Raises CorpusError where one has none."""
        for corpus in self._config.corpora:
            if "validation" not in self._folders.manifest(corpus.path)["splits"]:
                rule = "the held-out loss is measured on the validation split of every corpus"
                remedy = "Set evaluation.every_steps=0, or prepare it with validation_fraction or a validation source"
                raise CorpusError(urls.shown(corpus.path), "no validation split", rule, remedy)
        datasets = [self._folders.open(corpus.path, "validation") for corpus in self._config.corpora]
        plan = EvalPlan([CorpusShape(dataset.digest, dataset.chunks) for dataset in datasets], chunks_per_pass)
        dealt = DealtPlan(plan, [dataset.lengths for dataset in datasets], self.dealing)
        return HeldOut(datasets, dealt, plan.samples, self._config.loader)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out data: every chunk once, in order."""

    datasets: Sequence[Dataset]
    dealt: DealtPlan
    samples: int
    _loader: LoaderConfig

    def task(self, task: MaskedLanguageModelling) -> MaskedLanguageModelling:
        return task.for_evaluation([dataset.digest for dataset in self.datasets])

    def loader(self, task: MaskedLanguageModelling) -> Loader:
        stored = [AsStored(dataset) for dataset in self.datasets]
        return Loader(self.dealt, stored, task.collate, dist.rank(), dist.world(), self._loader)


def _check_damage(dataset: Dataset, damage: DamageConfig) -> None:
    """Raises what is wrong with the first unreadable shard, where the unreadable ones are more than a run may pass over."""
    faults = dataset.faults
    unreadable = sum(chunks for _, chunks in faults)
    if unreadable > damage.fraction * dataset.chunks:
        error = faults[0][0]
        error.add_note(
            f"{len(faults)} shards with {unreadable} of {dataset.chunks} chunks cannot be read; "
            f"at most a share of {damage.fraction:g} may (data.damage.fraction)"
        )
        raise error


def _paths(config: DataConfig) -> list[str]:
    mixtures = [config.corpora, *(phase.corpora for phase in config.warm_up)]
    return list(dict.fromkeys(corpus.path for mixture in mixtures for corpus in mixture))


def _phases(config: DataConfig, steps: int, datasets: Mapping[str, Dataset]) -> list[PhaseShape]:
    main_steps = steps - sum(phase.steps for phase in config.warm_up)
    if main_steps < 1:
        raise ConfigError("steps", steps, f"data.warm_up takes {steps - main_steps} of them", "Leave steps for the main phase.")

    def shapes(corpora: Sequence[CorpusConfig]) -> tuple[CorpusShape, ...]:
        digests = [datasets[corpus.path].digest for corpus in corpora]
        for number, digest in enumerate(digests):
            if digest in digests[:number]:
                rule = "it holds the same text as another corpus of its mixture"
                raise ConfigError("data.corpora", urls.shown(corpora[number].path), rule, "Name it once, with the summed weight")
        return tuple(shape(datasets[corpus.path], corpus.weight) for corpus in corpora)

    def shape(dataset: Dataset, weight: float) -> CorpusShape:
        return CorpusShape(dataset.digest, dataset.chunks, tempered(weight, dataset.chunks, config.temperature or math.inf))

    warm_up = [
        PhaseShape(shapes(phase.corpora or config.corpora), phase.chunks_per_step, phase.steps) for phase in config.warm_up
    ]
    return [*warm_up, PhaseShape(shapes(config.corpora), config.chunks_per_step, main_steps)]


def _shared_tokenizer(datasets: Sequence[Dataset]) -> tuple[Path, Vocabulary]:
    first = datasets[0]
    for other in datasets[1:]:
        if other.tokenizer_digest != first.tokenizer_digest:
            rule = f"{first.folder} was tokenised with another one ({first.tokenizer_digest[:12]})"
            remedy = "Prepare one again with `tokenizer: {name: pretrained, path: OTHER/tokenizer}`."
            raise TokenizerError(f"tokenizer of {other.folder}", other.tokenizer_digest[:12], rule, remedy)
    return first.tokenizer_folder, Vocabulary.open(first.tokenizer_folder)
