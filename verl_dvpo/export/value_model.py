# SPDX-License-Identifier: Apache-2.0
"""A critic outside training: the distribution of the return after each token of a text.

Shape legend: B sequences, S tokens of one, D outputs of the head per token, J quantile levels.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from verl_dvpo.critic.first_head import fill_head, refuse_lost_adapter
from verl_dvpo.critic.head import build_head, head_name, load_backbone
from verl_dvpo.distributional.metrics import population_std
from verl_dvpo.export.adapters import merge_adapter, read_adapter
from verl_dvpo.export.folder import write_critic
from verl_dvpo.families.base import FamilyConfig, SampledFamily, ValueFamily
from verl_dvpo.families.registry import build_family, family_settings
from verl_dvpo.saved.files import read_json
from verl_dvpo.saved.head_file import CONFIG_KEY, copy_head, read_head
from verl_dvpo.saved.manifest import Manifest, check_files, read_manifest

#: Points of a distribution whose family has no samples, for its spread.
_LEVELS = 200


@dataclass(frozen=True)
class TokenValues:
    """The distribution of the return after each token of one sequence, in units of reward.

    Entry t is the state after token t was read, from which token t + 1 is written. verl's ``values`` of a response
    begin at the state after the prompt's last token.

    Attributes:
        token_ids: (S,) int64.
        outputs: (S, D) fp32, what the head says.
        family: gives them their meaning.
    """

    token_ids: Tensor
    outputs: Tensor
    family: ValueFamily

    @property
    def mean(self) -> Tensor:
        """(S,): the value, as the actor would see it."""
        return self.family.value(self.outputs)

    @property
    def spread(self) -> Tensor:
        """(S,): the standard deviation of the distribution; 0 where the family has none."""
        if isinstance(self.family, SampledFamily):
            return population_std(self.family.samples(self.outputs), -1)
        measured = self.family.statistics(self.outputs).get("quantile/spread")
        levels = (torch.arange(_LEVELS, device=self.outputs.device) + 0.5) / _LEVELS
        return population_std(self.family.quantiles(self.outputs, levels), -1) if measured is None else measured

    def quantiles(self, levels: Sequence[float] | Tensor) -> Tensor:
        """(S, J): quantiles at the (J,) levels.

        Raises:
            ValueError: a level is not in (0, 1).
        """
        wanted = torch.as_tensor(levels, dtype=self.outputs.dtype, device=self.outputs.device)
        if wanted.ndim != 1 or not bool(((wanted > 0) & (wanted < 1)).all()):
            raise ValueError(f"levels is {levels!r}; a list of numbers in (0, 1) is allowed")
        return self.family.quantiles(self.outputs, wanted)


class ValueModel(nn.Module):
    """A backbone with a value head, and the family that gives the head's outputs their meaning.

    Args:
        module: a backbone with the head in its place, see ``build``.
        settings: of the family.
        tokenizer: for texts; None allows token ids only.
        facts: of the run that made it.
    """

    def __init__(
        self, module: nn.Module, settings: FamilyConfig, tokenizer: Any = None, facts: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.module = module
        self.settings = settings
        self.family = build_family(settings)
        self.tokenizer = tokenizer
        self.facts = dict(facts or {})

    @classmethod
    def build(
        cls,
        path: str | Path,
        settings: FamilyConfig,
        *,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> "ValueModel":
        """Puts a family's first head on any model, as a run does.

        A model with one output per token, such as a reward model, gives the head its value; see ``head_from``.

        Args:
            path: a model's folder, or its name in a hub.
            settings: of the family.
            dtype: of the backbone; the head computes in fp32.
            trust_remote_code: runs code that comes with the model.
        """
        refuse_lost_adapter(str(path), None)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        module, scalar = load_backbone(str(path), config, dtype=dtype, trust_remote_code=trust_remote_code)
        head = _head(module, settings)
        fill_head(head, build_family(settings), settings, path=str(path), config=config, scalar=scalar)
        setattr(module, head_name(module), head)
        return cls(module, settings, _tokenizer(Path(path), trust_remote_code))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        family: str | None = None,
        trust_remote_code: bool = False,
    ) -> "ValueModel":
        """Loads a folder that ``verl-dvpo export`` or ``save_pretrained`` wrote, once all of it has been found whole.

        Args:
            path: the folder.
            dtype: of the backbone; the head computes in fp32.
            device: where to put it.
            family: import path of a family outside this package, which the folder may name but not import.
            trust_remote_code: runs code that comes with the model.

        Raises:
            ValueError: the folder is not whole, was changed, or needs a family that is not here.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ValueError(f"path is {str(path)!r}; the folder of an exported critic is allowed; download it first")
        manifest = read_manifest(folder, "critic")
        check_files(folder, manifest)
        settings = _settings(folder, manifest, family)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not getattr(config, CONFIG_KEY, None):
            raise ValueError(f"{folder / 'config.json'} has no {CONFIG_KEY!r}; take a whole copy of the folder")
        module, _ = load_backbone(str(folder), config, dtype=dtype, trust_remote_code=trust_remote_code)
        if found := read_adapter(folder):
            state = module.state_dict()
            merge_adapter(state, *found)
            module.load_state_dict(state)
        head = _head(module, settings)
        copy_head({name: p.data for name, p in head.named_parameters()}, read_head(folder), folder)
        setattr(module, head_name(module), head)
        model = cls(module, settings, _tokenizer(folder, trust_remote_code), manifest.facts)
        return model.to(device).eval()

    def save_pretrained(self, out: str | Path, *, tokenizer: str | Path | None = None, **about: Any) -> None:
        """Writes what ``from_pretrained`` and ``critic.model.path`` load.

        Args:
            out: a folder that does not exist or is empty.
            tokenizer: a folder with the tokenizer's files.
            **about: as for ``verl_dvpo.export.folder.write_critic``.
        """
        facts = about.pop("facts", self.facts)
        source = None if tokenizer is None else Path(tokenizer)
        write_critic(Path(out), self.module, self.settings, facts=facts, tokenizer=source, **about)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S) token ids and mask, padded on the right -> (B, S, D) outputs."""
        outputs: Tensor = self.module(input_ids=input_ids, attention_mask=attention_mask).logits
        return outputs

    @torch.no_grad()
    def values(self, inputs: str | Iterable[str | Sequence[int] | Tensor], *, batch_size: int = 8) -> list[TokenValues]:
        """Computes the distribution after each token of each input.

        Args:
            inputs: texts, tokenised as they are, or sequences of token ids.
            batch_size: sequences at once, >= 1.

        Raises:
            ValueError: a text without a tokenizer, an id outside the vocabulary, or a sequence that is too long.
        """
        ids = [self._ids(item) for item in ([inputs] if isinstance(inputs, str) else inputs)]
        self.eval()
        found: list[TokenValues] = []
        for first in range(0, len(ids), batch_size):
            found += self._batch(ids[first : first + batch_size])
        return found

    def _batch(self, ids: list[Tensor]) -> list[TokenValues]:
        device = next(self.parameters()).device
        longest = max(1, max(len(row) for row in ids))
        tokens = torch.zeros(len(ids), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, sequence in enumerate(ids):
            tokens[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        mask[:, 0] = 1  # an empty row: attention needs one token
        outputs = self(tokens.to(device), mask.to(device)).float()
        return [TokenValues(row, outputs[i, : len(row)], self.family) for i, row in enumerate(ids)]

    def _ids(self, item: str | Sequence[int] | Tensor) -> Tensor:
        if isinstance(item, str):
            if self.tokenizer is None:
                raise ValueError("inputs holds a text; this critic has no tokenizer; give token ids")
            item = self.tokenizer(item, add_special_tokens=False)["input_ids"]
        ids = torch.as_tensor(item, dtype=torch.int64).reshape(-1).cpu()
        config: Any = self.module.config.get_text_config()  # type: ignore[union-attr, operator]
        size, longest = config.vocab_size, getattr(config, "max_position_embeddings", None)
        if longest is not None and len(ids) > longest:
            raise ValueError(f"inputs holds a sequence of {len(ids)} tokens; at most {longest} are allowed; cut it")
        if len(ids) and not bool(((ids >= 0) & (ids < size)).all()):
            raise ValueError(f"inputs holds the token id {int(ids.max())}; ids in [0, {size}) are allowed")
        return ids


def _head(module: nn.Module, settings: FamilyConfig) -> Any:
    return build_head(
        module.config.get_text_config().hidden_size,  # type: ignore[union-attr, operator]
        build_family(settings),
        seed=settings.head_seed,
        width=settings.head_width,
        activation=settings.head_activation,
    )


def _settings(folder: Path, manifest: Manifest, family: str | None) -> FamilyConfig:
    """Makes the settings that the manifest holds; it may name families of this package, but import nothing else."""
    if family is None and not manifest.family.isidentifier():
        raise ValueError(
            f"{folder} has the family {manifest.family!r}, which is not of this package; if you trust it, give "
            f"family={manifest.family!r}"
        )
    if family is not None and family != manifest.family:
        raise ValueError(f"family is {family!r}; {folder} has {manifest.family!r}; give that")
    try:
        return family_settings(manifest.family, **manifest.settings)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{folder} does not fit this version of verl-dvpo: {error}; use the one that wrote it"
        ) from error


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """Loads the tokenizer of a folder; None where it has none."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    read_json(folder / "tokenizer_config.json")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
