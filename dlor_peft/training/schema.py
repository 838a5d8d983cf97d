"""The recipe's sections. Each field is described once, in its attribute docstring."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from .sources import suggest

Split = Literal["train", "dev", "test"]
Role = Literal[
    "text", "label", "prompt", "completion", "messages", "chosen", "rejected", "input", "output",
    "text1", "text2", "score", "anchor", "positive", "negative",
]  # fmt: skip


MAX_CONDITION = 1e8


class Section(BaseModel):
    """A mapping of known keys only; an unknown one is an error of type "unknown_key" that says what was meant."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, values: Any) -> Any:
        is_closed = cls.model_config.get("extra") == "forbid"
        for key in values if isinstance(values, dict) else ():
            if is_closed and key not in cls.model_fields:
                problem = f"unknown key.{suggest(key, cls.model_fields)}"
                raise PydanticCustomError("unknown_key", "{problem}", {"problem": problem, "key": key})
        return values


class ModelSection(Section):
    path: str
    """Model to adapt: a hub id, a folder, or `package:NAME` for the `model/` folder of an installed Python package."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the frozen weights; "auto" keeps the one they are stored in."""

    pooling: Literal["mean"] | None = None
    """Classification only. "mean" puts the head on normalised mean-pooled embeddings; without it transformers'
    AutoModelForSequenceClassification is used."""

    config: dict[str, Any] = {}
    """Values of the model's own config to change, for example hidden_dropout_prob: 0.0."""

    weights: Literal["pretrained", "identity"] = "pretrained"
    """"identity" builds the architecture of the config without a checkpoint: every linear layer that is not saved in
    full is the frozen identity, so that the adapter's matrices are all there is: diag(1 + delta) + U V^T in mode
    "scaled". What is drawn at random (embeddings, output layer) must be in adapter.modules_to_save."""

    quantization: dict[str, Any] = {}
    """Fields of transformers.BitsAndBytesConfig, for example load_in_4bit: true. Needs bitsandbytes."""

    device_map: str | dict[str, int | str] | None = None
    """Where the frozen weights lie, as in transformers: "auto", or a mapping from module names to devices."""

    offload_folder: str | None = None
    """Folder for weights that device_map leaves on disk and that are not read from the checkpoint itself."""

    @model_validator(mode="after")
    def _check_placement(self) -> ModelSection:
        if self.weights == "identity":
            for name in ("quantization", "device_map"):
                if getattr(self, name):
                    raise ValueError(f"weights: identity takes no {name}: drop one of them")
        if self.offload_folder is not None and self.device_map is None:
            raise ValueError("offload_folder belongs to device_map: set that too, or drop it")
        return self


class ClassificationSection(Section):
    type: Literal["text-classification"]
    """One label a text."""

    baseline: Literal["linear-probe"] | None = None
    """Baseline to report beside the adapter: logistic regression on the frozen encoder's embeddings (needs
    model.pooling: mean and a dev split, which chooses its regularisation)."""

    head_from_probe: PositiveFloat | None = None
    """Start the head from a logistic regression with this C on the frozen encoder's embeddings, as in "linear probing,
    then fine-tuning" (arXiv 2202.10054); without it the head starts at random. Needs model.pooling: mean."""


class SftSection(Section):
    type: Literal["sft"]
    """Supervised fine-tuning of a causal language model with TRL."""

    prompts: PositiveInt = 4
    """Number of test rows that are continued greedily to compare the adapter's states."""

    new_tokens: PositiveInt = 48
    """Tokens generated for each prompt."""


class DpoSection(Section):
    type: Literal["dpo"]
    """Direct preference optimisation of a causal language model with TRL. The reference is the model without its
    adapter."""

    prompts: PositiveInt = 4
    """Number of test rows whose prompts are continued greedily to compare the adapter's states."""

    new_tokens: PositiveInt = 48
    """Tokens generated for each prompt."""


class Seq2SeqSection(Section):
    type: Literal["seq2seq"]
    """From a text to a text, with an encoder and a decoder."""

    max_input_tokens: PositiveInt = 512
    """Longer inputs are cut."""

    max_output_tokens: PositiveInt = 128
    """Longer outputs are cut, and generations stop there."""

    generations: PositiveInt = 32
    """Number of test rows that are generated greedily: for the exact match, and to compare the adapter's states."""


class EmbeddingSection(Section):
    type: Literal["embedding"]
    """An embedding model with sentence-transformers: CosineSimilarityLoss for pairs with a score,
    MultipleNegativesRankingLoss for anchors with a positive and perhaps a negative."""


class DataSection(Section):
    dataset: str | None = None
    """Hub id of a data set. Give this or files."""

    name: str | None = None
    """Configuration of a hub data set."""

    splits: dict[Split, str] = {}
    """Names of a hub data set's splits, slices such as train[:90%] included. Default: train and test."""

    files: dict[Split, str] = {}
    """Local .jsonl, .json or .csv files. dev may be missing."""

    columns: dict[Role, str] = {}
    """Names of the columns. text-classification: text and label. sft: text; prompt and completion; or messages. dpo:
    prompt, chosen and rejected, or chosen and rejected that share their beginning. seq2seq: input and output.
    embedding: text1, text2 and score; anchor and positive; or anchor, positive and negative. Default: the first of
    these, each named like its role."""

    max_rows: PositiveInt | None = None
    """Rows of each split to draw, for a quick look."""

    @model_validator(mode="after")
    def _check_source(self) -> DataSection:
        if (self.dataset is None) == (not self.files):
            raise ValueError("give either dataset (a hub id) or files (train, dev, test), and not both")
        if self.files and (self.splits or self.name):
            raise ValueError("name and splits belong to dataset: drop them, or drop files")
        given = self.files or self.splits or {"train", "test"}
        if missing := {"train", "test"} - set(given):
            raise ValueError(f"{'files' if self.files else 'splits'} lacks {', '.join(sorted(missing))}")
        return self


