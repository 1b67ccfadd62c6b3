# SPDX-License-Identifier: Apache-2.0
"""The shape of a dense decoder, read from a ``config.json``, and its parameters.

Shape legend: H hidden size, F width of the MLP, V vocabulary, A query heads, G key and value heads, E width of a head,
D outputs of a critic's head.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Architectures whose parameters ``Shape`` counts: RMSNorm, rotary positions, grouped attention, a gated MLP.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
#: What a model on a hub is called behind the name of the published base model; the shape is the same.
VARIANTS = ("-Instruct", "-Base")
TABLE = Path(__file__).with_name("models.json")


@dataclass(frozen=True)
class Shape:
    """A dense decoder.

    Attributes:
        name: of the model, for the report.
        model_type: one of ``MODEL_TYPES``.
        hidden, layers, heads, groups, head, mlp, vocabulary: H, the number of layers, A, G, E, F and V; each >= 1.
        tied: whether the output layer is the embedding.
        attention_bias: number of bias vectors in a layer's attention: of query, key and value (3), of all four, or 0.
        mlp_bias: whether the three layers of the MLP have a bias.
    """

    name: str
    model_type: str
    hidden: int
    layers: int
    heads: int
    groups: int
    head: int
    mlp: int
    vocabulary: int
    tied: bool
    attention_bias: int = 0
    mlp_bias: bool = False

    @property
    def layer_matrices(self) -> int:
        """Weights of one layer that multiply each token."""
        queries, keys = self.heads * self.head, self.groups * self.head
        return self.hidden * (2 * queries + 2 * keys) + 3 * self.hidden * self.mlp

    @property
    def layer(self) -> int:
        """Parameters of one layer, with norms and biases."""
        queries, keys = self.heads * self.head, self.groups * self.head
        norms = 2 * self.hidden + (2 * self.head if self.model_type == "qwen3" else 0)
        biases = {0: 0, 3: queries + 2 * keys, 4: queries + 2 * keys + self.hidden}[self.attention_bias]
        return self.layer_matrices + norms + biases + (2 * self.mlp + self.hidden if self.mlp_bias else 0)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, V * H; as many are in an output layer of its own."""
        return self.vocabulary * self.hidden

    @property
    def backbone(self) -> int:
        """Parameters without the output layer: the embedding, all layers, the last norm."""
        return self.embedding + self.layers * self.layer + self.hidden

    @property
    def policy(self) -> int:
        """Parameters of the language model."""
        return self.backbone + (0 if self.tied else self.embedding)

    def critic(self, outputs: int, width: int | None = None) -> int:
        """Counts the parameters of the backbone with a head of ``outputs`` numbers per token, biases included.

        Args:
            outputs: D.
            width: of the head's hidden layer; None for a linear head.
        """
        if width is None:
            return self.backbone + (self.hidden + 1) * outputs
        return self.backbone + (self.hidden + 1) * width + (width + 1) * outputs


def read_shape(config: dict[str, Any], name: str) -> Shape:
    """Reads the content of a ``config.json``.

    Raises:
        ValueError: an architecture that is not in ``MODEL_TYPES``, or a field that is missing or no positive number.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"model_type is {kind!r} in the config.json of {name!r}; {', '.join(MODEL_TYPES)} are allowed; "
            "the parameters of other architectures are not counted yet"
        )

    def number(field: str, default: int | None = None) -> int:
        value = config.get(field)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{field} is {value!r} in the config.json of {name!r}; an integer of at least 1 is allowed; "
                "give the folder of a whole model"
            )
        return value

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    biased = bool(config.get("attention_bias", False))
    return Shape(
        name=name,
        model_type=kind,
        hidden=hidden,
        layers=number("num_hidden_layers"),
        heads=heads,
        groups=number("num_key_value_heads", heads),
        head=number("head_dim", 128 if kind == "qwen3" else hidden // heads),
        mlp=number("intermediate_size"),
        vocabulary=number("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=3 if kind == "qwen2" else 4 if biased else 0,
        mlp_bias=kind == "llama" and bool(config.get("mlp_bias", False)),
    )


def published() -> dict[str, dict[str, Any]]:
    """Returns the configurations that ship with the package: name on the hub -> fields of ``config.json``."""
    table: dict[str, dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def find_shape(model: str) -> Shape:
    """Finds the shape of ``model``: a local folder, a published model of the table, or a name on the hub.

    Raises:
        ValueError: there is no such folder, or the hub does not give its ``config.json``; see ``read_shape`` too.
    """
    file = Path(model).expanduser() / "config.json"
    if file.is_file():
        return read_shape(_parse(file, model), model)
    name = model
    for end in VARIANTS:
        name = name.removesuffix(end)
    if name in (table := published()):
        return read_shape(table[name], model)
    if file.parent.is_dir() or model.startswith(("/", "~", ".")) or model.count("/") != 1:
        raise ValueError(f"model is {model!r}; a folder with a config.json, or a name on the hub, is allowed; give one")
    return read_shape(_parse(_from_hub(model), model), model)


def _parse(file: Path, model: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"config.json of {model!r} is no JSON ({error}); give the folder of a whole model") from error
    if not isinstance(content, dict):
        raise ValueError(f"config.json of {model!r} is no JSON object; give the folder of a whole model")
    return content


def _from_hub(model: str) -> Path:
    """Fetches ``config.json`` alone, from the hub's cache on this disk if it is there."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:  # the hub's client has a dozen kinds: no network, no such model, no permission
        raise ValueError(
            f"model is {model!r}; the hub did not give its config.json ({type(error).__name__}); a model that needs no "
            f"hub is allowed, which are {', '.join(published())}; for any other give a folder with its config.json"
        ) from error
