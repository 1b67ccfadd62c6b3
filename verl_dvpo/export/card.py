# SPDX-License-Identifier: Apache-2.0
"""The model card of an exported critic, filled from its manifest."""

import json
from collections.abc import Mapping

from verl_dvpo.saved.manifest import Manifest

_TEXT = """---
library_name: verl-dvpo
tags: [value-model, critic, reinforcement-learning]
---

# Value model of the family `{family}`

It gives each token of a text a distribution of the return that follows, {outputs} numbers a token. Made by
[verl-dvpo](https://pypi.org/project/verl-dvpo/){source}.

```python
from verl_dvpo import ValueModel

model = ValueModel.from_pretrained("this folder")
(values,) = model.values(["a prompt and the answer so far"])
values.mean      # (tokens,) the value after each token
values.spread    # (tokens,) standard deviation
values.quantiles([0.1, 0.5, 0.9])  # (tokens, 3)
```

To go on with it: `critic.model.path="this folder"`, with the same `critic.value`.

## Settings of the family

```json
{settings}
```

## How it was made

{rows}

It judges what the policy that it was trained beside would get from here. For other policies, prompts or rewards its
numbers mean little.
"""


def model_card(manifest: Manifest, metrics: Mapping[str, float]) -> str:
    """Returns the card: family, settings, what made it, and the metrics of the run.

    Args:
        manifest: of the exported critic.
        metrics: name -> number.
    """
    facts = manifest.facts
    source = f", at step {facts['step']} of a run" if "step" in facts else ""
    rows = {
        "base model": facts.get("base_model"),
        **{f"algorithm: {name}": value for name, value in facts.get("algorithm", {}).items()},
        **{f"seed: {name}": value for name, value in facts.get("seeds", {}).items()},
        **{f"version: {name}": value for name, value in facts.get("versions", {}).items()},
        "git revision": facts.get("git_revision"),
        "configuration, SHA-256": facts.get("config_sha256"),
        **{name: f"{value:.4g}" for name, value in metrics.items()},
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return _TEXT.format(
        family=manifest.family,
        outputs=manifest.num_outputs,
        source=source,
        settings=json.dumps(manifest.settings, indent=2),
        rows="\n".join(["| | |", "| --- | --- |", *lines]),
    )