class AdapterSection(Section):
    """The fields of the chosen method's PEFT config stand beside peft_type; `configs.py` checks them."""

    model_config = ConfigDict(extra="allow")

    peft_type: str = "DLOR"
    """PEFT method: DLOR, LORA or any other registered one."""


class WatchSection(Section):
    layers: bool = True
    """At each logging step (training.logging_steps), add to what the trainer logs and reports (training.report_to)
    the drift of alpha, ||U V^T||, the effective rank and the worst condition bound of the DLoR layers."""

    max_condition: PositiveFloat | None = MAX_CONDITION
    """Stop the run where what multiplies a weight has a condition bound above this: P of mode multiplicative, the
    diagonal of mode scaled at r = 0. Other layers have none. Needs layers: true; null never stops."""


class OptimizerSection(Section):
    """`dlor_peft.create_dlor_optimizer`: rates by role. The rate itself and the decay are training.learning_rate and
    training.weight_decay; without this section the optimizer is the trainer's own, with one rate for all.
    `optimizer: {}` is enough for U at its default ratio."""

    name: str | None = None
    """Class of torch.optim such as NAdam, or the dotted path of any optimizer; without it training.optim says."""

    options: dict[str, Any] = {}
    """Arguments of the class that name gives, for example betas: [0.9, 0.95]."""

    diag_lr_ratio: PositiveFloat = 1.0
    """Learning rate of the diagonals over training.learning_rate."""

    u_lr_ratio: PositiveFloat | None = None
    """Learning rate of U over training.learning_rate, as in LoRA+ (arXiv 2402.12354); null is 4 where there is a U."""

    head_learning_rate: PositiveFloat | None = None
    """Learning rate of what is trained in full (adapter.modules_to_save): a classifier's head, for example."""

    max_ratio: PositiveFloat | None = None
    """Keep ||U V^T|| <= max_ratio * min|alpha| by a projection after each step (mode "multiplicative"): see
    `dlor_peft.limit_ratio` for the condition number that this guarantees."""

    max_spread: PositiveFloat | None = None
    """Keep max|alpha| <= max_spread * min|alpha| besides."""

    @model_validator(mode="after")
    def _check_options(self) -> OptimizerSection:
        if self.options and self.name is None:
            raise ValueError("options are those of name: give name, or use training.optim_args")
        for option, field in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
            if option in self.options:
                raise ValueError(f"options: {option} is training.{field}; set it there")
        return self


class Recipe(Section):
    model: ModelSection
    task: Annotated[
        ClassificationSection | SftSection | DpoSection | Seq2SeqSection | EmbeddingSection,
        Field(discriminator="type"),
    ]
    data: DataSection
    adapter: AdapterSection
    training: dict[str, Any] = {}
    """Fields of the arguments of the task's trainer: transformers.TrainingArguments, for seq2seq
    Seq2SeqTrainingArguments; trl.SFTConfig for sft, trl.DPOConfig for dpo; for embedding
    SentenceTransformerTrainingArguments. `configs.py` checks them."""

    watch: WatchSection = WatchSection()
    """What is logged of the adapter's layers, and when a run has diverged."""

    optimizer: OptimizerSection | None = None

    start_batches: PositiveInt | None = None
    """Start V from the leading directions of the layers' inputs over so many training batches
    (`dlor_peft.initialize_from_data`); without it adapter.init_weights decides."""

    output_dir: str
    """Folder for everything that the run writes, relative to the current folder."""

    verify: bool = True
    """Reload and merge the saved adapter on one device and compare its outputs with the trained one's. Set it to false
    where the model does not fit there."""

    seed: NonNegativeInt = 0
    """Seed of the weights, the batches and the rows that max_rows draws."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Recipe:
        if self.optimizer and self.optimizer.name:
            for field in ("optim", "optim_args", "learning_rate_mapping"):
                if field in self.training:
                    raise ValueError(f"training.{field} and optimizer.name choose the optimizer: drop one")
        if self.model.pooling and self.task.type != "text-classification":
            raise ValueError(f"model.pooling is for text-classification, but task.type is {self.task.type}: drop it")
        if isinstance(self.task, ClassificationSection):
            if self.task.head_from_probe and self.model.pooling != "mean":
                raise ValueError("task.head_from_probe needs model.pooling: mean")
            if self.task.baseline and self.model.pooling != "mean":
                raise ValueError("task.baseline: linear-probe needs model.pooling: mean")
            if self.task.baseline and "dev" not in (self.data.files or self.data.splits):
                raise ValueError("task.baseline: linear-probe needs a dev split in data")
        return self
